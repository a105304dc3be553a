"""The `[policy]` table of text: its keys, their rules, and the values that follow from them. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from rlinf_core import PolicyConfig, UserError
from rlinf_plugins_text.rows.source import Stops
from rlinf_plugins_text.rows.tokenizer import TextTokenizer, load_tokenizer
from rlinf_plugins_text.rows.tokens import turn_ends
from rlinf_plugins_text.vision.families import FAMILIES, Family, Part, text_table, token_of
from rlinf_plugins_text.vision.processor import IMAGES, Vision, has_processor
from rlinf_plugins_text.weights.folder import config_table, find_folder, generation_table

RANDOM = "random"
"""The value of `weights` that trains from scratch."""


class TextPolicySettings(PolicyConfig):
    """The keys of `[policy]`; `config.TextPolicyConfig` adds what the policy does with them."""

    type: Literal["text"] = "text"
    weights: str = ""
    """A folder that `from_pretrained` loads, or a model on the hub as `owner/name`, optionally with `@revision`.
    `"random"` trains from scratch; `config` or `config_from` then defines the model."""
    config: dict[str, Any] = {}
    """Keys of the model's `config.json` to override. With random weights and no `config_from`, the whole of it:
    `model_type` and sizes; `vocab_size` and special tokens default to the tokenizer's."""
    config_from: str = ""
    """With random weights: a folder or hub id whose `config.json` defines the model."""
    tokenizer: str = ""
    """A folder or hub id with `tokenizer.json`; empty: the one in `weights`."""
    chat_template: str = ""
    """Replaces the tokenizer's own template: `"chatml"`, a Jinja file, or the template itself."""
    chat_template_kwargs: dict[str, Any] = {}
    """Further variables of the chat template: `{ enable_thinking = false }`. A column of that name adds to them."""
    template_date: str = ""
    """The date that a chat template writes (`strftime_now`), as `YYYY-MM-DD`. Empty: the day on which the run began,
    also when it continues on another day."""
    image_processor: dict[str, Any] = {}
    """Settings of the model's image processor to override, such as `{ max_pixels = 200704 }` for Qwen's, which limits
    the area of an image and so its tokens. An exported policy has them, too."""
    freeze: tuple[Part, ...] = ()
    """Parts of a vision-language model that are not trained: `vision_tower`, `projector`, `language_model`."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens that end an answer, for `eos_token_id` of the exported folder, besides those of the model, the tokenizer
    and the chat template."""
    max_length: int = Field(default=2048, ge=2)
    """Maximum length of a sequence, in tokens."""
    overlong: Literal["cut", "split", "drop"] = "cut"
    """What to do with longer texts: cut off the end, split them into several sequences, or drop them."""
    packing: bool = False
    """Fill sequences of `max_length` with several texts, which do not see one another: fewer, fuller samples."""
    attention: Literal["documents", "padded"] = "documents"
    """`documents`: the texts of a batch are concatenated without padding, and each attends to itself only. `padded`:
    one text per row, padded, with the architecture's own attention; state-space and hybrid models need it."""
    liger: Literal["auto", "never"] = "auto"
    """`auto`: compute the loss with `liger_kernel` if it is installed and the device is CUDA."""
    shown_samples: int = Field(default=2, ge=0)
    """Held-out prompts that the model answers at each validation, for people to read; 0: none. The evaluator
    `text_answers` shows them."""
    shown_tokens: int = Field(default=48, ge=1)
    """Length of such an answer, in tokens."""
    temperature: float = Field(default=0.0, ge=0.0)
    """Sampling temperature of such an answer; 0: always the most likely token."""

    @model_validator(mode="after")
    def _the_model_is_known(self) -> TextPolicySettings:
        if not self.weights:
            raise ValueError(
                'policy.weights is missing: a folder or hub id of pretrained weights, or "random" with policy.config'
            )
        if self.weights == RANDOM and not self.config_from and "model_type" not in self.config:
            raise ValueError('weights = "random" needs policy.config with a model_type, or policy.config_from')
        if self.weights == RANDOM and not self.tokenizer:
            raise ValueError('weights = "random" needs policy.tokenizer: a folder or hub id')
        if self.weights != RANDOM and self.config_from:
            raise ValueError('config_from needs weights = "random": pretrained weights come with their own config.json')
        return self

    @model_validator(mode="after")
    def _the_config_is_json(self) -> TextPolicySettings:
        for table in ("config", "chat_template_kwargs"):
            for name, value in getattr(self, table).items():
                if isinstance(value, float) and not math.isfinite(value):
                    raise ValueError(f"{table}.{name} must be a finite number: JSON has neither NaN nor infinity")
        return self

    @model_validator(mode="after")
    def _the_date_is_a_date(self) -> TextPolicySettings:
        if self.template_date:
            try:
                date.fromisoformat(self.template_date)
            except ValueError as error:
                raise ValueError(f"template_date must be a date such as 2026-01-31: {error}") from error
        return self

    @model_validator(mode="after")
    def _packs_are_documents(self) -> TextPolicySettings:
        if self.packing and self.attention == "padded":
            raise ValueError(
                'packing needs attention = "documents": otherwise the texts of a pack would see one another'
            )
        return self

    @model_validator(mode="after")
    def _something_is_trained(self) -> TextPolicySettings:
        if self.freeze and self.lora is not None:
            raise ValueError("freeze has no effect with [policy.lora], which freezes all but adapters: leave it out")
        if self.freeze and self.weights == RANDOM:
            raise ValueError("freeze would keep random weights untrained: set policy.weights")
        if set(self.freeze) == {"vision_tower", "projector", "language_model"}:
            raise ValueError("freeze names every part of the model: nothing is left to train")
        return self

    def vision(self) -> Vision | None:
        """What rows and batches need of a model that sees images; None if the model, or its folder, has no processor.

        Raises:
            UserError: `image_processor` or `freeze` is set for a model that reads only text.
        """
        table = self.model_table()
        kind = str(table.get("model_type"))
        folder = self.text_tokenizer().folder
        family = FAMILIES.get(kind)
        if (self.image_processor or self.freeze) and (
            family is None or (self.image_processor and not has_processor(folder))
        ):
            setting = "image_processor" if self.image_processor else "freeze"
            why = f"the model ({kind}) sees no images" if family is None else f"{folder} has no {IMAGES}"
            raise UserError(f"policy.{setting}: {why}; vision-language models are {', '.join(sorted(FAMILIES))}")
        if family is None or not has_processor(folder):
            return None
        return self._vision(family, kind, table, folder)

    def _vision(self, family: Family, kind: str, table: Mapping[str, Any], folder: Path) -> Vision:
        tokenizer = self.text_tokenizer()

        def text(*keys: str) -> str:
            token = token_of(table, *keys)
            if token is None or token >= tokenizer.size:
                raise UserError(
                    f"policy.tokenizer: {tokenizer.folder} has no token {token}, which {kind} uses for images "
                    f"({keys[0]}): it belongs to another model, or policy.config sets another"
                )
            return tokenizer.decode([token])

        around = family.around
        return Vision(
            model_type=kind,
            folder=folder,
            changes=json.dumps(self.image_processor, sort_keys=True),
            table=json.dumps(dict(table), sort_keys=True, default=str),
            token=token_of(table, "image_token_id", "image_token_index") or 0,
            placeholder=text(*family.placeholder),
            around=(text(around[0]), text(around[1])) if around is not None else ("", ""),
        )

    def text_tokenizer(self) -> TextTokenizer:
        """The tokenizer with the chat template. Raises `UserError` if it cannot be found or read."""
        setting = "policy.tokenizer" if self.tokenizer else "policy.weights"
        folder = find_folder(self.tokenizer or self.weights, setting)
        return load_tokenizer(folder, self.chat_template, self.chat_template_kwargs, self.template_date)

    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that an exported policy stops at: those that end turns first, then the model's own.

        Raises:
            UserError: The tokenizer lacks one of `stop_tokens`, or a file cannot be read.
        """
        tokenizer = self.text_tokenizer()
        named = {token: tokenizer.token_id(token) for token in self.stop_tokens}
        if missing := [token for token, found in named.items() if found is None]:
            raise UserError(f"policy.stop_tokens: the tokenizer in {tokenizer.folder} has no token {missing[0]!r}")
        folder = None if self.weights == RANDOM else find_folder(self.weights, "policy.weights")
        own = [
            *_ids(self.model_table().get("eos_token_id")),
            *_ids(generation_table(folder).get("eos_token_id")),
            *_ids(tokenizer.id_of("eos_token")),
        ]
        return tuple(dict.fromkeys([*turn_ends(tokenizer).stops, *_ids(list(named.values())), *own]))

    def stops(self) -> Stops:
        """The tokens of `stop_ids` as text, and those that end turns but are no such tokens."""
        tokenizer = self.text_tokenizer()
        tokens = [
            tuple(tokenizer.decode([one]) for one in ids) for ids in (self.stop_ids(), turn_ends(tokenizer).inner)
        ]
        return Stops(*tokens)

    def begun(self, saved: Mapping[str, Any] | None) -> Self:
        """The policy with the date of the run's first day if the chat template writes one."""
        if self.template_date:
            return self
        if saved is not None:
            given = saved.get("template_date", "")
            return self.model_copy(update={"template_date": given}) if isinstance(given, str) and given else self
        today = self.text_tokenizer().date
        return self.model_copy(update={"template_date": today}) if today else self

    def model_table(self) -> dict[str, Any]:
        """The model's `config.json` with `config` applied. Raises `UserError` if there is none."""
        source = self.config_from if self.weights == RANDOM else self.weights
        if source:
            setting = "policy.config_from" if self.weights == RANDOM else "policy.weights"
            return config_table(find_folder(source, setting), setting) | self.config
        tokenizer = self.text_tokenizer()
        ids = {f"{name}_token_id": tokenizer.id_of(f"{name}_token") for name in ("bos", "eos", "pad")}
        if self.config["model_type"] in FAMILIES:
            inner = self.config.get("text_config") or {}
            return {**ids, **self.config, "text_config": {"vocab_size": tokenizer.size, **ids, **inner}}
        return {"vocab_size": tokenizer.size, **ids, **self.config}

    def check_vocabulary(self) -> None:
        """Raise `UserError` if the tokenizer has more entries than the model's embedding has rows."""
        entries, embedded = self.text_tokenizer().size, text_table(self.model_table()).get("vocab_size")
        if isinstance(embedded, int) and entries > embedded:
            raise UserError(
                f"policy.tokenizer: {self.text_tokenizer().folder} has {entries} entries, but the model embeds only "
                f"{embedded}: they belong to different models. If tokens were added, give the model rows for them with "
                f"model.resize_token_embeddings({entries}) and save_pretrained, or leave policy.tokenizer out"
            )


def _ids(value: Any) -> list[int]:
    """The ids in a value of `eos_token_id`: one, several, or none."""
    return [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int)]
