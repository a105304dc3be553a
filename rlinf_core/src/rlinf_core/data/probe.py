"""A look at the training data before a run: samples of rows from all over it, without images. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from rlinf_core.data.pipeline import Pipeline
from rlinf_core.data.sample import Sample
from rlinf_core.datasets import SampleSource
from rlinf_core.errors import UserError

PROBED_ROWS = 4096
"""Rows that are looked at, at most: a few seconds."""


def probe(source: SampleSource, pipeline: Pipeline, most: int = PROBED_ROWS) -> Iterator[Sample]:
    """Samples from all over a split, made as they are asked for: see `spread_rows` for which, `encode` for how."""
    yield from encode_without_images(source, pipeline, spread_rows(source.episodes, most).tolist())


def spread_rows(episodes: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Up to `most` rows: the first of every episode (what changes between episodes is seen whole), then evenly spread.

    Args:
        episodes: [N], the episode of each row.
        most: If there are more episodes, they are spread evenly themselves.
    """
    if len(episodes) <= most:
        return np.arange(len(episodes))
    first = np.flatnonzero(np.diff(episodes, prepend=episodes[0] - 1))
    first = first[np.linspace(0, len(first) - 1, min(most, len(first))).astype(np.int64)]
    spread = np.linspace(0, len(episodes) - 1, most - len(first)).astype(np.int64)
    return np.union1d(first, spread)


def encode_without_images(
    source: SampleSource, pipeline: Pipeline, rows: Sequence[int], at_once: int = 256
) -> Iterator[Sample]:
    """Encode rows without their images; an error names the row it comes from."""
    for start in range(0, len(rows), at_once):
        indices = rows[start : start + at_once]
        for index, row in zip(indices, source.without_images(indices), strict=True):
            try:
                yield pipeline.encode(row)
            except UserError as error:
                raise UserError(f"{error} [{source.describe(index)}]") from error
