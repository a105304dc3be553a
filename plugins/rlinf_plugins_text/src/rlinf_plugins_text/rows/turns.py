"""Finds the assistant's turns in a chat whose template does not mark them. Imports no torch.

The chat is rendered a second time with private-use characters as marks around the assistant's words. Their positions in
the output show where the words are, whatever the template adds or drops (Qwen3 drops earlier thoughts). A turn begins
where the prompt for the assistant ends, and ends with what the template writes after the last message of a chat.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlinf_core import UserError

Message = Mapping[str, Any]
Span = tuple[int, int]
"""Index of the first character, and of the one after the last."""
Render = Callable[[Sequence[Message], bool], str]
"""The text of messages; with True, followed by the prompt for the assistant's next turn."""

MARKS, LAST_MARK = 0xF0000, 0xFFFFD
"""Range of private-use characters; each message takes two."""


def way_out(messages: Sequence[Message], does: str, *, tools: bool = False) -> str:
    """Which template to use instead: one way out for chats with tools, which "chatml" cannot write, another without.

    Args:
        messages: The chat.
        does: What the template must do, apart from writing tools.
        tools: Whether the row lists tools.
    """
    if tools or any(message.get("tool_calls") for message in messages):
        return (
            f"set policy.chat_template to a Jinja file that {does} and writes tools and their calls; docs/text.md, "
            '"Tools", has one'
        )
    return f'set policy.chat_template to "chatml", or to a Jinja file that {does}'


def find_turns(render: Render, messages: Sequence[Message]) -> tuple[str, list[Span]]:
    """The text of a chat, and the assistant's turns in it, each including the token that ends it.

    Raises:
        UserError: A turn cannot be found: the template changes its words, or ends it differently if messages follow.
    """
    text = render(messages, False)
    said = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    marked = [_marked(message, number) if number in said else message for number, message in enumerate(messages)]
    without, places = _read(render(marked, False))
    if without != text:
        places = {}
    spans: list[Span] = []
    for number in said:
        asked = _asked(render, messages[:number])
        span = _between_marks(render(marked[: number + 1], False), text, places, asked, number)
        if span is None:
            span = _difference(render(messages[: number + 1], False), text, asked, messages[number])
        if span is None or span[0] < (spans[-1][1] if spans else 0):
            raise UserError(
                f"the assistant's words in message {number} cannot be found in the rendered chat: the template drops "
                "or changes them, or ends them differently if messages follow; "
                + way_out(messages, "marks the assistant's words by {% generation %}")
            )
        spans.append(span)
    return text, spans


def _between_marks(until: str, text: str, places: Mapping[int, int], asked: str | None, number: int) -> Span | None:
    """Find a turn by its marks; `until` is the marked text of the chat up to and including this turn."""
    begin, end = places.get(2 * number), places.get(2 * number + 1)
    alone, there = _read(until)
    last = there.get(2 * number + 1)
    if end is None or last is None:
        return None
    stop = _ended(alone[last:], text, end)
    if stop is None:
        return None
    if asked is not None and text.startswith(asked) and len(asked) <= (end if begin is None else begin):
        return len(asked), stop
    if begin is None:
        return None
    # A space before the first word belongs to its token.
    return len(text[:begin].rstrip(" ")), stop


def _ended(tail: str, text: str, place: int) -> int | None:
    """The end in `text` of a turn whose words end at `place`; None: not found.

    `tail` follows the words in a chat that ends with this turn. Trailing white space belongs to what follows. Phi-3
    writes an end token after each turn and another one after the chat: the part of `tail` found in `text` counts.
    """
    whole = tail.rstrip() or tail
    if text.startswith(whole, place):
        return place + len(whole)
    stop = None
    for piece in re.findall(r"\s+|<[^<>\s]+>|.", tail):
        if not text.startswith(piece, place) or not (piece.isspace() or len(piece) > 1):
            break
        place += len(piece)
        stop = stop if piece.isspace() else place
    return stop


def _difference(after: str, text: str, asked: str | None, message: Message) -> Span | None:
    """Find a turn by the text that it adds; for messages whose marks are missing or lost."""
    if asked is None or not (after.startswith(asked) and text.startswith(after)):
        return None
    said = message["content"].strip() or _called(message)
    if said not in after[len(asked) :]:  # Templates of vision models expect typed parts, and drop plain text.
        return None
    return len(asked), max(len(asked), len(after.rstrip()))


def _asked(render: Render, before: Sequence[Message]) -> str | None:
    """The text that prompts the assistant; None if the template rejects it, e.g. when the assistant speaks first."""
    try:
        return render(before, True)
    except UserError:
        return None


def _marked(message: Message, number: int) -> Message:
    """A message with marks around its words; a tool call without words has one mark, after the tool's name."""
    begin, end = chr(MARKS + 2 * number), chr(MARKS + 2 * number + 1)
    content = message["content"]
    if words := content.strip():
        # Templates strip white space at both ends, and thoughts before the words.
        first = content.index(words)
        if thoughts := re.match(r".*</think>\s*", words, re.DOTALL):
            first += thoughts.end() if thoughts.end() < len(words) else 0
        last = len(content.rstrip())
        return {**message, "content": f"{content[:first]}{begin}{content[first:last]}{end}{content[last:]}"}
    if not (name := _called(message)):
        return message
    call, *more = message["tool_calls"]
    named = {**call.get("function", call), "name": name + end}
    return {**message, "tool_calls": [{**call, "function": named} if "function" in call else named, *more]}


def _called(message: Message) -> str:
    """The name of the first tool that a message calls; empty: it calls none."""
    try:
        (call, *_) = message["tool_calls"]
        name = call.get("function", call)["name"]
    except (KeyError, TypeError, ValueError, AttributeError):
        return ""
    return name if isinstance(name, str) else ""


def _read(marked: str) -> tuple[str, dict[int, int]]:
    """The text without marks, and the position of each mark; marks that occur twice are left out."""
    places: dict[int, int] = {}
    parts, length, twice = [], 0, set()
    for part in re.split(f"([{chr(MARKS)}-{chr(LAST_MARK)}])", marked):
        if len(part) == 1 and MARKS <= ord(part) <= LAST_MARK:
            mark = ord(part) - MARKS
            twice |= {mark} & places.keys()
            places[mark] = length
        else:
            parts.append(part)
            length += len(part)
    return "".join(parts), {mark: place for mark, place in places.items() if mark not in twice}
