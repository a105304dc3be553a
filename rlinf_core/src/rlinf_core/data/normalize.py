"""Normalisation of states and actions, and the statistics it needs.

Statistics are those of the training rows after the dataset's transforms, over every step of every action chunk. Files
are openpi's `norm_stats.json`; formulas and the histogram's quirks follow tests/golden/README.md, sections 2 and 4.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from rlinf_core.data.sample import Row, Sample
from rlinf_core.data.transforms import Transform
from rlinf_core.errors import UserError
from rlinf_core.files import write_text

if TYPE_CHECKING:
    from rlinf_core.datasets import SampleSource

KEYS = ("state", "actions")
EPSILON = 1e-6  # openpi's, added to the spread.
BINS = 5000
ROWS_AT_A_TIME = 4096
ROWS_WITH_IMAGES = 256  # Decoded, two cameras of 640 x 480 take half a gigabyte.
Mode = Literal["mean_std", "quantile"]
Vector = NDArray[np.floating]
Stats = Mapping[str, "NormStats"]
"""`state` and `actions` -> their statistics."""


@dataclass(frozen=True, eq=False)
class NormStats:
    """Statistics of each number of a vector; all [D], in the data's units after the dataset's transforms."""

    mean: Vector
    std: Vector
    """Of the population."""
    q01: Vector
    """1 % of the values lie below (to within 1/5000 of the range)."""
    q99: Vector


@dataclass(frozen=True, eq=False)
class Normalize(Transform):
    """Bring `state` and `actions` to unit spread, or to [-1, 1] between the quantiles. The arithmetic is the
    statistics' float64.

    The inverse accepts vectors wider than the statistics, as policies pad what they see: padding passes as it is
    (quantile), or as a number of mean 0 and spread 1 (mean_std).
    """

    stats: Stats
    mode: Mode

    def __post_init__(self) -> None:
        if self.mode == "quantile" and any(np.isnan([s.q01, s.q99]).any() for s in self.stats.values()):
            raise UserError("the statistics hold no quantiles, which this policy needs: leave data.norm_stats empty")

    def __call__(self, sample: Sample) -> Sample:
        """Normalise; raises `UserError` if the statistics have fewer numbers than the data."""
        return self._changed(sample, self._normalize)

    def inverse(self, sample: Sample) -> Sample:
        """Back to the data's units, also for the state."""
        return self._changed(sample, self._restore)

    def _changed(self, sample: Sample, change: Callable[[str, Vector], Vector]) -> Sample:
        out: Any = dict(sample)
        out.update({key: change(key, out[key]) for key in KEYS if key in out})
        return out  # type: ignore[no-any-return]

    def _normalize(self, key: str, x: Vector) -> Vector:
        if key not in self.stats:
            raise UserError(f"the statistics lack {key!r}: leave data.norm_stats empty to compute them")
        width, stats = x.shape[-1], self.stats[key]
        if len(stats.mean) < width:
            raise UserError(
                f"the statistics of {key!r} have {len(stats.mean)} numbers, the data have {width}: they belong to "
                "another dataset or other transforms; leave data.norm_stats empty to compute them"
            )
        if self.mode == "mean_std":
            return (x - stats.mean[:width]) / (stats.std[:width] + EPSILON)
        low, high = stats.q01[:width], stats.q99[:width]
        return (x - low) / (high - low + EPSILON) * 2.0 - 1.0

    def _restore(self, key: str, x: Vector) -> Vector:
        stats = self.stats[key]
        width = min(x.shape[-1], len(stats.mean))
        padding: Vector = x[..., width:]
        if self.mode == "mean_std":
            known = x[..., :width] * (stats.std[:width] + EPSILON) + stats.mean[:width]
            padding = padding * np.float64(1.0 + EPSILON)
        else:
            low, high = stats.q01[:width], stats.q99[:width]
            known = (x[..., :width] + 1.0) / 2.0 * (high - low + EPSILON) + low
        return np.concatenate([known, padding], axis=-1)


