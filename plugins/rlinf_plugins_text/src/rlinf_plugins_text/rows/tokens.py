"""From texts to tokens: which of them are trained, and how texts and turns begin and end. Imports no torch.

A model stops where it has learned to write a token that its reader stops at. So each of the assistant's turns has to
end in a control token that is trained. Most templates write one. Where the first token of the next turn ends a turn
(GLM), or the marks of a template leave the end out, that token is trained, too. A chat that ends without one gets the
end-of-text token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlinf_core import UserError
from rlinf_plugins_text.rows.confined import LimitError
from rlinf_plugins_text.rows.formats import Example
from rlinf_plugins_text.rows.tokenizer import TextTokenizer
from rlinf_plugins_text.rows.turns import CONTROL, REASONING

QUESTION: dict[str, Any] = {"role": "user", "content": "a"}
ANSWER: dict[str, Any] = {"role": "assistant", "content": "b"}
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "f", "arguments": {"x": "y"}}}
CALLING: list[dict[str, Any]] = [
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "c", "name": "f", "tool_call_id": "abcdefghi"},
]
CHATS: Sequence[Sequence[dict[str, Any]]] = (
    [QUESTION, ANSWER],
    [QUESTION, ANSWER] * 2,
    [QUESTION, *CALLING, ANSWER],
    *([QUESTION, {**ANSWER, key: "d"}] for key in REASONING[:-1]),
)
"""Small chats that show how a template ends turns."""


@dataclass(frozen=True)
class Tokens:
    """A text as tokens."""

    ids: NDArray[np.int32]
    """[T]"""
    trained: NDArray[np.bool_]
    """[T], whether each token is trained."""
    ends: tuple[int | None, ...] = ()
    """The control token that ends each of the assistant's trained turns; None: none does."""
    given: tuple[str, ...] = ()
    """Tokens that the text already had at its beginning or end, so that they were not added."""
    doubled: tuple[str, ...] = ()
    """Tokens that begin or end texts and stand twice in a row."""
    added: int = 0
    """Number of tokens put before the text."""
    images: tuple[tuple[int, int], ...] = ()
    """For each image, the index of its first token and of the one after the last."""


def tokenize(examples: list[Example], tokenizer: TextTokenizer) -> Iterator[Tokens]:
    """The tokens of each example.

    A token is trained if it begins in a trained part. A prompt is tokenized by itself where that gives other tokens
    than tokenizing it together with its completion, because it will stand alone when the model is used.
    """
    whole = tokenizer.encode([one.text for one in examples])
    prompts = tokenizer.encode([one.text[: one.prompt] for one in examples])
    before = [one.ids for one in prompts]
    apart = [
        i
        for i, one in enumerate(examples)
        if one.prompt and (one.prefix or whole[i].ids[: len(before[i])] != before[i])
    ]
    completions = dict(
        zip(apart, tokenizer.encode([examples[i].text[examples[i].prompt :] for i in apart]), strict=True)
    )
    for number, example in enumerate(examples):
        pieces = [(whole[number], 0)]
        if number in completions:
            pieces = [(prompts[number], 0), (completions[number], example.prompt)]
        ids = [token for piece, _ in pieces for token in piece.ids]
        begins = np.array([start + shift for piece, shift in pieces for start in piece.begins], np.int64)
        mask: NDArray[np.bool_] = np.zeros(len(ids), np.bool_)
        for first, last in example.trained:
            mask |= (begins >= first) & (begins < last)
        images = [tuple(np.searchsorted(begins, span).tolist()) for span in example.image_spans]
        for first, last in images:
            mask[first:last] = False
        finish = _complete if example.whole else _close_turns
        done = finish(example, ids, begins, mask, tokenizer)
        placed = tuple((first + done.added, last + done.added) for first, last in images)
        yield replace(_with_doubled(done, tokenizer), images=placed)


