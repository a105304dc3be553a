"""The `[policy]` table of π0 and π0.5: its fields and the checks on them, the model's sizes, and the tokenizer.

What the policy does with these settings is in `config`. Neither module imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, model_validator

from rlinf_core import PolicyConfig
from rlinf_core.contract.augmentation import AugmentationConfig, Augmentations
from rlinf_plugins_openpi.inputs.augmentation import OpenpiAugmentationConfig
from rlinf_plugins_openpi.inputs.tokenizer import PromptTokenizer, find_tokenizer
from rlinf_plugins_openpi.lora.config import OpenpiLoraConfig
from rlinf_plugins_openpi.model.dimensions import Pi0Dimensions
from rlinf_plugins_openpi.model.parts import Frozen, is_frozen

LORA = (
    "LoRA is switched on by the table [policy.lora] of pi0 and pi05, with rank, alpha and targets; as openpi computes "
    'it, with convention = "openpi"'
)
NO_BEHAVIOR = (
    "BEHAVIOR-1K is not in LeRobot's layout of rows: its videos are streamed, its tasks are skills within an episode, "
    "and its state of 23 numbers is cut from 256, with the fingers of a gripper summed. It needs a reader of its own "
    "(hook rlinf_open_dataset) and a transform for the state"
)
_ADAPTERS = re.compile("lora|peft|adapter", re.IGNORECASE)


class OpenpiSettings(PolicyConfig):
    """The settings that π0 and π0.5 share. They differ in prompt format, normalisation and one flag of the model."""

    export_formats: ClassVar[tuple[str, ...]] = ("openpi", "lerobot")
    not_here: ClassVar[Mapping[str, str]] = {
        "pi0_lora": LORA,
        "pi05_lora": LORA,
        "pi0_fast*": "π0-FAST is another model, which predicts actions as tokens; available are pi0 and pi05",
        "pi0[5_]*behavior": NO_BEHAVIOR,
    }
    run_defaults: ClassVar[Mapping[str, Any]] = {
        "optim": {"lr": 2.5e-5, "min_lr": 2.5e-6, "warmup_steps": 1000, "decay_steps": 30_000, "ema_decay": 0.99}
    }

    max_token_len: int = Field(ge=1)
    """Maximum number of tokens in a prompt; longer prompts are truncated."""
    discrete_state_input: bool
    """Whether the prompt contains the state, as integers from 0 to 255."""
    tokenizer: str = ""
    """A sentencepiece model (PaliGemma's for published weights): a file, a folder, or a model on the hub, `owner/name`
    with an optional `@revision` (`google/paligemma-3b-pt-224`). Empty: the small built-in one, for `dummy` only."""
    train_embedding: Literal["all", "used_rows"] = "all"
    """Which rows of the token embedding have gradients, optimizer state and a moving average. `all`: every row.
    `used_rows`: the rows of tokens that can occur in prompts of the training and held-out data (with
    `discrete_state_input`, for any state). Weight decay still applies to the others, as it would with `all`; exported
    policies contain all rows."""
    _rows: tuple[int, ...] = PrivateAttr(default=())
    """The trained rows, ascending; set with `used_rows`, once the data are known."""

    lora: OpenpiLoraConfig | None = None
    """Train low-rank adapters (LoRA) instead of all weights."""
    weights: str = ""
    """Pretrained weights in the PyTorch layout of openpi, lerobot or RLinf: a folder, a file, or a model on the hub,
    `owner/name` with an optional `@revision`. `"random"`: train from scratch."""
    variant: Literal["base", "dummy"] = "base"
    """`base`: the published size, 3.3 billion parameters. `dummy`: the same code at a size that trains on a CPU."""
    action_dim: int = Field(default=32, ge=1)
    """Width of states and actions inside the policy; narrower data are padded with zeros. Published weights: 32."""
    action_horizon: int = Field(default=50, ge=1)
    """Number of actions in a chunk, one per frame of the dataset. Each dataset format sets its own default."""
    freeze: Frozen = "nothing"
    """Which parameters are not trained. `vision`: the image tower; `vlm`: the image tower and the language model;
    `all_but_expert`: everything except the layers of the action expert."""
    augment: bool = True
    """Whether training augments images, by `augmentations` or as openpi does: colour jitter for all cameras, random
    crop and rotation for cameras that are not on a wrist. Never applied in validation or inference."""
    augmentations: Augmentations | None = None
    """Image augmentations of training, applied in order: names, or tables of a name (`type`) and its settings, as in
    `["openpi", { type = "random_erasing", probability = 0.25 }]`. Default: `["openpi"]`; `[]` is `augment = false`."""
    mask_padded_steps: bool = False
    """Leave actions past the end of an episode, which repeat the last action, out of the loss."""
    mask_padded_dims: bool = False
    """Leave the zeros that pad the robot's action to `action_dim` out of the loss."""
    prefix_multiple: int | None = Field(default=None, ge=1, le=512)
    """The images and prompts of a micro batch are packed end to end and padded to a multiple of this many tokens. A
    larger multiple means fewer shapes for compiled code, a smaller one less padding. Default: a power of two from 16 to
    256, so that padding is at most 1/64 of the tokens, or 16 tokens."""
    num_sampling_steps: int = Field(default=10, ge=1)
    """Euler steps from noise to actions at inference."""
    rtc_training_max_delay: int = Field(default=0, ge=0)
    """Train for real-time chunking: the first d actions of a chunk are given without noise and left out of the loss, d
    drawn for each sample from 0 to this many actions, each equally likely. Set it to the longest time from an
    observation to the first use of its actions, in actions; below `action_horizon`. 0: off."""

    @model_validator(mode="before")
    @classmethod
    def _no_other_adapters(cls, table: Any) -> Any:
        """Refuse other projects' LoRA settings: `lora_rank`, `use_peft`, `gemma_2b_lora`."""
        if isinstance(table, Mapping):
            variants = [key for key, value in table.items() if "variant" in key and _ADAPTERS.search(str(value))]
            named = [key for key in table if key != "lora" and _ADAPTERS.search(key)]
            if asked := sorted({*variants, *named}):
                raise ValueError(f"{', '.join(map(repr, asked))} asks for LoRA: {LORA}")
        return table

    @model_validator(mode="after")
    def _adapters_are_all_that_trains(self) -> OpenpiSettings:
        if self.lora is None:
            return self
        if self.freeze != "nothing":
            raise ValueError(
                f'freeze = "{self.freeze}" has no effect with [policy.lora], which freezes all but adapters and '
                "lora.modules_to_save: leave freeze out"
            )
        if self.train_embedding != "all":
            raise ValueError(
                f'train_embedding = "{self.train_embedding}" has no effect with [policy.lora], which freezes the '
                "embedding: leave train_embedding out"
            )
        return self

    @model_validator(mode="after")
    def _something_is_left_to_predict(self) -> OpenpiSettings:
        if self.rtc_training_max_delay >= self.action_horizon:
            raise ValueError(
                f"rtc_training_max_delay = {self.rtc_training_max_delay} may give all {self.action_horizon} actions of "
                f"a chunk (action_horizon), which leaves nothing to learn: set it to {self.action_horizon - 1} or less"
            )
        return self

    @model_validator(mode="after")
    def _only_trained_weights_are_frozen(self) -> OpenpiSettings:
        if self.freeze != "nothing" and self.weights in ("", "random"):
            raise ValueError(f'freeze = "{self.freeze}" would keep random weights untrained: set policy.weights')
        return self

    @model_validator(mode="after")
    def _rows_are_trained(self) -> OpenpiSettings:
        if self.train_embedding != "all" and is_frozen("embedding.weight", self.freeze):
            raise ValueError(
                f'train_embedding = "{self.train_embedding}" has no effect with freeze = "{self.freeze}", which keeps '
                "the whole embedding as it is: leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _full_size_is_explicit(self) -> OpenpiSettings:
        if self.variant == "base" and not self.weights:
            raise ValueError(
                'the full-size variant "base" needs policy.weights: a folder, file or hub id of pretrained weights, '
                'or "random" to train 3 billion parameters from scratch'
            )
        if self.variant == "base" and not self.tokenizer:
            raise ValueError(
                'the full-size variant "base" needs policy.tokenizer: PaliGemma\'s tokenizer.model, by its path or as '
                "google/paligemma-3b-pt-224 (the small built-in one only fits the variant dummy)"
            )
        return self

    @model_validator(mode="after")
    def _augmentations_have_one_spelling(self) -> OpenpiSettings:
        """Refuse contradictions; what `augment` can say is left to it, so that a resumed run sees no change."""
        given = self.augmentations
        if given and not self.augment:
            raise ValueError(
                "augment = false contradicts augmentations, which has entries: leave augment out to use them, or leave "
                "augmentations out for no augmentation"
            )
        if given == () and self.augment and "augment" in self.model_fields_set:
            raise ValueError(
                "augment = true contradicts augmentations, which is empty: leave augment out for no augmentation, or "
                "leave augmentations out for openpi's"
            )
        if given in ((), (OpenpiAugmentationConfig(),)):
            object.__setattr__(self, "augment", bool(given))
            object.__setattr__(self, "augmentations", None)
        return self

    @property
    def active_augmentations(self) -> tuple[AugmentationConfig, ...]:
        """The augmentations of training, in order."""
        if not self.augment:
            return ()
        return (OpenpiAugmentationConfig(),) if self.augmentations is None else self.augmentations

    def files(self) -> Mapping[str, str]:
        """The tokenizer, unless it is the built-in one."""
        return {"tokenizer": self._tokenizer_path} if self.tokenizer else {}

    @property
    def dimensions(self) -> Pi0Dimensions:
        """The sizes of the model."""
        return Pi0Dimensions.of(
            self.variant, pi05=self.type == "pi05", action_dim=self.action_dim, action_horizon=self.action_horizon
        )

    def _prompt_tokenizer(self) -> PromptTokenizer:
        return PromptTokenizer(self._tokenizer_path, self.max_token_len)

    @property
    def _tokenizer_path(self) -> str:
        return find_tokenizer(self.tokenizer)
