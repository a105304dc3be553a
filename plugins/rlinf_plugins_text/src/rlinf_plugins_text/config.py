"""`[policy]` of text: which model, which tokenizer, how long sequences are. Imports no torch; `build` does, late."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import numpy as np
from pydantic import Field, model_validator

from rlinf_core import PolicyConfig, Sample, UserError
from rlinf_core.data.sample import Batch
from rlinf_plugins_text.rows.describe import TextSample, describe
from rlinf_plugins_text.rows.tokenizer import TextTokenizer, load_tokenizer, template_source
from rlinf_plugins_text.weights.folder import config_table, find_folder, find_weights, weight_files

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rlinf_core.contract.module import WeightSource
    from rlinf_core.illustration import Illustration

RANDOM = "random"


class TextPolicyConfig(PolicyConfig):
    """A causal language model of transformers, tuned on text."""

    run_defaults: ClassVar[Mapping[str, Any]] = {
        "optim": {"lr": 1e-5, "min_lr": 1e-6, "warmup_steps": 20, "decay_steps": 1000, "betas": (0.9, 0.999)}
    }
    validation_metrics: ClassVar[Mapping[str, Callable[[Mapping[str, float]], float]]] = {
        "perplexity": lambda means: math.exp(min(means["loss"], 700.0)),
        "token_accuracy": itemgetter("token_accuracy"),
    }
    larger_is_better: ClassVar[frozenset[str]] = frozenset({"token_accuracy"})

    type: Literal["text"] = "text"
    weights: str = ""
    """A folder that `from_pretrained` loads, or a model on the hub, `owner/name` with an optional `@revision`.
    `"random"`: train from the initialisation; `config` then says what the model is."""
    config: dict[str, Any] = {}
    """Keys of the model's `config.json` that shall differ. With random weights and no `config_from` the whole of it:
    `model_type` and sizes; `vocab_size` and special tokens are the tokenizer's unless they are given."""
    config_from: str = ""
    """With random weights: a folder or hub id whose `config.json` says what the model is."""
    tokenizer: str = ""
    """A folder or hub id with `tokenizer.json`; empty: that of `weights`."""
    chat_template: str = ""
    """Instead of the tokenizer's own: `"chatml"`, a Jinja file, or a template itself."""
    max_length: int = Field(default=2048, ge=2)
    """Tokens of a sequence at most."""
    overlong: Literal["cut", "split", "drop"] = "cut"
    """What becomes of longer texts: their end is cut off, they become several sequences, or they are left out."""
    packing: bool = False
    """Fill sequences of `max_length` with several texts, which do not see one another: fewer, fuller samples."""
    attention: Literal["documents", "padded"] = "documents"
    """`documents`: tokens of a batch in a row without padding, each text attends to itself. `padded`: texts side by
    side and the architecture's own attention, for models that know no other (state-space and hybrid ones)."""
    liger: Literal["auto", "never"] = "auto"
    """Whether the loss is computed by `liger_kernel` where that is installed and the device is CUDA."""
    shown_samples: int = Field(default=2, ge=0)
    """Held-out prompts that the model answers after each validation, to be read; 0: none."""
    shown_tokens: int = Field(default=48, ge=1)
    """Tokens of such an answer."""
    temperature: float = Field(default=0.0, ge=0.0)
    """How random such an answer is; 0: the likeliest token each time."""

    @model_validator(mode="after")
    def _the_model_is_known(self) -> TextPolicyConfig:
        if not self.weights:
            raise ValueError(
                'policy.weights is missing: a folder or hub id of pretrained weights, or "random" with policy.config'
            )
        if self.weights == RANDOM and not self.config_from and "model_type" not in self.config:
            raise ValueError('weights = "random" needs policy.config with a model_type, or policy.config_from')
        if self.weights == RANDOM and not self.tokenizer:
            raise ValueError('weights = "random" needs policy.tokenizer: a folder or hub id')
        if self.weights != RANDOM and self.config_from:
            raise ValueError('config_from is for weights = "random": weights have a config.json of their own')
        return self

    @model_validator(mode="after")
    def _the_config_is_json(self) -> TextPolicyConfig:
        for name, value in self.config.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"config.{name} must be a finite number: config.json knows no other")
        return self

    @model_validator(mode="after")
    def _packs_are_documents(self) -> TextPolicyConfig:
        if self.packing and self.attention == "padded":
            raise ValueError('packing needs attention = "documents": else the texts of a pack would see one another')
        return self

    def shown(self) -> int:
        """Held-out samples that `demonstrate` gets."""
        return self.shown_samples

    def describe(self, samples: Iterable[Sample]) -> Mapping[str, str]:
        """How long the texts are, what is cut and what is trained; the first sample with the trained parts marked."""
        return describe(
            cast("Iterable[TextSample]", samples),
            self.text_tokenizer(),
            max_length=self.max_length,
            overlong=self.overlong,
            packing=self.packing,
        )

    def illustrate(self, sample: Sample, draws: Mapping[str, Mapping[str, Any]]) -> Illustration:
        """Texts as tokens, those marked that are trained."""
        from rlinf_plugins_text.illustrate import illustrate

        cuts = self.overlong == "cut"
        return illustrate(cast("TextSample", sample), self.text_tokenizer(), self.max_length, cuts=cuts)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Stack samples into CPU tensors; see `collate.stack`."""
        from rlinf_plugins_text.rows.collate import stack

        return stack(
            cast("Sequence[TextSample]", samples),
            max_length=self.max_length,
            # Compiled code sees one shape where samples are full anyway.
            fixed=self.packing,
        )

    def build(self) -> nn.Module:
        """Build the model. Raises `UserError` if the tokenizer has more entries than its embedding."""
        from rlinf_plugins_text.model.policy import TextPolicy

        return TextPolicy(self)

    def build_to_count(self) -> nn.Module:
        """The same without a look at the tokenizer, and with padding where CUDA computes it."""
        from rlinf_plugins_text.model.policy import TextPolicy

        return TextPolicy(self, to_count=True)

    def largest_sample(self, cameras: Sequence[str]) -> Sample:
        """One text of `max_length` tokens, all of them trained."""
        sample = TextSample(
            tokens=np.zeros(self.max_length, np.int32),
            trained=np.ones(self.max_length, np.bool_),
            document_lengths=np.array([self.max_length], np.int32),
            full_lengths=np.array([self.max_length], np.int64),
            left_out="",
        )
        return cast("Sample", sample)

    def useful_flops(self, batch: Batch) -> float | None:
        """Of the matrices that each token meets, of causal attention within texts, of the head for trained tokens."""
        from rlinf_plugins_text.model.flops import ModelCost, training_flops

        cost = ModelCost.of(self)
        return None if cost is None else training_flops(cost, batch)

    def published_name(self, name: str) -> str:
        """The parameter's name in files that transformers writes."""
        return name.removeprefix("lm.model.")

    def exported(self) -> TextPolicyConfig:
        """Without what the folder holds itself: `config.json`, tokenizer and chat template."""
        return self.model_copy(update={"config": {}, "config_from": "", "tokenizer": "", "chat_template": ""})

    def save_weights(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """Write a folder that `from_pretrained` loads: weights, config, tokenizer."""
        from rlinf_plugins_text.weights.model import save_folder

        published = {self.published_name(name): tensor for name, tensor in tensors.items()}
        save_folder(folder, published, self.model_table(), self.text_tokenizer(), self._weights_folder())

    def open_weights(self) -> WeightSource:
        """Open the safetensors of a folder or of a model on the hub, which is downloaded first."""
        from rlinf_plugins_text.weights.model import PublishedWeights

        return PublishedWeights(find_weights(self.weights), self.published_name)

    def check_files(self) -> None:
        """Raise `UserError` for weights, config or tokenizer that are not there or do not fit one another."""
        folder = self._weights_folder()
        if folder is not None:
            weight_files(folder, self.weights)
        if self.chat_template:
            template_source(self.chat_template)
        self.check_vocabulary()

    def check_vocabulary(self) -> None:
        """Raise `UserError` if the tokenizer knows more tokens than the model embeds."""
        entries, embedded = self.text_tokenizer().size, self.model_table().get("vocab_size")
        if isinstance(embedded, int) and entries > embedded:
            raise UserError(
                f"policy.tokenizer: {self.text_tokenizer().folder} has {entries} entries, the model embeds {embedded}: "
                "they are not of the same model"
            )

    def text_tokenizer(self) -> TextTokenizer:
        """The tokenizer with the chat template. Raises `UserError` if it cannot be had."""
        setting = "policy.tokenizer" if self.tokenizer else "policy.weights"
        return load_tokenizer(find_folder(self.tokenizer or self.weights, setting), self.chat_template)

    def model_table(self) -> dict[str, Any]:
        """The model's `config.json` with the changes. Raises `UserError` if there is none."""
        source = self.config_from if self.weights == RANDOM else self.weights
        if source:
            setting = "policy.config_from" if self.weights == RANDOM else "policy.weights"
            return config_table(find_folder(source, setting), setting) | self.config
        tokenizer = self.text_tokenizer()
        ids = {f"{name}_token_id": tokenizer.id_of(f"{name}_token") for name in ("bos", "eos", "pad")}
        return {"vocab_size": tokenizer.size, **ids, **self.config}

    def _weights_folder(self) -> Path | None:
        """The folder of pretrained weights, without the weights if it is a model on the hub."""
        return None if self.weights == RANDOM else find_folder(self.weights, "policy.weights")
