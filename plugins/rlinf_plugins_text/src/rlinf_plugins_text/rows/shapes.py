"""The shapes in which chats are stored, brought to the one that chat templates take. Imports no torch.

JSON texts are decoded, nulls that Arrow adds are dropped, parts of content are joined, and a struct of lists becomes a
list of messages. What has no such form is refused by the caller, which knows the place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rlinf_core import UserError
from rlinf_core.untrusted.text import parse_json

IMAGE = "\ue0f2"
"""Stands for an image in a text until a chat template or a processor writes something in its place."""
IMAGE_PARTS = frozenset({"image", "image_url", "input_image"})
"""Types of content parts that hold an image: those of transformers and of OpenAI's two APIs."""
TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
"""Types of content parts whose `text` is joined: those of chat templates and of OpenAI's two APIs."""


def decoded(value: Any, name: str) -> Any:
    """A list or an object that is stored as JSON text, decoded once; other values unchanged.

    Nulls inside JSON text were written on purpose and stay; elsewhere they come from Arrow, which gives every struct of
    a column the keys of all others, and are dropped at any depth.

    Raises:
        UserError: The text is not the JSON of a list or an object.
    """
    if not isinstance(value, str):
        return without_nulls(value)
    if not value.strip():
        return None
    try:
        found = parse_json(value)
    except ValueError as error:
        raise UserError(f"{name} is text that is not JSON: {error}") from error
    if not isinstance(found, list | dict | None):
        raise UserError(f"{name} is the JSON of {found!r}, not of a list or an object")
    return found


def without_nulls(value: Any) -> Any:
    """The value without the keys whose value is null, at any depth; nulls in lists stay."""
    if isinstance(value, Mapping):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(one) for one in value]
    return value


def transposed(value: Any) -> Any:
    """A list of objects for an object of equally long lists, as `datasets` stores a `Sequence` of objects."""
    if not isinstance(value, Mapping) or not value or not all(isinstance(one, list) for one in value.values()):
        return value
    if len({len(one) for one in value.values()}) != 1:
        return value
    return [without_nulls(dict(zip(value, row, strict=True))) for row in zip(*value.values(), strict=True)]


def joined(content: Any, name: str, image: Callable[[Mapping[str, Any], str], str] | None = None) -> Any:
    """The text of a list of parts, one after the other without anything between, as chat templates write them.

    Args:
        content: A text, or a list of parts.
        name: What it is, for messages.
        image: Returns what stands for an image in the text; None: images are not read.

    Raises:
        UserError: A part is neither text nor an image.
    """
    if not isinstance(content, list | tuple):
        return content
    texts = []
    for part in content:
        kind = _kind(part)
        if kind in IMAGE_PARTS and image is not None:
            texts.append(image(part, f"an image of {name}"))
            continue
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind not in TEXT_PARTS or not isinstance(text, str):
            read = "text" if image is None else "text and images"
            hint = "" if kind not in IMAGE_PARTS else "; images need a vision-language model: docs/vlm.md"
            raise UserError(
                f"{name} has a part of type {kind!r}: only {read} is read; remove the part, or the row{hint}"
            )
        texts.append(text)
    return "".join(texts)


def _kind(part: Any) -> Any:
    """The type of a content part; one without a type is what its key says."""
    if not isinstance(part, Mapping):
        return "text"
    return part.get("type") or next((key for key in ("image", "image_url", "video") if part.get(key)), "text")


def as_parts(messages: Sequence[Mapping[str, Any]], *, every: bool) -> list[Mapping[str, Any]]:
    """Messages whose content is a list of parts, of text and images, where they have images.

    Args:
        messages: Messages with texts, in which `IMAGE` stands for an image.
        every: Also messages without images, for templates that take nothing else.
    """
    changed: list[Mapping[str, Any]] = []
    for one in messages:
        content = one["content"]
        if not isinstance(content, str) or not (IMAGE in content or (every and content)):
            changed.append(one)
            continue
        pieces = re.split(f"({IMAGE})", content)
        parts = [{"type": "image"} if piece == IMAGE else {"type": "text", "text": piece} for piece in pieces if piece]
        changed.append({**one, "content": parts})
    return changed


def calls(value: Any, name: str) -> list[Any]:
    """Tool calls, from a list, an object, or the JSON text of either; their arguments stay as they are.

    Raises:
        UserError: It is something else.
    """
    given = decoded(value, name)
    given = [given] if isinstance(given, Mapping) else given
    if not isinstance(given, list):
        raise UserError(f"{name} must be a list of calls, not {type(given).__name__}")
    return [decoded(one, name) for one in given]


def arguments_of(messages: Sequence[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    """The messages with the arguments of calls in the forms that templates take, the usual one first.

    Most templates write an object as JSON, and would encode a text once more; a few (DeepSeek-V3) concatenate a text.
    """
    yield _with_arguments(messages, _object)
    if any(one.get("tool_calls") for one in messages):
        yield list(messages)
        yield _with_arguments(messages, _text)


def _with_arguments(messages: Sequence[Mapping[str, Any]], change: Callable[[Any], Any]) -> list[Mapping[str, Any]]:
    def changed(call: Any) -> Any:
        if not isinstance(call, Mapping):
            return call
        if isinstance(call.get("function"), Mapping):
            return {**call, "function": changed(call["function"])}
        return {**call, "arguments": change(call["arguments"])} if "arguments" in call else call

    return [
        {**one, "tool_calls": [changed(call) for call in one["tool_calls"]]} if one.get("tool_calls") else one
        for one in messages
    ]


def _object(arguments: Any) -> Any:
    """The object of a JSON text; other texts are arguments in a form of their own and stay as they are."""
    if not isinstance(arguments, str):
        return arguments
    try:
        found = parse_json(arguments)
    except ValueError:
        return arguments
    return found if isinstance(found, dict) else arguments


def _text(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
