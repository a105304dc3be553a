"""What a user should know of texts before training: lengths, what is cut, and which tokens are trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from rlinf_plugins_text.rows.tokenizer import TextTokenizer

OPEN, CLOSE = "⟦", "⟧"
"""What marks trained parts of a shown sample."""
SHOWN = 160
"""Tokens of a sample that are shown, around where training begins."""


class TextSample(TypedDict):
    """A sequence of one text, or of several in a pack."""

    tokens: NDArray[np.int32]
    """[T]"""
    trained: NDArray[np.bool_]
    """[T], whether predicting this token counts; never for the first of a text, before which there is nothing."""
    document_lengths: NDArray[np.int32]
    """[M], tokens of each text; their sum is T."""
    full_lengths: NDArray[np.int64]
    """[M], tokens of each text before it was cut or split."""
    left_out: str
    """Which texts of the split are in no sample, and why; empty: none."""


def describe(
    samples: Iterable[TextSample], tokenizer: TextTokenizer, *, max_length: int, overlong: str, packing: bool
) -> Mapping[str, str]:
    """The facts; see `PolicyConfig.describe`."""
    rows, tokens, trained = 0, 0, 0
    lengths: list[int] = []
    first: TextSample | None = None
    for sample in samples:
        first = first or sample
        rows += 1
        tokens += len(sample["tokens"])
        trained += int(sample["trained"].sum())
        lengths += sample["full_lengths"].tolist()
    if first is None:
        return {}
    over = sum(length > max_length for length in lengths)
    done = "longer ones are left out" if overlong == "drop" else f"{over} of them {overlong}"
    facts = {
        "texts": f"{len(lengths)} in {rows} samples from all over the training data, {np.mean(lengths):.0f} tokens on "
        f"average, the longest has {max(lengths)}; {done} at policy.max_length = {max_length}",
        "trained tokens": f"{trained / tokens:.0%} of {tokens} tokens count in the loss",
    }
    if first["left_out"]:
        facts["left out"] = first["left_out"]
    if packing:
        facts["packs"] = f"{len(lengths) / rows:.1f} texts a sample, {tokens / (rows * max_length):.1%} full"
    facts["a sample"] = f"{OPEN}trained{CLOSE}: {marked(first, tokenizer)}"
    return facts


def marked(sample: TextSample, tokenizer: TextTokenizer) -> str:
    """A sample's first text with its trained parts marked, on one line."""
    length = int(sample["document_lengths"][0])
    tokens, trained = sample["tokens"][:length], sample["trained"][:length]
    start = max(0, int(np.argmax(trained)) - SHOWN // 2)
    stop = min(length, start + SHOWN)
    edges = [start, *(np.flatnonzero(np.diff(trained[start:stop])) + start + 1).tolist(), stop]
    text = "… " * (start > 0)
    for begin, end in pairwise(edges):
        part = tokenizer.decode(tokens[begin:end].tolist())
        text += f"{OPEN}{part}{CLOSE}" if trained[begin] else part
    return (text + " …" * (stop < length)).replace("\n", "↵")
