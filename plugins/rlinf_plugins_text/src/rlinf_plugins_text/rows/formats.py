"""From a row of the data to a text and its trained parts, for each format. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from rlinf_core import UserError
from rlinf_plugins_text.rows.chat import ChatTemplate
from rlinf_plugins_text.rows.dataset import KEYS, ROLES, Format, TextDatasetConfig
from rlinf_plugins_text.rows.turns import Message, Span

JOIN = 'join prompt and completion to one list in a column "messages", and set data.format = "messages"'
"""What to do with a prompt that is a list of messages."""


@dataclass(frozen=True)
class Example:
    """A text and its trained parts."""

    text: str
    trained: tuple[Span, ...]
    whole: bool
    """Whether to add the tokens that begin and end a text; a chat template writes its own."""
    prompt: int = 0
    """Length in characters of a prompt outside a chat template; see `store.tokenize`."""

    def check_unicode(self) -> None:
        """Raise `UserError` for lone surrogates, which JSON can encode but no tokenizer accepts."""
        try:
            self.text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the text is not valid Unicode: {error}") from error


def to_example(row: Mapping[str, Any], config: TextDatasetConfig, chat: Callable[[], ChatTemplate]) -> Example:
    """Convert a row.

    Args:
        row: Columns of the data.
        config: The format, and which columns it uses.
        chat: Returns the chat template; called only for chats.

    Raises:
        UserError: The row lacks a column, or has a value that does not match its format.
    """
    if config.format == "text":
        text = _text(row, config.column("text"))
        return Example(text, ((0, len(text)),), whole=True)
    if config.format == "prompt_completion" and not config.as_chat:
        prompt, completion = (_text(row, config.column(name)) for name in ("prompt", "completion"))
        text = prompt + completion
        first = 0 if config.loss_on == "all" else len(prompt)
        return Example(text, ((first, len(text)),), whole=True, prompt=len(prompt))
    text, spans = chat().spans(_messages(row, config), _tools(row, config))
    return Example(text, ((0, len(text)),) if config.loss_on == "all" else tuple(spans), whole=False)


def _messages(row: Mapping[str, Any], config: TextDatasetConfig) -> Sequence[Message]:
    if config.format == "prompt_completion":
        prompt, completion = (_text(row, config.column(name)) for name in ("prompt", "completion"))
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    sharegpt = config.format == "sharegpt"
    column = config.column("conversations" if sharegpt else "messages")
    said = _value(row, column)
    if not isinstance(said, Sequence) or isinstance(said, str) or not said:
        way_out = "; store the list itself instead of its JSON" if isinstance(said, str) else ""
        raise UserError(f"{column!r} must be a non-empty list of messages, not {_shown(said)}{way_out}")
    return [_message(one, number, config) for number, one in enumerate(said)]


def _tools(row: Mapping[str, Any], config: TextDatasetConfig) -> Sequence[Any] | None:
    """The tools that the assistant may call, from the column `tools`; the chat template writes them."""
    tools = row.get("tools") if config.format == "messages" else None
    if tools and (isinstance(tools, str) or not isinstance(tools, Sequence)):
        way_out = "; store the list itself instead of its JSON" if isinstance(tools, str) else ""
        raise UserError(f"'tools' must be a list of tools, not {_shown(tools)}{way_out}")
    return tools or None


def _message(one: Any, number: int, config: TextDatasetConfig) -> Message:
    """A message for chat templates: `role`, `content`, and other keys of the data such as `tool_calls`."""
    sharegpt = config.format == "sharegpt"
    role_key, content_key = (config.column(name) for name in (("from", "value") if sharegpt else ("role", "content")))
    if not isinstance(one, Mapping):
        raise UserError(f"message {number} must be an object, not {_shown(one)}")
    roles = dict(config.roles) if not sharegpt else {**ROLES, **config.roles}
    speaker = _value(one, role_key, f" (message {number})")
    if not isinstance(speaker, str):
        raise UserError(f"{role_key!r} of message {number} must be text, not {_shown(speaker)}")
    if sharegpt and speaker not in roles:
        raise UserError(
            f"message {number} is {role_key} {speaker!r}, a speaker without a role: add it to data.roles "
            f"(known: {', '.join(roles)})"
        )
    content = one.get(content_key) if one.get("tool_calls") else _value(one, content_key, f" (message {number})")
    if not isinstance(content, str) and not (content is None and one.get("tool_calls")):
        way_out = "; join the texts of its parts" if isinstance(content, list) else ""
        raise UserError(f"{content_key!r} of message {number} must be text, not {_shown(content)}{way_out}")
    rest = {key: value for key, value in one.items() if key not in (role_key, content_key) and value is not None}
    return {**rest, "role": roles.get(speaker, speaker), "content": content or ""}


def _text(row: Mapping[str, Any], column: str) -> str:
    value = _value(row, column)
    if not isinstance(value, str):
        way_out = f"; {JOIN}" if isinstance(value, list) else ""
        raise UserError(f"{column!r} must be text, not {_shown(value)}{way_out}")
    return value


def _value(row: Mapping[str, Any], column: str, where: str = "") -> Any:
    if column not in row:
        way_out = " (data.keys renames)"
        if not where and (other := _format_of(row)):
            way_out = f'; set data.format = "{other}", which has these columns'
        elif isinstance(row.get("prompt"), list):
            way_out = f"; {JOIN}"
        raise UserError(f"no {column!r}{where}; found: {', '.join(map(str, row)) or 'nothing'}{way_out}")
    return row[column]


def _format_of(row: Mapping[str, Any]) -> Format | Literal[""]:
    """The format whose columns a row has, under their own names; empty: none is certain."""
    for format, list_, key in (("messages", "messages", "role"), ("sharegpt", "conversations", "from")):
        said = row.get(list_)
        if isinstance(said, list) and said and isinstance(said[0], Mapping) and key in said[0]:
            return cast("Format", format)
    if all(isinstance(row.get(column), str) for column in KEYS["prompt_completion"]):
        return "prompt_completion"
    return "text" if isinstance(row.get("text"), str) else ""


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:60]}{'...' * (len(text) > 60)}"
