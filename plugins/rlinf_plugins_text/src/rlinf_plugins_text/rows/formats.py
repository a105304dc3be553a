"""From a row of the data to a text and its trained parts, for each format. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from rlinf_core import UserError
from rlinf_plugins_text.rows.choices import asked
from rlinf_plugins_text.rows.dataset import CALLS, ROLES, Format, TextDatasetConfig
from rlinf_plugins_text.rows.row_images import RowImages
from rlinf_plugins_text.rows.shapes import IMAGE, calls, decoded, joined, transposed, without_nulls
from rlinf_plugins_text.rows.tokenizer import TemplateReader
from rlinf_plugins_text.rows.turns import REASONING, Message, Span
from rlinf_plugins_text.vision.images import Reference

COUNTS = ("weight", "train", "training", "loss")
"""Keys of a message that say whether it counts in the loss: those of OpenAI and Mistral, axolotl, and ms-swift."""

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
    """Length in characters of a prompt outside a chat template; see `tokens.tokenize`."""
    turns: tuple[Span, ...] = ()
    """The assistant's trained parts in a chat template, each of which has to end in a token that the model stops at."""
    unused: tuple[str, ...] = ()
    """What of the row is not in the text: columns, keys of messages, thoughts of earlier turns."""
    images: tuple[Reference, ...] = ()
    """The images of the text, in order; `expansion` replaces what stands for them."""
    image_spans: tuple[Span, ...] = ()
    """The parts of the expanded text that stand for images."""
    prefix: bool = False
    """Whether the text begins as the processor of a prefix model writes it, and its prompt is tokenized by itself."""

    def check_unicode(self) -> None:
        """Raise `UserError` for lone surrogates, which JSON can encode but no tokenizer accepts."""
        try:
            self.text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the text is not valid Unicode: {error}") from error


def to_example(
    row: Mapping[str, Any],
    config: TextDatasetConfig,
    chat: Callable[[], TemplateReader],
    images: RowImages | None = None,
    *,
    prefix: str | None = None,
) -> Example:
    """Convert a row.

    Args:
        row: Columns of the data.
        config: The format, and which columns it uses.
        chat: Returns the chat template; called only for chats.
        images: The images of the row; None: the model reads only text.
        prefix: For models whose prompt follows its images as a prefix: the text that begins the prompt.

    Raises:
        UserError: The row lacks a column, or has a value that does not match its format.
    """
    if config.format == "text":
        text = _text(row, config.column("text"))
        return Example(text, ((0, len(text)),), whole=True, unused=_unused_columns(row, config, ("text",)))
    if config.format == "prompt_completion" and not config.as_chat and not _is_conversational(row, config):
        return _pair_example(row, config, images, prefix)
    return _chat_example(row, config, chat(), images)


def _pair_example(
    row: Mapping[str, Any], config: TextDatasetConfig, images: RowImages | None, prefix: str | None
) -> Example:
    """A prompt and its completion, without a chat template."""
    names = ("prompt", "completion")
    prompt, completion = (_text(row, config.column(name)) for name in names)
    if images is not None:
        prompt = images.placed(prompt, repr(config.column("prompt")))
        prompt = images.before() + prompt
    if prefix is not None:  # As PaliGemma's processor does: images, beginning of the text, prompt, line break.
        last = prompt.rfind(IMAGE) + 1
        prompt = f"{prompt[:last]}{prefix}{prompt[last:]}\n"
    text = prompt + completion
    first = 0 if config.loss_on == "all" else len(prompt)
    unused = _unused_columns(row, config, names if images is None else (*names, "images"), *_image_columns(row, images))
    return Example(
        text,
        ((first, len(text)),),
        whole=True,
        prompt=len(prompt),
        unused=unused,
        images=tuple(images.found) if images is not None else (),
        prefix=prefix is not None,
    )


def _image_columns(row: Mapping[str, Any], images: RowImages | None) -> tuple[str, ...]:
    """The column with images, if they are read."""
    return () if images is None else (images.column,)


def _chat_example(
    row: Mapping[str, Any], config: TextDatasetConfig, template: TemplateReader, images: RowImages | None
) -> Example:
    read = _read_messages(row, config, images)
    arguments = decoded(row.get(column := config.column("chat_template_kwargs")), repr(column)) or {}
    if not isinstance(arguments, Mapping):
        raise UserError(f"{column!r} must be an object of variables for the chat template, not {_shown(arguments)}")
    accepted = {key: value for key, value in arguments.items() if key in template.accepted}
    chat = template.read(read.messages, _tools(row, config), accepted)
    spans = chat.spans
    if not all(read.counts):
        spans = _counted(spans, read, len(chat.text) if config.loss_on == "all" else None)
    trained = ((0, len(chat.text)),) if config.loss_on == "all" and all(read.counts) else tuple(spans)
    unused = (
        *_unused_columns(
            row,
            config,
            (*read.columns, "system", "chat_template_kwargs"),
            _tools_column(row, config),
            *_image_columns(row, images),
        ),
        *(f"key {key!r} of {column!r}" for key in arguments.keys() - accepted.keys()),
        *_unused_keys(read.messages, template, chat.text),
        *chat.dropped,
    )
    found = tuple(images.found) if images is not None else ()
    return Example(chat.text, trained, whole=False, turns=tuple(spans), unused=unused, images=found)


