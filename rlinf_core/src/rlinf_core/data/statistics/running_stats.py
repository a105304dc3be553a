"""Mean, spread and quantiles of numbers that come in batches, as the reference computes them.

The quirks of its histogram are kept, because its files are what policies were trained on: tests/golden/README.md,
section 4. Bins are found by arithmetic and corrected against the edges, which gives `np.histogram`'s counts to the last
one, ten times faster.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlinf_core.data.normalize import NormStats, Vector

BINS = 5000
VALUES_AT_A_TIME = 2**15  # Their bins and edges stay in a core's cache.


class RunningStats:
    """Mean, spread and quantiles of batches that come one at a time.

    Quantiles come from a histogram of each number, whose edges stretch when a batch exceeds the range. Stretching
    moves a bin's count to the new bin that holds the old left edge. A left edge outside the new range loses its count
    (the first bin when the minimum stays, as the first edges lie 1e-10 outside): the reference does so.
    """

    low: Vector
    """[D], the smallest so far."""
    high: Vector
    edges: Vector
    """[D, BINS + 1]."""
    counts: NDArray[np.float64]
    """[D, BINS], values in each bin."""

    def __init__(self) -> None:
        self._count = 0
        self._mean: Any = 0.0
        self._mean_square: Any = 0.0

    def update(self, batch: Vector) -> None:
        """Take in a batch [..., D]; its dtype is that of mean and spread."""
        columns = np.ascontiguousarray(batch.reshape(-1, batch.shape[-1]).T)
        # In float64, as 1e-10 vanishes beside float32 numbers.
        low, high = columns.min(axis=1).astype(np.float64), columns.max(axis=1).astype(np.float64)
        if not self._count:
            self.low, self.high = low, high
            self.edges = np.linspace(low - 1e-10, high + 1e-10, BINS + 1, axis=1)
            self.counts = np.zeros((len(columns), BINS))
        elif np.any(low < self.low) or np.any(high > self.high):
            self.low, self.high = np.minimum(low, self.low), np.maximum(high, self.high)
            self._stretch()
        vectors = columns.shape[1]
        self._count += vectors
        share = vectors / self._count
        self._mean = self._mean + (columns.mean(axis=1) - self._mean) * share
        self._mean_square = self._mean_square + (np.square(columns).mean(axis=1) - self._mean_square) * share
        for column, edges, counts in zip(columns, self.edges, self.counts, strict=True):
            counts += count_in_bins(column, edges)

    def _stretch(self) -> None:
        old = self.edges
        self.edges = np.linspace(self.low, self.high, BINS + 1, axis=1)
        moved = zip(old, self.edges, self.counts, strict=True)
        self.counts = np.stack([np.histogram(o[:-1], bins=e, weights=h)[0] for o, e, h in moved])

    def result(self) -> NormStats:
        """The statistics so far; raises `ValueError` before the second vector."""
        if self._count < 2:
            raise ValueError("statistics need at least two vectors")
        std = np.sqrt(np.maximum(0, self._mean_square - np.square(self._mean)))
        return NormStats(mean=self._mean, std=std, q01=self._quantile(0.01), q99=self._quantile(0.99))

    def _quantile(self, q: float) -> Vector:
        cumulated = np.cumsum(self.counts, axis=1)
        first = [int(np.searchsorted(counts, q * self._count)) for counts in cumulated]
        return self.edges[np.arange(len(first)), first]


def count_in_bins(values: Vector, edges: Vector) -> NDArray[np.int64]:
    """`np.histogram(values, edges)[0]` for evenly spaced edges between which all values lie.

    Args:
        values: [N].
        edges: [bins + 1], as `np.linspace` makes them; they may coincide.

    Returns:
        [bins] counts.
    """
    bins = len(edges) - 1
    first, last = edges[0], edges[-1]
    # Where edges are not much further apart than numbers are, arithmetic may miss by more than one bin.
    if (last - first) / bins <= 64 * np.spacing(max(abs(first), abs(last))):
        place = np.searchsorted(edges, values, side="right") - 1
        return np.bincount(np.minimum(place, bins - 1), minlength=bins)
    upper = np.append(edges[1:-1], np.inf)  # The last bin holds its upper edge.
    scale = bins / (last - first)
    counts = np.zeros(bins, np.int64)
    for start in range(0, len(values), VALUES_AT_A_TIME):
        part = values[start : start + VALUES_AT_A_TIME].astype(np.float64, copy=False)
        place = ((part - first) * scale).astype(np.intp)
        np.minimum(place, bins - 1, out=place)
        place -= part < edges[place]
        place += part >= upper[place]
        counts += np.bincount(place, minlength=bins)
    return counts
