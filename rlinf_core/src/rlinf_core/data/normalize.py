"""Normalisation of states and actions: the statistics, their file, and the transform that uses them.

Statistics are computed over the training rows after the dataset's transforms, over every step of every action chunk
(see `data.statistics`). Files use openpi's `norm_stats.json` layout; formulas follow tests/golden/README.md, section 2.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rlinf_core.data.sample import Sample
from rlinf_core.data.transforms import Transform
from rlinf_core.errors import UserError
from rlinf_core.files import write_text
from rlinf_core.untrusted.text import read_json

KEYS = ("state", "actions")
CORRECT_SETTING = "Correct data.norm_stats, or leave it empty"
EPSILON = 1e-6  # Added to the spread, as in openpi.
Mode = Literal["mean_std", "quantile"]
Vector = NDArray[np.floating]
Stats = Mapping[str, "NormStats"]
"""`state` and `actions` -> their statistics."""


@dataclass(frozen=True, eq=False)
class NormStats:
    """Statistics of each dimension of a vector; all [D], in the data's units after the dataset's transforms."""

    mean: Vector
    std: Vector
    """Population standard deviation."""
    q01: Vector
    """1 % quantile (to within 1/5000 of the range)."""
    q99: Vector
    """99 % quantile."""

    def spread(self, mode: Mode) -> Vector:
        """[D], the length of one normalised unit in the data's units."""
        return self.std if mode == "mean_std" else (self.q99 - self.q01) / 2

    def cut(self, width: int) -> NormStats:
        """Keep the first `width` dimensions; statistics of padded data are wider than the data."""
        return NormStats(*(value[:width] for value in (self.mean, self.std, self.q01, self.q99)))

    def floored(self, floor: float) -> NormStats:
        """Raise every spread to at least `floor`: standard deviations, and quantiles about their midpoint."""
        middle, half = (self.q01 + self.q99) / 2, (self.q99 - self.q01) / 2
        narrow = half < floor
        return NormStats(
            mean=self.mean,
            std=np.maximum(self.std, floor),
            q01=np.where(narrow, middle - floor, self.q01),
            q99=np.where(narrow, middle + floor, self.q99),
        )


@dataclass(frozen=True)
class Origin:
    """Provenance of statistics, as recorded in their file; fields that it does not record are empty."""

    fingerprint: str = ""
    """A hash of the rows, the transformed values of some of them, and the action horizon."""
    dataset: str = ""
    """Folder or hub id of the dataset, or the file that they were imported from."""
    rows: int = 0
    episodes: int = 0
    horizon: int = 0
    """Actions per chunk."""
    norm_floor: float = 0.0
    """The `data.norm_floor` that was applied."""


@dataclass(frozen=True, eq=False)
class Normalize(Transform):
    """Scale `state` and `actions` to zero mean and unit spread, or map their quantiles to [-1, 1], in float64.

    The inverse accepts vectors wider than the statistics, because policies pad their inputs: padding is unchanged
    (quantile) or treated as a number of mean 0 and spread 1 (mean_std).
    """

    stats: Stats
    mode: Mode

    def __post_init__(self) -> None:
        if self.mode == "quantile" and any(np.isnan([s.q01, s.q99]).any() for s in self.stats.values()):
            raise UserError("the statistics have no quantiles, which this policy needs: leave data.norm_stats empty")

    def __call__(self, sample: Sample) -> Sample:
        """Normalise; raises `UserError` if the statistics have fewer numbers than the data."""
        return self._changed(sample, self.normalized)

    def inverse(self, sample: Sample) -> Sample:
        """Convert actions and state back to the data's units."""
        return self._changed(sample, self._restore)

    def _changed(self, sample: Sample, change: Callable[[str, Vector], Vector]) -> Sample:
        out: Any = dict(sample)
        out.update({key: change(key, out[key]) for key in KEYS if key in out})
        return out  # type: ignore[no-any-return]

    def normalized(self, key: str, x: Vector) -> Vector:
        """Normalise vectors [..., D] of `state` or `actions`; raises `UserError` like `__call__`."""
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


def load_norm_stats(path: Path, way_out: str = CORRECT_SETTING) -> dict[str, NormStats]:
    """Read a `norm_stats.json` in openpi's layout; raises `UserError`, which ends with `way_out`, if it is invalid."""
    return load_with_origin(path, way_out)[0]


def load_with_origin(path: Path, way_out: str = CORRECT_SETTING) -> tuple[dict[str, NormStats], Origin]:
    """Like `load_norm_stats`, with the provenance that the file records."""
    try:
        content = read_json(path)
        tables = content["norm_stats"]
        stats = {key: parse_norm_stats(tables[key]) for key in KEYS if key in tables}
        origin = Origin(**content.get("made_of", {}))
    except OSError as e:
        raise UserError(f"the statistics {path} cannot be read: {e.strerror}. {way_out}") from e
    except (ValueError, KeyError, TypeError) as e:
        if path.name == "stats.json" and path.parent.name == "meta":
            raise UserError(
                f"{path} has lerobot's statistics of a dataset, whose quantiles are not those of all frames: leave "
                "data.norm_stats empty to compute them, or import the file with `rlinf norm-stats --import FILE --from "
                "lerobot --output norm_stats.json`"
            ) from e
        raise UserError(
            f"{path} is not a norm_stats.json ({type(e).__name__}: {e}); expected "
            '{"norm_stats": {"state": {"mean": […], "std": […], "q01": […], "q99": […]}, "actions": {…}}}'
        ) from e
    return stats, origin


def save_norm_stats(path: Path, stats: Stats, origin: Origin | None = None) -> None:
    """Write a `norm_stats.json` in openpi's layout; `origin` records its provenance (openpi ignores it)."""
    # Unknown quantiles are null, as in openpi's files: JSON has no NaN.
    tables = {
        key: {
            name: None if np.isnan(v).all() and name.startswith("q") else v.tolist() for name, v in vars(value).items()
        }
        for key, value in stats.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    made_of = {name: value for name, value in asdict(origin or Origin()).items() if value}
    write_text(path, json.dumps({"norm_stats": tables} | ({"made_of": made_of} if made_of else {}), indent=2))


def parse_norm_stats(table: Mapping[str, Any]) -> NormStats:
    """Statistics from lists; raises `KeyError`, `TypeError` or `ValueError` for an invalid table.

    A table without quantiles serves mean_std only; its quantiles become NaN, which `Normalize` rejects.
    """
    mean = np.asarray(table["mean"], np.float64)
    values = {
        name: np.asarray(table[name], np.float64) for name in ("std", "q01", "q99") if table.get(name) is not None
    }
    absent = np.full_like(mean, np.nan)
    stats = NormStats(mean, values["std"], values.get("q01", absent), values.get("q99", absent))
    shapes = {value.shape for value in vars(stats).values()}
    if len(shapes) != 1 or mean.ndim != 1:
        raise ValueError(f"mean, std, q01 and q99 must be lists of the same length, but have shapes {sorted(shapes)}")
    return stats