@dataclass
class _Messages:
    """The messages of a row."""

    messages: list[Message] = field(default_factory=list)
    counts: list[bool] = field(default_factory=list)
    """Whether each message counts in the loss if it is the assistant's."""
    columns: tuple[str, ...] = ()
    """The names of the format that were read."""


def _read_messages(row: Mapping[str, Any], config: TextDatasetConfig, images: RowImages | None) -> _Messages:
    if config.format == "multiple_choice":
        question, answer = asked(row, config)
        if images is not None:
            question = images.placed(question, repr(config.column("question")))
        said = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
        read = _Messages(list(said), [True, True], ("question", "choices", "answer"))
    elif config.format == "prompt_completion":
        read = _Messages(columns=("prompt", "completion"))
        for name, role in (("prompt", "user"), ("completion", "assistant")):
            some = _listed(row, config.column(name), config, role, images)
            read.messages += [message for message, _ in some]
            # As in TRL, the assistant's turns in a prompt are read, but not trained.
            read.counts += [counts and name == "completion" for _, counts in some]
    else:
        name = "conversations" if config.format == "sharegpt" else "messages"
        some = _listed(row, config.column(name), config, "", images)
        read = _Messages([message for message, _ in some], [counts for _, counts in some], (name,))
    if images is not None and (before := images.before()):
        first = next((i for i, message in enumerate(read.messages) if message["role"] == "user"), 0)
        read.messages[first] = {**read.messages[first], "content": before + read.messages[first]["content"]}
    system = row.get(column := config.column("system"))
    if system and not isinstance(system, str):
        raise UserError(f"{column!r} must be text, not {_shown(system)}")
    if system and system.strip():
        if read.messages[0]["role"] == "system":
            if read.messages[0]["content"].strip() != system.strip():
                raise UserError(f"the column {column!r} and the first message are two different system prompts")
        else:
            read.messages.insert(0, {"role": "system", "content": system})
            read.counts.insert(0, True)
    return read


def _is_conversational(row: Mapping[str, Any], config: TextDatasetConfig) -> bool:
    """Whether prompt or completion is a list of messages, as TRL has them, or the JSON text of one."""
    return any(
        isinstance(_conversation(row.get(config.column(name)), config), list | dict)
        for name in ("prompt", "completion")
    )


def _conversation(said: Any, config: TextDatasetConfig) -> Any:
    """The messages in a JSON text; every other text is words, and stays as it is."""
    if not isinstance(said, str) or said.lstrip()[:1] != "[":
        return said
    try:
        found = decoded(said, "")
    except UserError:
        return said
    role = config.column("role")
    return found if found and all(isinstance(one, Mapping) and role in one for one in found) else said


def _listed(
    row: Mapping[str, Any], column: str, config: TextDatasetConfig, role: str, images: RowImages | None
) -> list[tuple[Message, bool]]:
    """The messages in a column, and whether each counts; `role` is that of a text which stands for a message."""
    said = _value(row, column)
    said = _conversation(said, config) if role else said
    if role and isinstance(said, str):
        said = said if images is None else images.placed(said, repr(column))
        return [({"role": role, "content": said}, True)]
    if isinstance(said, str) and said.lstrip()[:1] in ("[", "{"):
        said = decoded(said, repr(column))
    said = transposed(said)
    if role and isinstance(said, Mapping):
        said = [said]
    if not isinstance(said, Sequence) or isinstance(said, str) or not said:
        raise UserError(f"{column!r} must be a non-empty list of messages, not {_shown(said)}")
    return [_message(without_nulls(one), number, config, images) for number, one in enumerate(said)]


def _tools_column(row: Mapping[str, Any], config: TextDatasetConfig) -> str:
    """The column `tools`, or `tool_defs`, as some have it."""
    column = config.column("tools")
    return "tool_defs" if column == "tools" and row.get(column) is None and "tool_defs" in row else column


def _tools(row: Mapping[str, Any], config: TextDatasetConfig) -> Sequence[Any] | None:
    """The tools that the assistant may call, which the chat template writes."""
    column = _tools_column(row, config)
    tools = decoded(row.get(column), repr(column))
    if tools and not isinstance(tools, Sequence):
        raise UserError(f"{column!r} must be a list of tools, not {_shown(tools)}")
    return [decoded(tool, f"a tool of {column!r}") for tool in tools] if tools else None


