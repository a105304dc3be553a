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
from rlinf_core.data.statistics.running_stats import RunningStats
from rlinf_core.data.transforms import Transform
from rlinf_core.errors import UserError

ROWS_AT_A_TIME = 4096
ROWS_WITH_IMAGES = 256  # Decoded, two cameras of 640 x 480 take half a gigabyte.


@dataclass(frozen=True, eq=False)
class Survey:
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
    """Statistics of `state` and `actions` over all rows, after `transforms`; in float64. See `survey`."""
    surveyed = survey(source, transforms, read_images=read_images, rows=rows)
    return {key: found.stats for key, found in surveyed.items()}


def survey(
    source: SampleSource, transforms: Sequence[Transform], *, read_images: bool = False, rows: int | None = None
) -> dict[str, Survey]:
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
        key: Survey(one.result(), one, episodes[seen], extremes[key][0][seen], extremes[key][1][seen], len(looked_at))
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
