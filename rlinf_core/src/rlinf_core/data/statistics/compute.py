"""Statistics of training rows: one pass over states and action chunks after the dataset's transforms.

Rows carry no images (contract 11). Where the source gives columns and every transform takes batches, thousands of rows
pass at once: a LIBERO-size table takes seconds. Otherwise rows pass one by one, with the same result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlinf_core.contract.datasets import ColumnSource, SampleSource
from rlinf_core.data.normalize import KEYS, NormStats, Vector
from rlinf_core.data.sample import Sample
from rlinf_core.data.transforms import Transform
from rlinf_core.errors import UserError

ROWS_AT_A_TIME = 4096
ROWS_WITH_IMAGES = 256  # Decoded, two cameras of 640 x 480 take half a gigabyte.


@dataclass(frozen=True, eq=False)
class Distribution:
    """How the numbers of `state` or of `actions` are distributed."""

    stats: NormStats
    running: RunningStats
    """Range and histogram."""
    episodes: NDArray[np.int64]
    """[E], the dataset's own numbers of the episodes looked at."""
    episode_low: NDArray[np.float64]
    """[E, D], the smallest number in each."""
    episode_high: NDArray[np.float64]
    rows: int
    """How many were looked at."""


def compute_norm_stats(
    source: SampleSource, transforms: Sequence[Transform], *, read_images: bool = False, rows: int | None = None
) -> dict[str, NormStats]:
    """Statistics of `state` and `actions` over all rows, after `transforms`; in float64. See `summarize`."""
    distributions = summarize(source, transforms, read_images=read_images, rows=rows)
    return {key: found.stats for key, found in distributions.items()}


def summarize(
    source: SampleSource, transforms: Sequence[Transform], *, read_images: bool = False, rows: int | None = None
) -> dict[str, Distribution]:
    """Look at all rows, after `transforms`, in float64.

    Args:
        source: Training rows; held-out episodes have no part in statistics.
        transforms: Everything before normalisation: repacking and the dataset's transforms.
        read_images: Decode images for transforms that look at them; slow.
        rows: Look at no more than about so many rows, evenly spread: enough to try the transforms, not to train.

    Raises:
        UserError: A transform looks at an image and `read_images` is not set, or it makes a number that is none.
    """
    looked_at = range(0, len(source), max(1, -(-len(source) // rows)) if rows else 1)
    batches = -(-len(looked_at) // (ROWS_WITH_IMAGES if read_images else ROWS_AT_A_TIME))
    episodes, episode_of_row = np.unique(source.episodes, return_inverse=True)
    running: dict[str, RunningStats] = {}
    extremes: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
    for start in range(batches):
        # Each batch is spread over all rows, so that the first has nearly the range of all: stretching blurs quantiles.
        indices = looked_at[start::batches]
        for key, values in outputs(source, transforms, indices, read_images=read_images).items():
            _check_finite(key, values, source, indices)
            if key not in running:
                running[key] = RunningStats()
                shape = len(episodes), values.shape[-1]
                extremes[key] = np.full(shape, np.inf), np.full(shape, -np.inf)
            running[key].update(values)
            steps = tuple(range(1, values.ndim - 1))
            np.minimum.at(extremes[key][0], episode_of_row[indices], values.min(axis=steps))
            np.maximum.at(extremes[key][1], episode_of_row[indices], values.max(axis=steps))
    seen = np.unique(episode_of_row[looked_at]) if batches else np.zeros(0, np.int64)
    return {
        key: Distribution(
            one.result(), one, episodes[seen], extremes[key][0][seen], extremes[key][1][seen], len(looked_at)
        )
        for key, one in running.items()
    }


def stats_fingerprint(
    source: SampleSource, transforms: Sequence[Transform], horizon: int, *, read_images: bool = False
) -> str:
    """A hash of what statistics are made of: the rows, what the transforms make of 64 of them, and the horizon."""
    rows = np.unique(np.linspace(0, len(source) - 1, 64).astype(np.int64))
    digest = hashlib.blake2b(f"{source.fingerprint()} {horizon}".encode(), digest_size=16)
    for key, values in outputs(source, transforms, rows.tolist(), read_images=read_images).items():
        digest.update(f"{key} {values.shape}".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def outputs(
    source: SampleSource, transforms: Sequence[Transform], indices: Sequence[int], *, read_images: bool = False
) -> dict[str, Vector]:
    """`state` [rows, D] and `actions` [rows, H, D] after the transforms, in float64."""
    if not read_images and isinstance(source, ColumnSource) and all(map(takes_batches, transforms)):
        batch: Any = apply(source.columns(indices), transforms, read_images=False)
        return {key: batch[key].astype(np.float64) for key in KEYS if key in batch}
    rows = source.__getitems__(indices) if read_images else source.without_images(indices)
    samples: list[Any] = [apply(row, transforms, read_images=read_images) for row in rows]
    return {key: np.stack([sample[key] for sample in samples]).astype(np.float64) for key in KEYS if key in samples[0]}


def takes_batches(transform: Transform) -> bool:
    """Whether the class that defines the transform's `__call__` says that it takes batches."""
    (owner, *_) = (base for base in type(transform).__mro__ if "__call__" in vars(base))
    return bool(vars(owner).get("batched", False))


def apply(row: Any, transforms: Sequence[Transform], *, read_images: bool) -> Sample:
    """What the transforms make of a row, or of columns; `read_images`: it has images."""
    sample = row
    for transform in transforms:
        try:
            sample = transform(sample)
        except KeyError as e:
            if read_images:
                raise
            raise UserError(
                f"{type(transform).__name__} asks for {e}, which a row without images does not have: statistics are "
                "computed without decoding any. If it needs an image, set data.stats_need_images = true"
            ) from e
    return sample  # type: ignore[no-any-return]


def _check_finite(key: str, values: Vector, source: SampleSource, indices: Sequence[int]) -> None:
    """Raise `UserError` naming the first row with a NaN or an infinite number, and how many there are."""
    finite = np.isfinite(values)
    if finite.all():
        return
    rows = np.flatnonzero(~finite.all(axis=tuple(range(1, values.ndim))))
    dimensions = np.flatnonzero(~finite.reshape(-1, values.shape[-1]).all(axis=0)).tolist()
    raise UserError(
        f"data-not-finite: {key} holds NaN or infinite numbers after the dataset's transforms, at {dimensions}, first "
        f"in {source.describe(indices[rows[0]])}: leave such episodes out with data.exclude_episodes, or correct them"
    )


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