class RunningStats:
    """Mean, spread and quantiles of batches that come one at a time.

    Quantiles come from a histogram of each number, whose edges stretch when a batch exceeds the range. Stretching
    moves a bin's count to the new bin that holds the old left edge. A left edge outside the new range loses its count
    (the first bin when the minimum stays, as the first edges lie 1e-10 outside): the reference does so, and its files
    are what policies were trained on.
    """

    def __init__(self) -> None:
        self._count = 0
        self._mean: Any = 0.0
        self._mean_square: Any = 0.0

    def update(self, batch: Vector) -> None:
        """Take in a batch [..., D]; its dtype is that of mean and spread."""
        batch = batch.reshape(-1, batch.shape[-1])
        # In float64, as 1e-10 vanishes beside float32 numbers.
        low, high = batch.min(axis=0).astype(np.float64), batch.max(axis=0).astype(np.float64)
        if not self._count:
            self._low, self._high = low, high
            self._edges = np.linspace(low - 1e-10, high + 1e-10, BINS + 1, axis=1)
            self._histogram = np.zeros((batch.shape[1], BINS))
        elif np.any(low < self._low) or np.any(high > self._high):
            self._low, self._high = np.minimum(low, self._low), np.maximum(high, self._high)
            self._stretch()
        self._count += len(batch)
        share = len(batch) / self._count
        self._mean = self._mean + (batch.mean(axis=0) - self._mean) * share
        self._mean_square = self._mean_square + (np.square(batch).mean(axis=0) - self._mean_square) * share
        for column, edges, histogram in zip(batch.T, self._edges, self._histogram, strict=True):
            histogram += np.histogram(column, bins=edges)[0]

    def _stretch(self) -> None:
        old = self._edges
        self._edges = np.linspace(self._low, self._high, BINS + 1, axis=1)
        moved = zip(old, self._edges, self._histogram, strict=True)
        self._histogram = np.stack([np.histogram(o[:-1], bins=e, weights=h)[0] for o, e, h in moved])

    def result(self) -> NormStats:
        """The statistics so far; raises `ValueError` before the second vector."""
        if self._count < 2:
            raise ValueError("statistics need at least two vectors")
        std = np.sqrt(np.maximum(0, self._mean_square - np.square(self._mean)))
        return NormStats(mean=self._mean, std=std, q01=self._quantile(0.01), q99=self._quantile(0.99))

    def _quantile(self, q: float) -> Vector:
        cumulated = np.cumsum(self._histogram, axis=1)
        first = [int(np.searchsorted(counts, q * self._count)) for counts in cumulated]
        return self._edges[np.arange(len(first)), first]


def load_norm_stats(path: Path) -> dict[str, NormStats]:
    """Read a `norm_stats.json` in openpi's layout; `UserError` if it is missing or something else."""
    return _load(path)[0]