def _message(one: Any, number: int, config: TextDatasetConfig, images: RowImages | None) -> tuple[Message, bool]:
    """A message for chat templates: `role`, `content`, and other keys of the data such as `tool_calls`.

    Also returns whether it counts in the loss if it is the assistant's.
    """
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
    role = roles.get(speaker, speaker)
    rest = {key: value for key, value in one.items() if key not in (role_key, content_key, *COUNTS)}
    renamed = {config.column(key): key for key in ("reasoning_content", "thinking") if key in config.keys}
    rest = {renamed.get(key, key): value for key, value in rest.items()}
    content = one.get(content_key)
    if role == CALLS:
        role, content, rest["tool_calls"] = "assistant", "", _spoken_calls(content, number)
    elif given := rest.pop("tool_calls", None) or rest.pop("function_call", None):
        rest["tool_calls"] = [
            call if "function" in call or not isinstance(call, Mapping) else {"type": "function", "function": call}
            for call in calls(given, f"the calls of message {number}")
        ]
    if content is None and not rest.get("tool_calls"):
        content = _value(one, content_key, f" (message {number})")
    content = joined(content, name := f"{content_key!r} of message {number}", images.of_part if images else None)
    if images is not None and isinstance(content, str) and isinstance(one.get(content_key), str):
        content = images.placed(content, name)
    if not isinstance(content, str) and not (content is None and rest.get("tool_calls")):
        raise UserError(f"{content_key!r} of message {number} must be text, not {_shown(content)}")
    message = {**rest, "role": role, "content": content or ""}
    return message, _counts(one, number, trained=role == "assistant", everything=config.loss_on == "all")


def _spoken_calls(content: Any, number: int) -> list[Any]:
    """The calls in the text of a speaker such as `function_call`, as LLaMA-Factory has them."""
    found = calls(content, f"message {number}, a call,") if content else []
    if not found or not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in found):
        raise UserError(f"message {number} must be the JSON of calls with name and arguments, not {_shown(content)}")
    return [{"type": "function", "function": call} for call in found]


def _counts(one: Mapping[str, Any], number: int, *, trained: bool, everything: bool) -> bool:
    """Whether a message counts in the loss according to its own keys."""
    for key in ("train_detail", "training_detail"):
        if one.get(key):
            raise UserError(f"message {number} has {key!r}, which selects parts of a message: this is not supported")
    given = {key: one[key] for key in COUNTS if one.get(key) is not None}
    for key, value in given.items():
        if value not in (0, 1):
            raise UserError(
                f"{key!r} of message {number} is {_shown(value)}: a message counts (1, true) or does not (0, false)"
            )
        if not trained and bool(value) != everything:
            says = (
                'does not count, but data.loss_on = "all" trains it'
                if everything
                else "counts, but only the assistant's messages are trained (data.loss_on)"
            )
            raise UserError(f"{key!r} of message {number} says that it {says}: remove the key")
    return all(map(bool, given.values()))


def _counted(spans: Sequence[Span], read: _Messages, length: int | None) -> list[Span]:
    """The parts that count; with `length`, the whole text of that length without the assistant's parts that do not."""
    said = [
        counts for message, counts in zip(read.messages, read.counts, strict=True) if message["role"] == "assistant"
    ]
    if len(said) != len(spans):
        raise UserError(
            f"the chat template marks {len(spans)} parts by {{% generation %}} for {len(said)} messages of the "
            "assistant, so that it is not clear which parts the weights of messages belong to"
        )
    if length is None:
        return [span for span, counts in zip(spans, said, strict=True) if counts]
    silent = [span for span, counts in zip(spans, said, strict=True) if not counts]
    edges = [0, *(edge for span in silent for edge in span), length]
    return [(first, last) for first, last in zip(edges[::2], edges[1::2], strict=True) if last > first]


def _unused_columns(
    row: Mapping[str, Any], config: TextDatasetConfig, names: Sequence[str], *columns: str
) -> tuple[str, ...]:
    used = {*columns, *(config.column(name) for name in names)}
    return tuple(f"column {key!r}" for key, value in row.items() if key not in used and value not in (None, "", [], {}))


def _unused_keys(messages: Sequence[Message], template: TemplateReader, text: str) -> Iterator[str]:
    """Keys of messages that the template does not read, or whose words are not in the text."""
    known = {"role", "content", "tool_calls", *REASONING}
    for key in dict.fromkeys(key for message in messages for key in message if key not in known):
        values = [message[key] for message in messages if key in message]
        read = re.search(rf"\b{re.escape(key)}\b", template.source)
        if not read or not all(value in text for value in values if isinstance(value, str)):
            yield f"key {key!r} of messages"


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
        raise UserError(f"no {column!r}{where}; found: {', '.join(map(str, row)) or 'nothing'}{way_out}")
    return row[column]


def _format_of(row: Mapping[str, Any]) -> Format | Literal[""]:
    """The format whose columns a row has, under their own names; empty: none is certain."""
    for format, list_, key in (("messages", "messages", "role"), ("sharegpt", "conversations", "from")):
        said = row.get(list_)
        if isinstance(said, list) and said and isinstance(said[0], Mapping) and key in said[0]:
            return cast("Format", format)
    if all(isinstance(row.get(column), str | list) for column in ("prompt", "completion")):
        return "prompt_completion"
    return "text" if isinstance(row.get("text"), str) else ""


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:60]}{'...' * (len(text) > 60)}"
