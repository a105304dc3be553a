"""What `rlinf inspect` shows of a text sample: its tokens, with those marked that are trained. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rlinf_core.illustration import Grid, Illustration, Token, TokenText
from rlinf_plugins_text.rows.describe import TextSample
from rlinf_plugins_text.rows.tokenizer import TextTokenizer

TRAINED, READ = "trained", "only read"
"""Kinds of tokens."""
SHOWN_TEXTS = 3
"""Texts of a pack that are shown."""


def illustrate(sample: TextSample, tokenizer: TextTokenizer, max_length: int, *, cuts: bool) -> Illustration:
    """See `PolicyConfig.illustrate`; `cuts`: what a longer text has more is lost, not another sample."""
    return Illustration(texts=tuple(_texts(sample, tokenizer, cuts=cuts)), grids=(_grid(sample, max_length),))


def _texts(sample: TextSample, tokenizer: TextTokenizer, *, cuts: bool) -> Iterator[TokenText]:
    lengths = sample["document_lengths"].tolist()
    start = 0
    for number, length in enumerate(lengths[:SHOWN_TEXTS], start=1):
        ids = sample["tokens"][start : start + length].tolist()
        trained = sample["trained"][start : start + length].tolist()
        tokens = tuple(
            Token(id, _visible(tokenizer.decode([id])), TRAINED if counts else READ)
            for id, counts in zip(ids, trained, strict=True)
        )
        full = int(sample["full_lengths"][number - 1])
        note = f"{sum(trained)} tokens count in the loss."
        if full > length and not cuts:
            note += f" The text has {full} tokens; the others are in other samples."
        title = "Text" if len(lengths) == 1 else f"Text {number} of {len(lengths)} in this sample"
        yield TokenText(title, tokens, full - length if cuts else 0, note)
        start += length


def _grid(sample: TextSample, max_length: int) -> Grid:
    """The whole sample, and what of `max_length` it leaves empty."""
    values = np.full((1, max_length), 2)
    values[0, : len(sample["tokens"])] = np.where(sample["trained"], 0, 1)
    return Grid("Sample", values, (TRAINED, READ, "empty"), columns=f"policy.max_length = {max_length} tokens")


def _visible(piece: str) -> str:
    return piece.replace("\n", "↵").replace(" ", "␣") or "∅"