def save_norm_stats(path: Path, stats: Stats, fingerprint: str = "") -> None:
    """Write a `norm_stats.json` in openpi's layout; `fingerprint` says what it was made of (openpi ignores it)."""
    tables = {key: {name: value.tolist() for name, value in vars(value).items()} for key, value in stats.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    made_of = {"fingerprint": fingerprint} if fingerprint else {}
    write_text(path, json.dumps({"norm_stats": tables} | made_of, indent=2))


def _load(path: Path) -> tuple[dict[str, NormStats], str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        tables = content["norm_stats"]
        stats = {key: _parse(tables[key]) for key in KEYS if key in tables}
    except OSError as e:
        raise UserError(
            f"the statistics {path} cannot be read: {e.strerror}. Correct data.norm_stats, or leave it empty"
        ) from e
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"{path} is not a norm_stats.json ({type(e).__name__}: {e}); expected "
            '{"norm_stats": {"state": {"mean": […], "std": […], "q01": […], "q99": […]}, "actions": {…}}}'
        ) from e
    return stats, content.get("fingerprint", "")


def _parse(table: dict[str, Any]) -> NormStats:
    """Files without quantiles serve mean_std; a quantile of theirs is NaN and is refused when it is used."""
    mean = np.asarray(table["mean"], np.float64)
    values = {
        name: np.asarray(table[name], np.float64) for name in ("std", "q01", "q99") if table.get(name) is not None
    }
    absent = np.full_like(mean, np.nan)
    stats = NormStats(mean, values["std"], values.get("q01", absent), values.get("q99", absent))
    shapes = {value.shape for value in vars(stats).values()}
    if len(shapes) != 1 or mean.ndim != 1:
        raise ValueError(f"mean, std, q01 and q99 must be equally long lists, not of shapes {sorted(shapes)}")
    return stats


def prepare_norm_stats(
    path: Path,
    source: SampleSource,
    transforms: Sequence[Transform],
    *,
    horizon: int,
    given: str = "",
    read_images: bool = False,
    resuming: bool = False,
) -> dict[str, NormStats]:
    """The statistics of a run, which lie at `path` afterwards: those given, or computed.

    Args:
        path: `norm_stats.json` in the run's folder.
        source: Training rows.
        transforms: Everything before normalisation: repacking and the dataset's transforms.
        horizon: Actions a chunk.
        given: `data.norm_stats`. A file that knows it was made of other data is used with a warning: statistics of the
            data a policy was pretrained on are a sound choice.
        read_images: `data.stats_need_images`.
        resuming: Only what lies at `path` will do.

    Raises:
        UserError: A file is missing or damaged, or a run would continue with other statistics than it began with.
    """
    if given and not resuming:
        stats, made_of = _load(Path(given).expanduser())
        if made_of and made_of != stats_fingerprint(source, transforms, horizon, read_images=read_images):
            logging.getLogger(__name__).warning(
                "%s was computed from other rows, transforms or another horizon than this run's; it is used as it is",
                given,
            )
        save_norm_stats(path, stats, made_of)
        return stats
    fingerprint = stats_fingerprint(source, transforms, horizon, read_images=read_images)
    if path.exists() or resuming:
        stats, made_of = _load(path)
        if given or made_of == fingerprint:
            return stats
        if resuming:
            raise UserError(
                f"{path} was computed from other rows, transforms or another horizon than the data have now: the run "
                "cannot continue on it. Restore the dataset and its plugin, or use another runner.name"
            )
    stats = compute_norm_stats(source, transforms, read_images=read_images)
    save_norm_stats(path, stats, fingerprint)
    return stats


def compute_norm_stats(
    source: SampleSource, transforms: Sequence[Transform], *, read_images: bool = False, rows: int | None = None
) -> dict[str, NormStats]:
    """Statistics of `state` and `actions` over all rows, after `transforms`; in float64.

    Args:
        source: Training rows; held-out episodes have no part in statistics.
        transforms: Everything before normalisation: repacking and the dataset's transforms.
        read_images: Decode images for transforms that look at them; slow.
        rows: Look at no more than about so many rows, evenly spread: enough to try the transforms, not to train.

    Raises:
        UserError: A transform looks at an image and `read_images` is not set.
    """
    running: dict[str, RunningStats] = {}
    looked_at = range(0, len(source), max(1, len(source) // rows) if rows else 1)
    batches = -(-len(looked_at) // (ROWS_WITH_IMAGES if read_images else ROWS_AT_A_TIME))
    for start in range(batches):
        # Each batch is spread over all rows, so that the first has nearly the range of all: stretching blurs quantiles.
        indices = looked_at[start::batches]
        for key, values in _outputs(source, transforms, indices, read_images=read_images).items():
            running.setdefault(key, RunningStats()).update(values)
    return {key: stats.result() for key, stats in running.items()}


def stats_fingerprint(
    source: SampleSource, transforms: Sequence[Transform], horizon: int, *, read_images: bool = False
) -> str:
    """A hash of what statistics are made of: the rows, what the transforms make of 64 of them, and the horizon."""
    rows = np.unique(np.linspace(0, len(source) - 1, 64).astype(np.int64))
    digest = hashlib.blake2b(f"{source.fingerprint()} {horizon}".encode(), digest_size=16)
    for key, values in _outputs(source, transforms, rows.tolist(), read_images=read_images).items():
        digest.update(f"{key} {values.shape}".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def _outputs(
    source: SampleSource, transforms: Sequence[Transform], indices: Sequence[int], *, read_images: bool
) -> dict[str, Vector]:
    """`state` [rows, D] and `actions` [rows, H, D] after the transforms, in float64."""
    rows = source.__getitems__(indices) if read_images else source.without_images(indices)
    samples: list[Any] = [_apply(row, transforms, read_images=read_images) for row in rows]
    return {key: np.stack([sample[key] for sample in samples]).astype(np.float64) for key in KEYS if key in samples[0]}


def _apply(row: Row, transforms: Sequence[Transform], *, read_images: bool) -> Sample:
    sample: Any = row
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
