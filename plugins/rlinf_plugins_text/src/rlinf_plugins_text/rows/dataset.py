"""`[data]` of text: where it lies, in which of the common shapes, and what of it is held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from rlinf_core import DatasetConfig, Sample
from rlinf_core.data.sample import Row
from rlinf_core.data.transforms import Transform

Format = Literal["text", "prompt_completion", "messages", "sharegpt"]

KEYS: Mapping[str, Sequence[str]] = {
    "text": ("text",),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages", "role", "content"),
    "sharegpt": ("conversations", "from", "value"),
}
"""What a row of each format is made of: the names that `data.keys` may map to others."""
ROLES: Mapping[str, str] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
}
"""Who speaks in ShareGPT's conversations -> roles of chat templates."""


@dataclass(frozen=True)
class AsTokens(Transform):
    """Rows are tokens already; the source made them."""

    def __call__(self, sample: Row) -> Sample:
        """The row."""
        return dict(sample)  # type: ignore[return-value]


class TextDatasetConfig(DatasetConfig):
    """Text for language models: plain, prompts with completions, or conversations."""

    run_defaults: ClassVar[Mapping[str, Any]] = {"policy": {"type": "text"}}

    repo_id: str = ""
    """A file (`.jsonl`, `.json`, `.parquet`, `.csv`, `.txt`), a folder of such, or the id of a dataset on the hub."""
    format: Format = "messages"
    """What a row is: `text`, plain text, trained as a whole; `prompt_completion`; `messages`, a chat as OpenAI and
    transformers have it; `sharegpt`, a chat of `from` and `value`."""
    keys: dict[str, str] = {}
    """Columns of the data that are called otherwise: the format's name -> the column's. Formats' names: `text`;
    `prompt`, `completion`; `messages`, `role`, `content`; `conversations`, `from`, `value`."""
    roles: dict[str, str] = {}
    """Speakers in the data -> `system`, `user`, `assistant` or another role that the chat template knows, besides
    the usual names of ShareGPT."""
    as_chat: bool = False
    """Put prompt and completion into the chat template, as a user's message and the answer. Otherwise they follow one
    another as they are, with the end-of-text token at the end."""
    loss_on: Literal["completion", "all"] = "completion"
    """Tokens that are trained: those of completions and of the assistant, or all. Plain text is trained whole."""
    files: tuple[str, ...] = ()
    """Patterns of file names in the folder or the hub's dataset; empty: all that can be read."""
    subset: str = ""
    """Which configuration of a hub dataset."""
    split: str = "train"
    """Which split of a hub dataset to train on."""
    validation_files: tuple[str, ...] = ()
    """Files whose rows are held out, instead of a share: paths, or patterns in the folder."""
    validation_split: str = ""
    """Split of a hub dataset that is held out, instead of a share."""
    validation_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the examples that is held out of training for validation."""
    validation_episodes: tuple[int, ...] = ()
    """Numbers of examples, from 0, to hold out instead of a share."""

    @model_validator(mode="after")
    def _keys_are_of_the_format(self) -> TextDatasetConfig:
        if unknown := sorted(self.keys.keys() - set(KEYS[self.format])):
            raise ValueError(
                f"keys: format {self.format!r} has no {', '.join(unknown)} (it has: {', '.join(KEYS[self.format])})"
            )
        if self.as_chat and self.format != "prompt_completion":
            raise ValueError(f'as_chat is for format = "prompt_completion"; {self.format!r} is never or always a chat')
        if self.roles and self.format not in ("messages", "sharegpt"):
            raise ValueError(f"roles are those of chats; format = {self.format!r} has none")
        return self

    @model_validator(mode="after")
    def _one_way_to_hold_out_rows(self) -> TextDatasetConfig:
        names = ("validation_fraction", "validation_episodes", "validation_files", "validation_split")
        if len(ways := [name for name in names if getattr(self, name)]) > 1:
            raise ValueError(f"set one of {', '.join(ways)}")
        return self

    @property
    def has_validation(self) -> bool:
        """Whether any row is held out."""
        return super().has_validation or bool(self.validation_files or self.validation_split)

    @property
    def is_chat(self) -> bool:
        """Whether rows go through the chat template."""
        return self.as_chat or self.format in ("messages", "sharegpt")

    def column(self, name: str) -> str:
        """The data's name of a part of a row."""
        return self.keys.get(name, name)

    def repack(self) -> Transform:
        """Rows are samples already."""
        return AsTokens()
