"""Summarize training rows: one pass over states and action chunks after the dataset's transforms.

Rows have no images (contract 11). If the source provides columns and every transform accepts batches, thousands of rows
are processed at once, and a table of LIBERO's size takes seconds; otherwise rows are processed one by one, with the
same result. `RunningStats`, at the end, accumulates mean, spread, range and histogram as openpi does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
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
ROWS_WITH_IMAGES = 256  # Half a gigabyte decoded, with two cameras of 640 x 480.


@dataclass(frozen=True, eq=False)
class Distribution:
    """The distribution of the numbers of `state` or `actions`."""

    stats: NormStats
    running: RunningStats
    """Range and histogram of each dimension."""
    episodes: NDArray[np.int64]
    """[E], the dataset's numbers of the episodes with rows in the pass."""
    episode_low: NDArray[np.float64]
    """[E, D], the minimum over each episode."""
    episode_high: NDArray[np.float64]
    """[E, D], the maximum over each episode."""
    rows: int
    """Number of rows in the pass."""
    names: tuple[str, ...] = ()
    """What the dataset calls each dimension, empty for those without a name; no names at all: see `name_dimensions`."""


def compute_norm_stats(
    source: SampleSource, transforms: Sequence[Transform], *, read_images: bool = False, rows: int | None = None
) -> dict[str, NormStats]:
    """Statistics of `state` and `actions` over all rows, after `transforms`, in float64; see `summarize`."""
    distributions = summarize(source, transforms, read_images=read_images, rows=rows)
    return {key: found.stats for key, found in distributions.items()}


def summarize(
    source: SampleSource,
    transforms: Sequence[Transform],
    *,
    read_images: bool = False,
    rows: int | None = None,
    progress: Callable[[int, int], object] = lambda done, all: None,
) -> dict[str, Distribution]:
    """The distributions of `state` and `actions` over all rows, after `transforms`, in float64.

    Args:
        source: Training rows; held-out episodes are not part of statistics.
        transforms: All transforms before normalisation: repacking and the dataset's own.
        read_images: Decode images for transforms that need them; slow.
        rows: Use at most about this many rows, evenly spread; enough for diagnosis, not for training.
        progress: Called with the number of finished rows, and of all.

    Raises:
        UserError: A transform needs an image and `read_images` is not set, or it produces NaN or infinity.
    """
    used = range(0, len(source), max(1, -(-len(source) // rows)) if rows else 1)
    batches = -(-len(used) // (ROWS_WITH_IMAGES if read_images else ROWS_AT_A_TIME))
    episodes, episode_of_row = np.unique(source.episodes, return_inverse=True)
    running: dict[str, RunningStats] = {}
    extremes: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
    done = 0
    for start in range(batches):
        # Each batch is spread over all rows, so the first has nearly the full range: stretching blurs quantiles.
        indices = used[start::batches]
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
        done += len(indices)
        progress(done, len(used))
    seen = np.unique(episode_of_row[used]) if batches else np.zeros(0, np.int64)
    return {
        key: Distribution(one.result(), one, episodes[seen], extremes[key][0][seen], extremes[key][1][seen], len(used))
        for key, one in running.items()
    }


def stats_fingerprint(
    source: SampleSource, transforms: Sequence[Transform], horizon: int, *, read_images: bool = False
) -> str:
    """A hash of everything that statistics depend on: the rows, 64 of them transformed, and the horizon."""
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
    """Whether the class that defines the transform's `__call__` declares `batched`."""
    (owner, *_) = (base for base in type(transform).__mro__ if "__call__" in vars(base))
    return bool(vars(owner).get("batched", False))


def apply(row: Any, transforms: Sequence[Transform], *, read_images: bool) -> Sample:
    """Apply the transforms to a row or to columns; `read_images`: it has images."""
    sample = row
    for transform in transforms:
        try:
            sample = transform(sample)
        except KeyError as e:
            if read_images:
                raise
            raise UserError(
                f"{type(transform).__name__} needs {e}, which rows for statistics do not have: they are read without "
                "images. If the transform needs an image, set data.stats_need_images = true"
            ) from e
    return sample  # type: ignore[no-any-return]


def _check_finite(key: str, values: Vector, source: SampleSource, indices: Sequence[int]) -> None:
    """Raise `UserError` with the first row that contains NaN or infinity, and the affected dimensions."""
    finite = np.isfinite(values)
    if finite.all():
        return
    rows = np.flatnonzero(~finite.all(axis=tuple(range(1, values.ndim))))
    dimensions = np.flatnonzero(~finite.reshape(-1, values.shape[-1]).all(axis=0)).tolist()
    raise UserError(
        f"data-not-finite: {key} contains NaN or infinity after the dataset's transforms, in dimensions {dimensions}, "
        f"first in {source.describe(indices[rows[0]])}: leave such episodes out with data.exclude_episodes, or fix them"
    )


BINS = 5000
VALUES_AT_A_TIME = 2**15  # Small enough for a core's cache.


class RunningStats:
    """Running mean, standard deviation and quantiles over batches, as openpi computes them.

    Quantiles come from a histogram of each dimension, whose edges stretch when a batch exceeds the range. Stretching
    moves a bin's count to the new bin that contains the old left edge. As in openpi, a left edge outside the new range
    loses its count (the first bin if the minimum stays, because the first edges are 1e-10 outside the range).
    """

    low: Vector
    """[D], the minimum so far."""
    high: Vector
    """[D], the maximum so far."""
    edges: Vector
    """[D, BINS + 1], the histogram's edges."""
    counts: NDArray[np.float64]
    """[D, BINS], the histogram's counts."""

    def __init__(self) -> None:
        self._count = 0
        self._mean: Any = 0.0
        self._mean_square: Any = 0.0

    def update(self, batch: Vector) -> None:
        """Add a batch [..., D]; mean and spread are computed in its dtype."""
        columns = np.ascontiguousarray(batch.reshape(-1, batch.shape[-1]).T)
        # In float64, because 1e-10 is lost in float32.
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
    """`np.histogram(values, edges)[0]` for evenly spaced edges that enclose all values.

    Args:
        values: [N].
        edges: [bins + 1], from `np.linspace`; they may coincide.

    Returns:
        [bins] counts.
    """
    bins = len(edges) - 1
    first, last = edges[0], edges[-1]
    # If bins are hardly wider than the float spacing, the arithmetic below may be off by more than one bin.
    if (last - first) / bins <= 64 * np.spacing(max(abs(first), abs(last))):
        place = np.searchsorted(edges, values, side="right") - 1
        return np.bincount(np.minimum(place, bins - 1), minlength=bins)
    upper = np.append(edges[1:-1], np.inf)  # The last bin includes its upper edge.
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
