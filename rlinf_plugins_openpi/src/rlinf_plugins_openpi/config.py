"""`[policy]` tables of π0 and π0.5: sizes, prompt format and data. Imports no torch; `build` and `collate` do, late."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import numpy as np
from pydantic import Field, model_validator

from rlinf_core import Sample, UserError
from rlinf_core.data.normalize import save_norm_stats
from rlinf_core.data.sample import PACKING, Batch
from rlinf_core.data.transforms import Transform
from rlinf_plugins_openpi.datasets.assets import asset_name
from rlinf_plugins_openpi.inputs.prompting import PromptedPolicyConfig
from rlinf_plugins_openpi.inputs.tokenizer import GEMMA_ENTRIES, SMALL_MODEL, load_processor
from rlinf_plugins_openpi.inputs.transforms import (
    IMAGE_SIZE,
    OpenpiSample,
    PadToActionDim,
    ResizeWithPad,
    TokenizePrompt,
)
from rlinf_plugins_openpi.model.dimensions import Pi0Dimensions
from rlinf_plugins_openpi.model.draws import draw_augmentation, draw_flow
from rlinf_plugins_openpi.model.flops import training_flops
from rlinf_plugins_openpi.model.freezing import Part, is_frozen
from rlinf_plugins_openpi.model.parts import parameter_parts

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rlinf_core.contract.module import WeightSource
    from rlinf_core.contract.policy import TrainedOn
    from rlinf_core.illustration import Illustration


NO_LORA = (
    "there is no LoRA here. All weights are trained, or fewer with "
    'policy.freeze = "vision", "vlm" or "all_but_expert", which takes the least memory'
)
ROWS_TO_COUNT = 1024
"""For a plan without data: a thousand rows are 0.4 % of the embedding of `base`, and few prompts use more."""
_ADAPTERS = re.compile("lora|peft|adapter", re.IGNORECASE)


class OpenpiPolicyConfig(PromptedPolicyConfig):
    """What π0 and π0.5 have in common: all but the prompt format, the normalisation and one flag of the model."""

    export_formats: ClassVar[tuple[str, ...]] = ("openpi", "lerobot")
    not_here: ClassVar[Mapping[str, str]] = {
        "pi0_lora": NO_LORA,
        "pi05_lora": NO_LORA,
        "pi0_fast": "π0-FAST is another model, which predicts actions as tokens; there are pi0 and pi05",
    }
    run_defaults: ClassVar[Mapping[str, Any]] = {
        "optim": {"lr": 2.5e-5, "min_lr": 2.5e-6, "warmup_steps": 1000, "decay_steps": 30_000, "ema_decay": 0.99}
    }

    weights: str = ""
    """Pretrained weights: a folder, a file, or a model on the hub, `owner/name` with an optional `@revision`; in the
    layout of openpi's PyTorch files, lerobot's or RLinf's. `"random"`: train from the initialisation."""
    variant: Literal["base", "dummy"] = "base"
    """`base`: the published sizes, 3.3 billion parameters. `dummy`: the same code in a size that trains on a CPU."""
    action_dim: int = Field(default=32, ge=1)
    """Numbers of a state and of an action inside the policy; the data's are filled up with zeros. Published: 32."""
    action_horizon: int = Field(default=50, ge=1)
    """Actions in a chunk, one a frame of the dataset. The dataset sets its own default."""
    freeze: Part = "nothing"
    """What is not trained: `vision`, the image tower; `vlm`, that and the language model; `all_but_expert`, everything
    but the action expert's layers."""
    augment: bool = True
    """Whether training changes images at random: colours of all cameras, crop and rotation of those on no wrist. Never
    in validation and when the policy acts."""
    mask_padded_steps: bool = False
    """Leave the actions past the end of an episode, which repeat its last one, out of the loss."""
    mask_padded_dims: bool = False
    """Leave the numbers that fill the robot's action up to `action_dim` out of the loss."""
    prefix_multiple: int | None = Field(default=None, ge=1, le=512)
    """The images and prompts of a micro batch lie end to end, and are filled up to a multiple of this many tokens: the
    larger, the fewer shapes for compiled code; the smaller, the less filler. Default: a power of two, from 16 to 256,
    so that filler is at most a 64th, or 16 tokens."""
    num_sampling_steps: int = Field(default=10, ge=1)
    """Euler steps from noise to actions when the policy acts."""

    @model_validator(mode="before")
    @classmethod
    def _no_adapters(cls, table: Any) -> Any:
        """What others call it: `lora_rank`, a table `[policy.lora]`, `use_peft`, openpi's variant `gemma_2b_lora`."""
        if isinstance(table, Mapping):
            variants = [key for key, value in table.items() if "variant" in key and _ADAPTERS.search(str(value))]
            named = [key for key in table if _ADAPTERS.search(key)]
            if asked := sorted({*variants, *named}):
                raise ValueError(f"{', '.join(map(repr, asked))} asks for LoRA, and {NO_LORA}")
        return table

    @model_validator(mode="after")
    def _only_trained_weights_are_frozen(self) -> OpenpiPolicyConfig:
        if self.freeze != "nothing" and self.weights in ("", "random"):
            raise ValueError(f'freeze = "{self.freeze}" keeps random numbers as they are: set policy.weights')
        return self

    @model_validator(mode="after")
    def _rows_are_trained(self) -> OpenpiPolicyConfig:
        if self.train_embedding != "all" and is_frozen("embedding.weight", self.freeze):
            raise ValueError(
                f'train_embedding = "{self.train_embedding}" does nothing where freeze = "{self.freeze}" keeps the '
                "whole embedding as it is: leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _full_size_is_explicit(self) -> OpenpiPolicyConfig:
        if self.variant == "base" and not self.weights:
            raise ValueError(
                'the full-size variant "base" needs policy.weights: a folder, file or hub id of pretrained weights, '
                'or "random" to train 3 billion parameters from scratch'
            )
        if self.variant == "base" and not self.tokenizer:
            raise ValueError(
                'the full-size variant "base" needs policy.tokenizer: PaliGemma\'s tokenizer.model, by its path or as '
                "google/paligemma-3b-pt-224 (the small one that is shipped fits variant dummy only)"
            )
        return self

    def chunk_length(self) -> int:
        """Number of actions in a sample."""
        return self.action_horizon

    def transforms(self) -> Sequence[Transform]:
        """Resize, tokenise, pad. Raises `UserError` if there is no tokenizer file."""
        return (
            ResizeWithPad(IMAGE_SIZE, IMAGE_SIZE),
            TokenizePrompt(self._prompt_tokenizer(), self.discrete_state_input, frozenset(self._rows) or None),
            PadToActionDim(self.action_dim),
        )

    def draw(self, generator: np.random.Generator) -> dict[str, Any]:
        """Noise and flow time, then (with `augment`) how the images are changed; see `draws`."""
        drawn = draw_flow(generator, self.action_horizon, self.action_dim)
        return drawn | (draw_augmentation(generator) if self.augment else {})

    def illustrate(self, sample: Sample, draws: Mapping[str, Mapping[str, Any]]) -> Illustration:
        """Images changed at random, the prompt as tokens, and the masks of cameras, tokens and actions."""
        from rlinf_plugins_openpi.illustrate import illustrate

        return illustrate(self, cast("OpenpiSample", sample), draws)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Stack samples into CPU tensors; see `collate.stack` for names and shapes, `packing` for what is left out."""
        from rlinf_plugins_openpi.inputs.collate import stack
        from rlinf_plugins_openpi.model.packing import pack

        batch = stack(samples)
        image_tokens = self.dimensions.vision.num_tokens
        masks = (batch["image_mask"], batch["token_mask"])
        packing = pack(*masks, image_tokens=image_tokens, multiple=self.prefix_multiple)
        return {**batch, PACKING: packing}

    def build(self) -> nn.Module:
        """Build the model. Raises `UserError` if the tokenizer has more entries than the model's embedding."""
        if self.train_embedding == "used_rows" and not self._rows:
            raise ValueError('train_embedding = "used_rows" needs to know the data: see PolicyConfig.data_layout')
        self._check_vocabulary()
        return self.build_to_count()

    def build_to_count(self) -> nn.Module:
        """The same without a look at the tokenizer; where rows of the embedding are not known, as many as may be."""
        from rlinf_plugins_openpi.model.pi0 import Pi0

        rows = self._rows or range(min(ROWS_TO_COUNT, self.dimensions.vocab_size))
        model = Pi0(
            self.dimensions,
            num_sampling_steps=self.num_sampling_steps,
            mask_padded_steps=self.mask_padded_steps,
            mask_padded_dims=self.mask_padded_dims,
            embedding_rows=() if self.train_embedding == "all" else rows,
        )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not is_frozen(name, self.freeze))
        return model

    def largest_sample(self, cameras: Sequence[str]) -> Sample:
        """Black images, a prompt of `max_token_len` tokens, and zeros."""
        images: dict[str, Any] = {name: np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8) for name in cameras}
        steps, width = self.action_horizon, self.action_dim
        sample = OpenpiSample(
            images=images,
            tokens=np.zeros(self.max_token_len, np.int64),
            token_mask=np.ones(self.max_token_len, np.bool_),
            prompt_length=self.max_token_len,
            state=np.zeros(width, np.float32),
            actions=np.zeros((steps, width), np.float32),
            actions_is_pad=np.zeros(steps, np.bool_),
            action_width=width,
        )
        return cast("Sample", sample)

    def useful_flops(self, batch: Batch) -> float | None:
        """Of the images and tokens that there are; None if parts are frozen, which spares operations nobody counted."""
        if self.freeze != "nothing":
            return None
        sizes = zip(batch["image_mask"].sum(1).tolist(), batch["token_mask"].sum(1).tolist(), strict=True)
        return sum(training_flops(self.dimensions, images=images, text=text) for images, text in sizes)

    def _check_vocabulary(self) -> None:
        path = self._tokenizer_path
        entries = load_processor(path).vocab_size()
        # Published weights know PaliGemma's tokens only. What starts from nothing may learn others, if not so few, and
        # what was exported knows those of the tokenizer beside it.
        others_fit = (
            self.variant == "dummy"
            or (self.weights == "random" and not Path(path).samefile(SMALL_MODEL))
            or Path(path).parent == Path(self.weights)
        )
        if entries < GEMMA_ENTRIES and not others_fit:
            raise UserError(
                f"the tokenizer {path!r} has {entries} entries, and the full-size variant reads PaliGemma's, which has "
                f"over {GEMMA_ENTRIES}: set policy.tokenizer to its path or to google/paligemma-3b-pt-224"
            )
        if entries > self.dimensions.vocab_size:
            raise UserError(
                f"the tokenizer {path!r} has {entries} entries, variant {self.variant} "
                f"embeds {self.dimensions.vocab_size}: set policy.tokenizer to one that fits"
                + (", or leave it empty" if self.variant == "dummy" else "")
            )

    def published_name(self, name: str) -> str:
        """The parameter's name in openpi's PyTorch checkpoints; one of several parts, or a plugin's, keeps its own.

        So do rows of the embedding, whose name is that of the whole.
        """
        from rlinf_plugins_openpi.weights import published_names
        from rlinf_plugins_openpi.weights.rows import TRAINED

        parts = self.published_parts(name)
        if len(parts) == 1 and name != TRAINED:
            return next(iter(parts))
        return published_names(self.dimensions).get(name, name)

    def published_parts(self, name: str) -> Mapping[str, int]:
        """The tensors of openpi's PyTorch checkpoints that a parameter of ours holds one below the other."""
        from rlinf_plugins_openpi.weights import published_names
        from rlinf_plugins_openpi.weights.rows import TRAINED, WHOLE

        names = published_names(self.dimensions)
        if name == TRAINED:
            return {names[WHOLE]: len(self._rows)}
        return {names[part.name]: part.rows for part in parameter_parts(self.dimensions).get(name, ())}

    def save_weights(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """Write `model.safetensors` in openpi's PyTorch layout."""
        from rlinf_plugins_openpi.weights import save_published
        from rlinf_plugins_openpi.weights.rows import with_trained_rows

        save_published(with_trained_rows(tensors, self._rows), folder / "model.safetensors", self.dimensions)

    def export(self, format: str, tensors: Mapping[str, Tensor], folder: Path, sources: Sequence[TrainedOn]) -> None:
        """Write what others' loaders read.

        `openpi`: weights and statistics under each dataset's id, for `create_trained_policy`. `lerobot`: see
        `lerobot_export`.

        Raises:
            UserError: lerobot has no place for something that the policy or its dataset does; the format has none for
                several datasets.
        """
        if format == "lerobot":
            from rlinf_plugins_openpi.export.lerobot import export_lerobot
            from rlinf_plugins_openpi.weights.rows import with_trained_rows

            if len(sources) > 1:
                names = ", ".join(source.name for source in sources)
                raise UserError(f"lerobot's format has statistics of one dataset: give --source, one of {names}")
            (source,) = sources
            assert source.stats is not None  # Both policies normalise, so the run has some.
            export_lerobot(self, with_trained_rows(tensors, self._rows), folder, source.data, source.stats)
            return
        # openpi looks under the asset id of its config, which is the dataset's id unless set otherwise.
        assets = {asset_name(source.data.repo_id): source for source in sources}
        if len(assets) < len(sources):
            names = ", ".join(source.name for source in sources)
            raise UserError(f"openpi keeps statistics by dataset, and some of {names} have the same: give --source")
        self.save_weights(tensors, folder)
        for asset, source in assets.items():
            if source.stats is not None:
                save_norm_stats(folder / "assets" / asset / "norm_stats.json", source.stats)

    def open_weights(self) -> WeightSource:
        """Open weights in any known layout (see `weights.layouts`); those of a hub id are downloaded first."""
        from rlinf_plugins_openpi.weights import PublishedWeights
        from rlinf_plugins_openpi.weights.hub import find_weights
        from rlinf_plugins_openpi.weights.rows import WithRows

        source = PublishedWeights(find_weights(self.weights), self.dimensions)
        return WithRows(source, self._rows) if self._rows else source

    def check_files(self) -> None:
        """Raise `UserError` for weights that are not there or of another model, and for a tokenizer that does not fit.

        Reads headers only: a damaged tensor, or one of another shape, is found when the run loads it; so is what is
        wrong with a pickle, or with weights that are still on the hub.
        """
        problems = []
        for check in (self._check_weights, self._check_tokenizer):
            try:
                check()
            except UserError as error:
                problems.append(str(error))
        if problems:
            raise UserError("\n".join(problems))

    def _check_weights(self) -> None:
        if self.weights in ("", "random"):
            return
        from rlinf_plugins_openpi.weights.hub import find_cached_weights
        from rlinf_plugins_openpi.weights.source import check_names

        if path := find_cached_weights(self.weights):  # None: the run will download them.
            check_names(path, self.dimensions)

    def unchecked_files(self) -> Sequence[str]:
        """The weights, where they are still on the hub."""
        from rlinf_plugins_openpi.weights.hub import find_cached_weights

        if self.weights in ("", "random") or find_cached_weights(self.weights):
            return ()
        return (
            f"policy.weights: {self.weights} is not checked: there is no such file or folder here, so it means a model "
            "on the hub, which the run will ask for it",
        )

    def _check_tokenizer(self) -> None:
        self._prompt_tokenizer()  # Says what to set if there is no such file.
        self._check_vocabulary()

    @property
    def dimensions(self) -> Pi0Dimensions:
        """The sizes of the model."""
        return Pi0Dimensions.of(
            self.variant, pi05=self.type == "pi05", action_dim=self.action_dim, action_horizon=self.action_horizon
        )


class Pi0Config(OpenpiPolicyConfig):
    """π0 (arXiv 2410.24164): the state is a token of its own, actions and time are mixed by an MLP."""

    normalization: ClassVar[Literal["mean_std", "quantile", "none"]] = "mean_std"

    type: Literal["pi0"] = "pi0"
    max_token_len: int = Field(default=48, ge=1)
    """Tokens of a prompt at most; longer ones are cut."""
    discrete_state_input: bool = False
    """Whether the state stands in the prompt, as integers of 0..255, besides its token."""


class Pi05Config(OpenpiPolicyConfig):
    """π0.5 (arXiv 2504.16054): time conditions the action expert's norms, the state is seen only in the prompt."""

    normalization: ClassVar[Literal["mean_std", "quantile", "none"]] = "quantile"

    type: Literal["pi05"] = "pi05"
    max_token_len: int = Field(default=200, ge=1)
    """Tokens of a prompt at most; longer ones are cut."""
    discrete_state_input: bool = True
    """Whether the state stands in the prompt, as integers of 0..255. Otherwise the policy does not see the state."""
