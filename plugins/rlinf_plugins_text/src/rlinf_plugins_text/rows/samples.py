"""A sample of tokens, and how samples are shown to people.

`describe` prints lengths, cuts and trained tokens before a run starts; `illustrate` is for the page of `rlinf inspect`.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from typing import NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

from rlinf_core.illustration import Grid, Illustration, Token, TokenText
from rlinf_plugins_text.rows.tokenizer import TextTokenizer

OPEN, CLOSE = "⟦", "⟧"
"""Marks around the trained parts of a shown sample."""
SHOWN = 160
"""Tokens shown of a sample, around the first trained one."""
TRAINED, READ = "trained", "only read"
"""Kinds of tokens on the page."""
REPEATED = 4
"""A token is shown once if it is there so many times in a row."""
SHOWN_TEXTS = 3
"""Maximum number of texts shown of a pack."""


class TextSample(TypedDict):
    """A sequence of one text, or of several in a pack. Axes: T tokens, M texts, I images."""

    tokens: NDArray[np.int32]
    """[T]"""
    trained: NDArray[np.bool_]
    """[T], whether the prediction of this token counts; never for the first of a text, which nothing predicts."""
    document_lengths: NDArray[np.int32]
    """[M], tokens in each text; they sum to T."""
    full_lengths: NDArray[np.int64]
    """[M], tokens in each text before it was cut or split."""
    left_out: str
    """How many texts of the split are in no sample, their share, and why; empty: none are left out."""
    image_documents: NotRequired[NDArray[np.int32]]
    """[I], the text of each image, in the order of the tokens; missing in a dataset without images."""
    images: NotRequired[dict[str, NDArray[np.uint8]]]
    """`image 1`, ... -> uint8 [height, width, 3], RGB; missing in rows that are read without images."""


def describe(
    samples: Iterable[TextSample], tokenizer: TextTokenizer, *, max_length: int, overlong: str, packing: bool
) -> Mapping[str, str]:
    """Facts about the samples; see `PolicyConfig.describe`."""
    rows, tokens, trained = 0, 0, 0
    lengths: list[int] = []
    first: TextSample | None = None
    images = 0
    for sample in samples:
        images += len(sample.get("image_documents", ()))
        first = first or sample
        rows += 1
        tokens += len(sample["tokens"])
        trained += int(sample["trained"].sum())
        lengths += sample["full_lengths"].tolist()
    if first is None:
        return {}
    over = sum(length > max_length for length in lengths)
    limit = f"policy.max_length = {max_length}"
    done = f"texts above {limit} are dropped" if overlong == "drop" else f"{over} of them {overlong} at {limit}"
    facts = {
        "texts": f"{len(lengths)} in {rows} samples spread over the training data, {np.mean(lengths):.0f} tokens on "
        f"average, {max(lengths)} in the longest; {done}",
        "trained tokens": f"{trained / tokens:.0%} of {tokens} tokens count in the loss",
    }
    if first["left_out"]:
        facts["left out"] = f"warning: {first['left_out']}"
    if packing:
        facts["packs"] = f"{len(lengths) / rows:.1f} texts per sample, {tokens / (rows * max_length):.1%} full"
    if "image_documents" in first:
        facts["images"] = f"{images} in these samples"
    facts["a sample"] = f"{OPEN}trained{CLOSE}: {marked(first, tokenizer)}"
    return facts


def marked(sample: TextSample, tokenizer: TextTokenizer) -> str:
    """The first text of a sample on one line, with its trained parts marked."""
    length = int(sample["document_lengths"][0])
    tokens, trained = sample["tokens"][:length], sample["trained"][:length]
    start = max(0, int(np.argmax(trained)) - SHOWN // 2)
    stop = min(length, start + SHOWN)
    edges = [start, *(np.flatnonzero(np.diff(trained[start:stop])) + start + 1).tolist(), stop]
    text = "… " * (start > 0)
    for begin, end in pairwise(edges):
        part = _text(tokens[begin:end].tolist(), tokenizer)
        text += f"{OPEN}{part}{CLOSE}" if trained[begin] else part
    return (text + " …" * (stop < length)).replace("\n", "↵")


def _text(ids: Sequence[int], tokenizer: TextTokenizer) -> str:
    """The text of tokens, those of an image written once with their number."""
    text, plain = "", list[int]()
    for id, _, count in _runs(ids, [False] * len(ids)):
        plain += [id] * (count == 1)
        if count > 1:
            text += f"{tokenizer.decode(plain)}{tokenizer.decode([id])} x{count} "
            plain = []
    return text + tokenizer.decode(plain)


def illustrate(sample: TextSample, tokenizer: TextTokenizer, max_length: int, *, cuts: bool) -> Illustration:
    """The tokens of a sample, with the trained ones marked; see `PolicyConfig.illustrate`.

    Args:
        sample: What to show.
        tokenizer: Turns tokens back into text.
        max_length: Maximum number of tokens in a sample.
        cuts: Whether the tokens that a text has beyond `max_length` are lost, instead of being in other samples.
    """
    return Illustration(texts=tuple(_texts(sample, tokenizer, cuts=cuts)), grids=(_grid(sample, max_length),))


def _texts(sample: TextSample, tokenizer: TextTokenizer, *, cuts: bool) -> Iterator[TokenText]:
    lengths = sample["document_lengths"].tolist()
    start = 0
    for number, length in enumerate(lengths[:SHOWN_TEXTS], start=1):
        ids = sample["tokens"][start : start + length].tolist()
        trained = sample["trained"][start : start + length].tolist()
        tokens = tuple(
            Token(id, _visible(tokenizer.decode([id])) + f" x{count}" * (count > 1), TRAINED if counts else READ)
            for id, counts, count in _runs(ids, trained)
        )
        full = int(sample["full_lengths"][number - 1])
        note = f"{sum(trained)} tokens count in the loss."
        if full > length and not cuts:
            note += f" The text has {full} tokens; the rest are in other samples."
        title = "Text" if len(lengths) == 1 else f"Text {number} of {len(lengths)} in this sample"
        yield TokenText(title, tokens, full - length if cuts else 0, note)
        start += length


def _runs(ids: Sequence[int], trained: Sequence[bool]) -> Iterator[tuple[int, bool, int]]:
    """Tokens with how often they follow one another where that is often, as the tokens of an image do."""
    for (id, counts), run in groupby(zip(ids, trained, strict=True)):
        number = len(list(run))
        yield from [(id, counts, number)] if number >= REPEATED else [(id, counts, 1)] * number


def _grid(sample: TextSample, max_length: int) -> Grid:
    """The whole sample, and the part of `max_length` that stays empty."""
    values = np.full((1, max_length), 2)
    values[0, : len(sample["tokens"])] = np.where(sample["trained"], 0, 1)
    return Grid("Sample", values, (TRAINED, READ, "empty"), columns=f"policy.max_length = {max_length} tokens")


def _visible(piece: str) -> str:
    return piece.replace("\n", "↵").replace(" ", "␣") or "∅"
