"""The `[data]` table of text: where the data are, their format, and which part is held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from rlinf_core import DatasetConfig, Sample
from rlinf_core.data.sample import Row
from rlinf_core.data.transforms import Transform

Format = Literal["text", "prompt_completion", "messages", "sharegpt", "multiple_choice"]

BESIDE = ("tools", "system", "chat_template_kwargs", "reasoning_content", "thinking", "images")
"""Names that any chat may have: columns beside its messages, and keys of its messages."""
KEYS: Mapping[str, Sequence[str]] = {
    "text": ("text",),
    "prompt_completion": ("prompt", "completion", "role", "content", *BESIDE),
    "messages": ("messages", "role", "content", *BESIDE),
    "sharegpt": ("conversations", "from", "value", *BESIDE),
    "multiple_choice": ("question", "choices", "answer", "system", "chat_template_kwargs", "images"),
}
"""Format -> the names in a row that `data.keys` can map to other columns."""
CALLS = "function_call"
"""Role of a message whose content is the JSON of the assistant's calls."""
ROLES: Mapping[str, str] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "function_call": CALLS,
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}
"""Speakers in ShareGPT conversations -> roles in chat templates."""


@dataclass(frozen=True)
class AsTokens(Transform):
    """Passes rows on: the source has already turned them into tokens."""

    def __call__(self, sample: Row) -> Sample:
        """Return the row unchanged."""
        return dict(sample)  # type: ignore[return-value]


class TextDatasetConfig(DatasetConfig):
    """Text for language models: plain text, prompts with completions, or conversations."""

    run_defaults: ClassVar[Mapping[str, Any]] = {"policy": {"type": "text"}}

    repo_id: str = ""
    """A file (`.jsonl`, `.json`, `.parquet`, `.csv`, `.txt`), a folder of such files, or a dataset id on the hub."""
    format: Format = "messages"
    """Format of a row: `text`, plain text, all of it trained; `prompt_completion`; `messages`, a chat in the format of
    OpenAI and transformers; `sharegpt`, a chat of `from` and `value`; `multiple_choice`, a question with answers to
    choose from, of which one is right."""
    keys: dict[str, str] = {}
    """Renamed columns: the format's name -> the column in the data. The formats' names: `text`; `prompt`,
    `completion`; `messages`, `role`, `content`; `conversations`, `from`, `value`; in every chat also `tools`, `system`,
    `chat_template_kwargs`, `images`, and `reasoning_content` and `thinking`, keys of messages; in `multiple_choice`
    `question`, `choices`, `answer`, `system`, `chat_template_kwargs`, `images`."""
    roles: dict[str, str] = {}
    """Speakers in the data -> `system`, `user`, `assistant` or another role that the chat template knows, in addition
    to the usual names of ShareGPT."""
    as_chat: bool = False
    """Put prompt and completion into the chat template, as a user's message and the answer. Otherwise they are
    concatenated, with the end-of-text token at the end."""
    loss_on: Literal["completion", "all"] = "completion"
    """Which tokens are trained: those of completions and of the assistant, or all. In plain text, all are."""
    image_folder: str = ""
    """Folder of the images that rows name: files are read only inside it. Empty: the folder of the data."""
    files: tuple[str, ...] = ()
    """Patterns of file names in the folder or the hub dataset; empty: every readable file."""
    subset: str = ""
    """Configuration (subset) of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset to train on."""
    validation_files: tuple[str, ...] = ()
    """Files whose rows are held out, instead of a fraction: paths, or patterns in the folder."""
    validation_split: str = ""
    """Split of a hub dataset to hold out, instead of a fraction."""
    validation_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Fraction of the texts held out for validation."""
    validation_episodes: tuple[int, ...] = ()
    """Indices of texts to hold out, from 0, instead of a fraction."""

    @model_validator(mode="after")
    def _keys_are_of_the_format(self) -> TextDatasetConfig:
        if unknown := sorted(self.keys.keys() - set(KEYS[self.format])):
            raise ValueError(
                f"keys: format {self.format!r} has no {', '.join(unknown)} (it has: {', '.join(KEYS[self.format])})"
            )
        if self.as_chat and self.format != "prompt_completion":
            raise ValueError(f'as_chat is for format = "prompt_completion", not {self.format!r}')
        if self.roles and self.format not in ("messages", "sharegpt"):
            raise ValueError(f"roles are for chats; format = {self.format!r} has none")
        return self

    @model_validator(mode="after")
    def _one_way_to_hold_out_rows(self) -> TextDatasetConfig:
        names = ("validation_fraction", "validation_episodes", "validation_files", "validation_split")
        if len(ways := [name for name in names if getattr(self, name)]) > 1:
            raise ValueError(f"set only one of {', '.join(ways)}")
        return self

    @property
    def has_validation(self) -> bool:
        """Whether any text is held out."""
        return super().has_validation or bool(self.validation_files or self.validation_split)

    @property
    def is_chat(self) -> bool:
        """Whether rows go through the chat template."""
        return self.as_chat or self.format in ("messages", "sharegpt", "multiple_choice")

    def column(self, name: str) -> str:
        """The column in the data for a name of the format."""
        return self.keys.get(name, name)

    def repack(self) -> Transform:
        """Rows are already samples."""
        return AsTokens()