def _complete(
    example: Example, ids: list[int], begins: NDArray[np.int64], mask: NDArray[np.bool_], tokenizer: TextTokenizer
) -> Tokens:
    """Add the tokens that begin and end a text, unless it was written with them."""
    start, end, given = [] if example.prefix else list(tokenizer.start), tokenizer.end, []
    if start and ids[: len(start)] == start:
        given.append(tokenizer.decode(start))
        start = []
    words = [i for i, begin in enumerate(begins) if not example.text[begin:].isspace()]
    if words and ids[words[-1]] == end:
        given.append(tokenizer.decode([end]))
    else:
        ids, mask = [*ids, end], np.append(mask, True)
    ids, mask = [*start, *ids], np.pad(mask, (len(start), 0))
    return Tokens(np.array(ids, np.int32), mask, given=tuple(given), added=len(start))


def _close_turns(
    example: Example, ids: list[int], begins: NDArray[np.int64], mask: NDArray[np.bool_], tokenizer: TextTokenizer
) -> Tokens:
    """Train the token that ends each turn."""
    text = example.text
    ends: list[int | None] = []
    for first, last in example.turns:
        stop = first + len(text[first:last].rstrip())
        inside = np.flatnonzero((begins >= first) & (begins < stop))
        if not len(inside):
            continue
        here = int(inside[-1])
        if ids[here] in tokenizer.control:
            ends.append(ids[here])
            continue
        words = stop + len(text[stop:]) - len(text[stop:].lstrip())
        # A control token may contain the white space before it.
        after = [i for i in np.flatnonzero((begins >= stop) & (begins <= words)) if ids[i] in tokenizer.control]
        if after:
            mask[here : after[0] + 1] = True
            ends.append(ids[after[0]])
        elif words == len(text) and (end := tokenizer.id_of("eos_token")) is not None:
            mask[here:] = True
            ids, mask = [*ids, end], np.append(mask, True)
            ends.append(end)
        else:
            ends.append(None)
    return Tokens(np.array(ids, np.int32), mask, tuple(ends))


def _with_doubled(tokens: Tokens, tokenizer: TextTokenizer) -> Tokens:
    named = (tokenizer.id_of("bos_token"), tokenizer.id_of("eos_token"), *tokens.ends)
    edges = [one for one in named if one is not None]
    ids = tokens.ids
    twice = np.unique(ids[1:][(ids[1:] == ids[:-1]) & np.isin(ids[1:], edges)]).tolist()
    return replace(tokens, doubled=tuple(tokenizer.decode([one]) for one in twice)) if twice else tokens


class Ends(NamedTuple):
    """How a chat template ends the assistant's turns."""

    stops: tuple[int, ...] = ()
    """The tokens that end turns and are nowhere else in them."""
    inner: tuple[int, ...] = ()
    """Tokens that end turns, but are also in the middle of some, so that a model must not stop at them."""


def turn_ends(tokenizer: TextTokenizer) -> Ends:
    """How the chat template ends the assistant's turns, seen in small chats; empty without a template.

    A template that cannot render tools or thoughts, or refuses such chats for another reason, shows its other turns.
    """
    if not tokenizer.template_source:
        return Ends()
    ends: dict[int, None] = {}
    inside: set[int] = set()
    for messages in CHATS:
        try:
            chat = tokenizer.chat.read(messages)
        except LimitError:
            raise
        except UserError:
            continue
        (tokens,) = tokenize([Example(chat.text, tuple(chat.spans), whole=False, turns=tuple(chat.spans))], tokenizer)
        ends |= dict.fromkeys(end for end in tokens.ends if end is not None)
        edges = np.flatnonzero(np.diff(tokens.trained, prepend=False, append=False))
        for turn in np.split(tokens.ids, edges)[1::2]:
            inside |= _control_inside(turn.tolist(), tokenizer)
    return Ends(*(tuple(end for end in ends if (end in inside) == inner) for inner in (False, True)))


def _control_inside(turn: list[int], tokenizer: TextTokenizer) -> set[int]:
    """The control tokens in a turn that words follow."""
    words = [i for i, one in enumerate(turn) if one not in tokenizer.control and tokenizer.decode([one]).strip()]
    return {one for one in turn[: words[-1] if words else 0] if one in tokenizer.control}


def control_pieces(text: str, tokenizer: TextTokenizer) -> dict[str, int]:
    """The control tokens in a rendered chat that this tokenizer does not have: each with its number of pieces."""
    found = sorted(set(CONTROL.findall(text)))
    sizes = [len(encoding.ids) for encoding in tokenizer.encode(found)]
    return {token: size for token, size in zip(found, sizes, strict=True) if size != 1}
