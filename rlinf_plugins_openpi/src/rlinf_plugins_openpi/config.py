"""What π0 and π0.5 do with their `[policy]` table: prepare samples, build the model, load, check and export weights.

The fields are in `settings`. Importing this loads no torch: methods that need it import it when called.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

import numpy as np
from pydantic import Field

from rlinf_core import Sample, UserError
from rlinf_core.contract.weights.origin import Contradiction, compare_with_export, folder_of
from rlinf_core.data.sample import PACKING, Batch
from rlinf_core.data.transforms import Transform
from rlinf_core.hub import is_offline
from rlinf_plugins_openpi.inputs.augmentation import draw_augmentations, labelled
from rlinf_plugins_openpi.inputs.tokenizer import GEMMA_ENTRIES, SMALL_MODEL, load_processor, possible_tokens
from rlinf_plugins_openpi.inputs.transforms import OpenpiSample, PadToActionDim, ResizeWithPad, TokenizePrompt
from rlinf_plugins_openpi.model.dimensions import IMAGE_SIZE
from rlinf_plugins_openpi.model.draws import AUGMENTATION, DELAY, draw_delay, draw_flow
from rlinf_plugins_openpi.model.flops import training_flops
from rlinf_plugins_openpi.model.parts import is_frozen, linear_layers, parameter_parts
from rlinf_plugins_openpi.settings import OpenpiSettings

if TYPE_CHECKING:
    from torch import Tensor

    from rlinf_core import DatasetConfig, Policy
    from rlinf_core.contract.module import WeightSource
    from rlinf_core.contract.policy import TrainedOn
    from rlinf_core.contract.policy_options import CardNotes
    from rlinf_core.data.normalize import Stats
    from rlinf_core.illustration import Illustration

ROWS = "rows of the embedding that prompts use"
"""Key of `data_layout`."""
TASK, PROMPT = "tokens of the task", "tokens of the prompt"
"""What the policies measure of a prompt, without and with the state in it."""
PROMPT_STEP = 16
"""A suggested `max_token_len` is a multiple of this."""
ROWS_TO_COUNT = 1024
"""Trained rows assumed by a plan without data: 0.4 % of the embedding of `base`; few runs' prompts use more."""


