"""Finds the assistant's turns in a chat whose template does not mark them, and what a template leaves out of a chat.

Imports no torch.

The chat is rendered a second time with private-use characters as marks around the assistant's words. Their positions in
the output show where the words are, whatever the template adds or drops (Qwen3 drops earlier thoughts). A turn begins
where the prompt for the assistant ends, and ends with what the template writes after the last message of a chat.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlinf_core import UserError

Message = Mapping[str, Any]
Span = tuple[int, int]
"""Index of the first character, and of the one after the last."""
Render = Callable[[Sequence[Message], bool], str]
"""The text of messages; with True, followed by the prompt for the assistant's next turn."""

MARKS, LAST_MARK = 0xF0000, 0xFFFFD
"""Range of private-use characters; each message takes two."""
THOUGHTS = re.compile(r"(?:\s|</?think>|<?/?think>?|>)*")
"""Tags around thoughts, from any place in them."""
LOST_MARKS, LAST_LOST_MARK = 0x100000, 0x10FFFD
"""Range of private-use characters for `find_lost`, one per text of a chat."""
REASONING = ("reasoning_content", "reasoning", "thinking", "the thoughts")
"""Keys of a message that hold the assistant's thoughts, and what stands for those that its content begins with."""
CONTROL = re.compile(r"<\|[^|<>\s]+\|>|<\uff5c[^\uff5c<>\s]+\uff5c>|<(?:start|end)_of_turn>|</?s>")
"""What templates write as one token, in the forms that model families use."""


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
    # A prompt that opens thoughts, or closes them, is not what a turn with or without thoughts begins with.
    parted = len(os.path.commonprefix([asked or "", text]))
    if asked is not None and THOUGHTS.fullmatch(asked, parted) and parted <= (end if begin is None else begin):
        between = "" if begin is None else THOUGHTS.sub("", text[parted:begin])
        if begin is None or between:
            return parted, stop
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
    # The turn may end otherwise if messages follow: gpt-oss then writes `<|end|>` instead of `<|return|>`.
    if CONTROL.fullmatch(whole) and (other := CONTROL.match(text, place)):
        return other.end()
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


@dataclass(frozen=True)
class Lost:
    """Words of a chat that are not in its text."""

    what: str
    """A key of the message, "a call", or "a tool"."""
    message: int | None
    """Number of the message; None: a tool."""
    words: str


def find_lost(
    render: Callable[[Sequence[Message], Sequence[Any] | None], str],
    messages: Sequence[Message],
    tools: Sequence[Any] | None,
    text: str,
) -> list[Lost]:
    """What a template leaves out: contents, thoughts, calls with their arguments, and tools by name.

    The chat is rendered again with one private-use character inside each of these texts; a character that is missing in
    the output belongs to a text that was left out. If the characters change anything else, the texts are searched.

    Args:
        render: The text of messages and tools.
        messages: The chat.
        tools: The tools that the assistant may call.
        text: Their text.
    """
    marker = _Marker()
    marked = [marker.message(number, message) for number, message in enumerate(messages)]
    named = [marker.tool(tool) for tool in tools] if tools else tools
    try:
        rendered = render(marked, named)
    except UserError:
        rendered = ""
    pattern = f"[{chr(LOST_MARKS)}-{chr(LAST_LOST_MARK)}]"
    there = {ord(mark) - LOST_MARKS for mark in re.findall(pattern, rendered)}
    if re.sub(pattern, "", rendered) == text:
        missing = [one for number, one in enumerate(marker.texts) if number not in there]
    else:
        missing = [one for one in marker.texts if not _contains(text, one.words)]
    return missing


@dataclass
class _Marker:
    """Puts a mark into each text of a chat, and remembers them."""

    texts: list[Lost] = field(default_factory=list)

    def message(self, number: int, message: Message) -> Message:
        changed = dict(message)
        thoughts, end, words = message["content"].rpartition("</think>")
        changed["content"] = self._mark(thoughts, REASONING[-1], number) + end + self._mark(words, "content", number)
        for key in REASONING[:-1]:
            if isinstance(message.get(key), str):
                changed[key] = self._mark(message[key], key, number)
        if isinstance(message.get("tool_calls"), list):
            changed["tool_calls"] = [self._call(number, call) for call in message["tool_calls"]]
        return changed

    def tool(self, tool: Any) -> Any:
        """A tool with a mark in its name; the rest is a schema, which templates compare with words."""
        if not isinstance(tool, Mapping):
            return tool
        if isinstance(tool.get("function"), Mapping):
            return {**tool, "function": self.tool(tool["function"])}
        return {**tool, "name": self._mark(tool["name"], "a tool", None)} if _is_text(tool.get("name")) else tool

    def _call(self, number: int, call: Any) -> Any:
        if not isinstance(call, Mapping):
            return call
        if isinstance(call.get("function"), Mapping):
            return {**call, "function": self._call(number, call["function"])}
        changed = dict(call)
        if _is_text(call.get("name")):
            changed["name"] = self._mark(call["name"], "a call", number)
        if "arguments" in call:
            changed["arguments"] = self._all(call["arguments"], number)
        return changed

    def _all(self, value: Any, number: int) -> Any:
        if isinstance(value, str):
            return self._mark(value, "an argument of a call", number)
        if isinstance(value, Mapping):
            return {key: self._all(one, number) for key, one in value.items()}
        return [self._all(one, number) for one in value] if isinstance(value, list) else value

    def _mark(self, text: str, what: str, message: int | None) -> str:
        """The text with a mark in the middle of its words: templates look at how texts begin and end."""
        words = text.removeprefix("<think>").strip() if what == REASONING[-1] else text.strip()
        place = LOST_MARKS + len(self.texts)
        if not words or place > LAST_LOST_MARK:
            return text
        self.texts.append(Lost(what, message, words))
        middle = text.index(words) + len(words) // 2
        return text[:middle] + chr(place) + text[middle:]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _contains(text: str, words: str) -> bool:
    """Whether a text has these words, perhaps with other white space, as JSON, or one by one."""
    plain = "".join(text.split())
    forms = (words, json.dumps(words, ensure_ascii=False)[1:-1], json.dumps(words)[1:-1])
    return any("".join(form.split()) in plain for form in forms) or all(word in text for word in words.split())