class OpenpiPolicyConfig(OpenpiSettings):
    """The behaviour that π0 and π0.5 share."""

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
        """Noise and flow time (see `draws`), then the numbers of augmentations and the delay, where they are used."""
        drawn: dict[str, Any] = draw_flow(generator, self.action_horizon, self.action_dim)
        if augmentations := self.active_augmentations:
            drawn[AUGMENTATION] = draw_augmentations(augmentations, generator)
        if self.rtc_training_max_delay:  # Last, so that the others are those of a run without it.
            drawn[DELAY] = draw_delay(generator, self.rtc_training_max_delay)
        return drawn

    def continuation_ways(self) -> Mapping[str, int]:
        """`guided` for any delay within a chunk; `trained` up to the delay that it was trained for."""
        trained = {"trained": self.rtc_training_max_delay} if self.rtc_training_max_delay else {}
        return {"guided": self.action_horizon, **trained}

    def describe(self, samples: Iterable[Sample]) -> Mapping[str, str]:
        """Report prompt lengths, and warn if prompts are truncated; counted per row if prompts contain the state."""
        lengths: dict[object, int] = {}
        rows = 0
        for rows, sample in enumerate(cast("Iterable[OpenpiSample]", samples), start=1):
            lengths[rows if self.discrete_state_input else sample["prompt"]] = sample["prompt_length"]
        if not lengths:
            return {}
        cut, longest = sum(length > self.max_token_len for length in lengths.values()), max(lengths.values())
        counted = "prompts with their states" if self.discrete_state_input else "different prompts"
        facts = {
            "prompts": f"{cut} of {len(lengths)} {counted} cut to policy.max_token_len = {self.max_token_len}, "
            f"the longest has {longest} tokens; in {rows} rows from all over the training data"
        }
        if cut:
            lost = "the state and `Action:` are cut away in" if self.discrete_state_input else "the end is cut off"
            facts["cut prompts"] = (
                f"warning: {lost} {cut} of {len(lengths)} prompts: set policy.max_token_len = "
                f"{-(-longest // PROMPT_STEP) * PROMPT_STEP} (the longest has {longest} tokens, it is "
                f"{self.max_token_len}), or shorten the tasks"
            )
        return facts

    def measured(self, sample: Sample) -> Mapping[str, float]:
        """Tokens of the task alone, and of the whole prompt."""
        encoded = cast("OpenpiSample", sample)
        task = len(self._prompt_tokenizer().encode(encoded["prompt"]))
        return {TASK: task, PROMPT: encoded["prompt_length"]}

    def compare_with_training(self, sample: Sample, trained: Mapping[str, tuple[float, float]]) -> Mapping[str, str]:
        """Warn about tasks that are longer than in training; raise `UserError` if the prompt's state would be cut."""
        found = self.measured(sample)
        length, most = int(found[PROMPT]), self.max_token_len
        was_cut = not trained or trained.get(PROMPT, (0, 0))[1] > most
        if length > most and self.discrete_state_input and not was_cut:
            raise UserError(
                f"the prompt has {length} tokens with its state, and policy.max_token_len = {most}: the state at its "
                "end would be cut away, and the policy would act without it. Shorten the task by at least "
                f"{length - most} tokens: it has {found[TASK]:.0f}, in training at most {trained[TASK][1]:.0f}"
            )
        if length > most:
            lost = "the state and `Action:` at its end are" if self.discrete_state_input else "its end is"
            return {PROMPT: f"the prompt has {length} tokens, and policy.max_token_len = {most}: {lost} cut away"}
        if TASK in trained and found[TASK] > trained[TASK][1]:
            low, high = trained[TASK]
            return {TASK: f"the task has {found[TASK]:.0f} tokens, in training {low:.0f} to {high:.0f}"}
        return {}

    def data_layout(self, prompts: Iterable[str]) -> Mapping[str, Sequence[int]]:
        """With `train_embedding = "used_rows"`, the rows of the embedding that these prompts use."""
        if self.train_embedding == "all":
            return {}
        return {ROWS: possible_tokens(self._prompt_tokenizer(), prompts, with_state=self.discrete_state_input)}

    def with_data_layout(self, layout: Mapping[str, Sequence[int]]) -> Self:
        """A copy that trains the rows of this layout and refuses prompts that need others."""
        if not layout:
            return self
        known = self.model_copy()
        known._rows = tuple(layout[ROWS])
        return known

    def illustrate(self, sample: Sample, draws: Mapping[str, Mapping[str, Any]]) -> Illustration:
        """Augmented images, the prompt as tokens, and the masks of cameras, tokens and actions."""
        from rlinf_plugins_openpi.illustrate import illustrate

        return illustrate(self, cast("OpenpiSample", sample), draws)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Stack samples into CPU tensors; see `collate.stack` for names and shapes, `packing` for the packed prefix."""
        from rlinf_plugins_openpi.inputs.collate import stack
        from rlinf_plugins_openpi.model.packing import pack

        batch = stack(samples)
        image_tokens = self.dimensions.vision.num_tokens
        masks = (batch["image_mask"], batch["token_mask"])
        packing = pack(*masks, image_tokens=image_tokens, multiple=self.prefix_multiple)
        return {**batch, PACKING: packing}

    def build(self) -> Policy:
        """Build the model. Raises `UserError` if the tokenizer has more entries than the model's embedding."""
        if self.train_embedding == "used_rows" and not self._rows:
            raise ValueError('train_embedding = "used_rows" needs to know the data: see PolicyConfig.data_layout')
        self._check_vocabulary()
        return self.build_to_count()

    def build_to_count(self) -> Policy:
        """Build the model without opening the tokenizer; assumes `ROWS_TO_COUNT` rows if the data are not known."""
        from rlinf_plugins_openpi.model.pi0 import Pi0

        rows = self._rows or range(min(ROWS_TO_COUNT, self.dimensions.vocab_size))
        model = Pi0(
            self.dimensions,
            num_sampling_steps=self.num_sampling_steps,
            mask_padded_steps=self.mask_padded_steps,
            mask_padded_dims=self.mask_padded_dims,
            embedding_rows=() if self.train_embedding == "all" else rows,
            augmentations=labelled(self.active_augmentations),
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

    def sampling_steps(self) -> int:
        """Euler steps from noise to actions."""
        return self.num_sampling_steps

    def compile_sampling(self, policy: Any, *, on: bool) -> bool:
        """Compile a denoising step; see `model.sampling`."""
        policy.compile_sampling(on=on)
        return True

    def useful_flops(self, batch: Batch) -> float | None:
        """Operations for the images and tokens present. None with frozen parts: what they save is not counted."""
        if self.freeze != "nothing":
            return None
        sizes = zip(batch["image_mask"].sum(1).tolist(), batch["token_mask"].sum(1).tolist(), strict=True)
        return sum(training_flops(self.dimensions, images=images, text=text) for images, text in sizes)

    def published_name(self, name: str) -> str:
        """The parameter's name in openpi's PyTorch checkpoints; trained rows have the name of the whole embedding.

        A parameter that holds several published tensors keeps its own name, and so does one that a plugin adds.
        """
        from rlinf_plugins_openpi.weights.names import published_names
        from rlinf_plugins_openpi.weights.rows import TRAINED

        parts = self.published_parts(name)
        if len(parts) == 1 and name != TRAINED:
            return next(iter(parts))
        return published_names(self.dimensions).get(name, name)

    def published_parts(self, name: str) -> Mapping[str, int]:
        """The tensors of openpi's PyTorch checkpoints that a parameter stacks -> the rows of each."""
        from rlinf_plugins_openpi.weights.names import published_names
        from rlinf_plugins_openpi.weights.rows import TRAINED, WHOLE

        names = published_names(self.dimensions)
        if name == TRAINED:
            return {names[WHOLE]: len(self._rows)}
        return {names[part.name]: part.rows for part in parameter_parts(self.dimensions).get(name, ())}

    def open_weights(self) -> WeightSource:
        """Open weights in any known layout (see `weights.layouts`); those of a hub id are downloaded first."""
        from rlinf_plugins_openpi.weights.hub import find_weights
        from rlinf_plugins_openpi.weights.rows import WithRows
        from rlinf_plugins_openpi.weights.source import PublishedWeights

        source = PublishedWeights(find_weights(self.weights), self.dimensions)
        return WithRows(source, self._rows) if self._rows else source

    lora_targets: ClassVar[tuple[str, ...]] = ("vlm", "expert")
    lora_modules: ClassVar[tuple[str, ...]] = ("projections",)

    @classmethod
    def lora_run_defaults(cls, table: Mapping[str, Any]) -> Mapping[str, Any]:
        """In openpi's convention no moving average, as in openpi's LoRA configs."""
        return {"optim": {"ema_decay": 0.0}} if table.get("convention") == "openpi" else {}

    def lora_groups(self, name: str) -> Collection[str]:
        """`vlm`, `expert`, `vision` or `projections`, and `attention` or `mlp`."""
        from rlinf_plugins_openpi.weights.names import part_of

        return {part_of(name), *super().lora_groups(name)}

    def lora_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """All published parameters -> shapes."""
        from rlinf_plugins_openpi.weights.names import published_names
        from rlinf_plugins_openpi.weights.shapes import table_shapes

        names = published_names(self.dimensions)
        return {names[own]: shape for own, shape in table_shapes(self.dimensions).items()}

    def lora_matrices(self, shapes: Mapping[str, tuple[int, ...]]) -> Collection[str]:
        """The linear layers that actions depend on, and not those of the adaptive norms."""
        names = self.matrix_names()
        every = self.lora is not None and bool(self.lora.weights)
        return [names[own] for own in linear_layers(self.dimensions, every=every)]

    def matrix_names(self) -> Mapping[str, str]:
        """The linear layers, by the names of the tables of `weights` -> published names, both without `.weight`."""
        from rlinf_plugins_openpi.weights.names import published_names

        names = published_names(self.dimensions)
        return {own.removesuffix(".weight"): name.removesuffix(".weight") for own, name in names.items()}

    def table_names(self) -> Mapping[str, str]:
        """Published parameters -> their names in the tables of `weights`."""
        from rlinf_plugins_openpi.weights.names import published_names

        return {published: own for own, published in published_names(self.dimensions).items()}

    def describe_lora(self) -> str:
        """What `[policy.lora]` trains, in numbers."""
        if self.lora is None or self.lora.convention == "peft":
            return super().describe_lora()
        from rlinf_plugins_openpi.lora.describe import describe

        return describe(self, self.lora)

    def add_lora(self, policy: Any) -> None:
        """Freeze the model and add the adapters of `[policy.lora]`, in its convention."""
        if self.lora is None or self.lora.convention == "peft":
            super().add_lora(policy)
            return
        from rlinf_core.lora.apply import published_rows, trained_whole
        from rlinf_core.lora.selection import select_whole
        from rlinf_plugins_openpi.lora.apply import add_openpi_lora

        whole = None
        if self.lora.modules_to_save is not None:
            rows = published_rows(policy, self)
            whole = trained_whole(select_whole(self.lora, self, rows), rows)
        add_openpi_lora(policy, self.lora, self.matrix_names(), whole)

    def check_files(self) -> None:
        """Raise `UserError` if the weights are missing or of another model, or if the tokenizer does not fit.

        Reads headers only. Not found before the run loads them: damaged tensors, NaN or infinity, anything wrong with a
        pickle, and weights that are still on the hub.
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
        from rlinf_plugins_openpi.weights.source import check_headers

        if path := find_cached_weights(self.weights):
            check_headers(path, self.dimensions)
        elif is_offline():
            raise UserError(
                f"policy.weights: there is no file or folder {self.weights} (in {Path.cwd()}), and as a model on the "
                "hub it is not in the cache and cannot be downloaded: HF_HUB_OFFLINE is set"
            )

    def contradictions(self, data: DatasetConfig, stats: Stats | None) -> Sequence[Contradiction]:
        """What `rlinf export`, lerobot or openpi left beside the weights, where it contradicts the run."""
        from rlinf_plugins_openpi.weight_origin import compare_folder
        from rlinf_plugins_openpi.weights.hub import find_cached_weights

        try:
            path = None if self.weights in ("", "random") else find_cached_weights(self.weights)
        except UserError:  # `check_files` reports it.
            return ()
        if path is None or (folder := folder_of(path)) is None:
            return ()
        keys = ("action_horizon", "discrete_state_input", "max_token_len")
        exported = compare_with_export(folder, self, data, stats, self.normalization, keys)
        return (*exported, *compare_folder(folder, self, data, stats))

    def _check_tokenizer(self) -> None:
        self._prompt_tokenizer()  # Raises a UserError that says what to set if there is no such file.
        self._check_vocabulary()

    def _check_vocabulary(self) -> None:
        path = self._tokenizer_path
        entries = load_processor(path).vocab_size()
        # Published weights only know PaliGemma's tokens. A model trained from scratch may use another vocabulary, but
        # not one as small as the built-in one; an exported policy knows the tokenizer in its own folder.
        others_fit = (
            self.variant == "dummy"
            or (self.weights == "random" and not Path(path).samefile(SMALL_MODEL))
            or Path(path).parent == Path(self.weights)
        )
        if entries < GEMMA_ENTRIES and not others_fit:
            raise UserError(
                f"the tokenizer {path!r} has {entries} entries, but the full-size variant needs PaliGemma's, which has "
                f"over {GEMMA_ENTRIES}: set policy.tokenizer to its path or to google/paligemma-3b-pt-224"
            )
        if entries > self.dimensions.vocab_size:
            raise UserError(
                f"the tokenizer {path!r} has {entries} entries, variant {self.variant} "
                f"embeds {self.dimensions.vocab_size}: set policy.tokenizer to one that fits"
                + (", or leave it empty" if self.variant == "dummy" else "")
            )

    def local_files(self) -> Mapping[str, Sequence[Path]]:
        """The files of the weights; the tokenizer is among `files`."""
        from rlinf_plugins_openpi.weights.files import weight_files
        from rlinf_plugins_openpi.weights.hub import find_cached_weights

        path = None if self.weights in ("", "random") else find_cached_weights(self.weights)
        return {} if path is None else {"policy.weights": weight_files(path)}

    def unchecked_files(self) -> Sequence[str]:
        """The weights, if they are still on the hub or in a pickle."""
        from rlinf_plugins_openpi.weights.files import PICKLES, weight_files
        from rlinf_plugins_openpi.weights.hub import find_cached_weights

        if self.weights in ("", "random"):
            return ()
        if path := find_cached_weights(self.weights):
            files = weight_files(path)
            opened = ", ".join(str(file) for file in files if file.suffix in PICKLES)
            return (f"policy.weights: {opened} is a pickle, which is checked when the run loads it",) if opened else ()
        return (
            f"policy.weights: {self.weights} is not checked: there is no such file or folder here, so it is taken as "
            "a model on the hub, which the run will download",
        )

    def exported(self) -> Self:
        """A copy with one whole embedding, as in the exported file, and without augmentation, which is for training.

        So an exported policy needs none of the packages whose augmentations it was trained with.
        """
        update = {"train_embedding": "all", "augment": False, "augmentations": None}
        return self.model_copy(update=update).with_data_layout({ROWS: ()})

    def save_weights(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """Write `model.safetensors` in openpi's PyTorch layout."""
        from rlinf_plugins_openpi.weights.rows import with_trained_rows
        from rlinf_plugins_openpi.weights.saving import save_published

        save_published(with_trained_rows(tensors, self._rows), folder / "model.safetensors", self.dimensions)

    def export(self, format: str, tensors: Mapping[str, Tensor], folder: Path, sources: Sequence[TrainedOn]) -> None:
        """Write the policy for openpi's or lerobot's loaders; see `export.openpi` and `export.lerobot`.

        Raises:
            UserError: The format cannot express something that the policy or its dataset does, or several datasets.
        """
        from rlinf_plugins_openpi.weights.rows import with_trained_rows

        whole = with_trained_rows(tensors, self._rows)
        if format == "lerobot":
            from rlinf_plugins_openpi.export.lerobot import export_lerobot

            export_lerobot(self, whole, folder, sources)
        else:
            from rlinf_plugins_openpi.export.openpi import export_openpi

            export_openpi(self, whole, folder, sources)

    def card(self, format: str, sources: Sequence[TrainedOn]) -> CardNotes:
        """What the model card says of the model and of the project that loads it; see `export.card`."""
        from rlinf_plugins_openpi.export.card import card_notes

        return card_notes(self, format, sources)


class Pi0Config(OpenpiPolicyConfig):
    """π0 (arXiv 2410.24164): the state is a token of its own; an MLP mixes time into the action tokens."""

    normalization: ClassVar[Literal["mean_std", "quantile", "none"]] = "mean_std"

    type: Literal["pi0"] = "pi0"
    max_token_len: int = Field(default=48, ge=1)
    """Maximum number of tokens in a prompt; longer prompts are truncated."""
    discrete_state_input: bool = False
    """Whether the prompt contains the state, as integers from 0 to 255, in addition to the state token."""


class Pi05Config(OpenpiPolicyConfig):
    """π0.5 (arXiv 2504.16054): time conditions the action expert's norms; the state appears in the prompt only."""

    normalization: ClassVar[Literal["mean_std", "quantile", "none"]] = "quantile"

    type: Literal["pi05"] = "pi05"
    max_token_len: int = Field(default=200, ge=1)
    """Maximum number of tokens in a prompt; longer prompts are truncated."""
    discrete_state_input: bool = True
    """Whether the prompt contains the state, as integers from 0 to 255. Otherwise the policy does not see the state."""
