"""Diagnose a run's statistics, and the data that they normalise, before the first step.

Each finding has a name, dimensions, a number and a way out. An error would certainly spoil the run, which does not
start; a warning has spoilt runs but may be intended.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rlinf_core.data.normalize import EPSILON, Mode, Normalize, NormStats, Origin, Stats
from rlinf_core.data.statistics.compute import Distribution

FAR = 5.0
"""Normalised numbers beyond this are reported."""
SHARE_FAR = 1e-4
"""Long tails have up to this share of them; a larger share is reported, and any number beyond VERY_FAR."""
VERY_FAR = 10.0
NO_SPREAD = 10 * EPSILON
"""Below this spread, openpi's epsilon dominates the divisor."""
SMALL_PART = 0.01
"""A smaller ratio of spread to range means that a number rarely changes."""
FEW_EPISODES = 0.05
"""Far numbers in at most this share of episodes are the fault of those episodes."""
OTHER_SCALE = 10.0
"""A larger ratio between the spreads of statistics and data is reported."""


@dataclass(frozen=True)
class Finding:
    """A problem, or a likely one, with statistics or data."""

    id: str
    """Its name, as docs/statistics.md lists it."""
    severity: Literal["error", "warning"]
    key: str
    """`state`, `actions`, or empty if it concerns everything."""
    dimensions: tuple[int, ...]
    """Affected dimensions of the vector, counted from 0."""
    message: str
    """What was found, with a number."""
    way_out: str
    names: tuple[str, ...] = ()
    """What the dataset calls each dimension of the vector, affected or not; see `Distribution.names`."""

    def __str__(self) -> str:
        place = self.key + (f" {_ranges(self.dimensions, self.names)}" if self.dimensions else "")
        return f"{self.id}: {place}{': ' if place else ''}{self.message}. {self.way_out}"


def compare_with_data(stats: Stats, distributions: Mapping[str, Distribution], mode: Mode) -> list[Finding]:
    """Findings about statistics that do not suit the data.

    Args:
        stats: Statistics that the run would use, floor included.
        distributions: Distributions of the training rows.
        mode: The policy's normalisation.
    """
    findings: list[Finding] = []
    for key, data in distributions.items():
        broken = list(_broken(key, stats.get(key), len(data.running.low), mode))
        findings += broken or _compare_with_data(key, stats, distributions, mode)
    return findings


def compare_origins(recorded: Origin, current: Origin) -> list[Finding]:
    """A finding if the statistics in a file were computed from other data than this run's."""
    if not recorded.fingerprint or recorded.fingerprint == current.fingerprint:
        return []
    recompute = "Leave data.norm_stats empty to compute them, unless those of the weights' training data are intended"
    if recorded.dataset and recorded.dataset != current.dataset:
        id, message = "other-dataset", f"the statistics are of {recorded.dataset}, the data are {current.dataset}"
    elif recorded.rows and (recorded.rows, recorded.episodes) != (current.rows, current.episodes):
        id = "stale"
        message = (
            f"the statistics are of {recorded.rows} rows of {recorded.episodes} episodes, there are now {current.rows} "
            f"of {current.episodes}"
        )
    elif recorded.horizon and recorded.horizon != current.horizon:
        id = "other-horizon"
        message = f"the statistics are of chunks of {recorded.horizon} actions, not {current.horizon}"
    else:
        id, message = "other-transforms", "the statistics were computed from other rows, columns or transforms"
    return [Finding(id, "warning", "", (), message, recompute)]


def _broken(key: str, stats: NormStats | None, width: int, mode: Mode) -> Iterator[Finding]:
    """Errors: the statistics are unusable."""
    recompute = "Leave data.norm_stats empty to compute them"
    if stats is None:
        yield Finding("missing", "error", key, (), "the statistics do not include it", recompute)
        return
    if len(stats.mean) < width:
        message = f"the statistics of {key!r} have {len(stats.mean)} numbers, the data have {width}"
        yield Finding("too-narrow", "error", key, (), message, f"They are of other data. {recompute}")
        return
    used = {"mean": stats.mean, "std": stats.std} if mode == "mean_std" else {"q01": stats.q01, "q99": stats.q99}
    if mode == "quantile" and any(np.isnan(values).all() for values in used.values()):
        yield Finding(
            "no-quantiles", "error", key, (), "the statistics have no quantiles, which the policy needs", recompute
        )
        return
    for name, values in used.items():
        if (wrong := ~np.isfinite(values[:width])).any():
            yield Finding("not-finite", "error", key, _where(wrong), f"{name} is NaN or infinite", recompute)
    spread = stats.spread(mode)[:width]
    if (wrong := np.isfinite(spread) & (spread < 0)).any():
        message = "std is negative" if mode == "mean_std" else "q99 is smaller than q01"
        yield Finding("negative-spread", "error", key, _where(wrong), message, recompute)


def _compare_with_data(
    key: str, stats: Stats, distributions: Mapping[str, Distribution], mode: Mode
) -> Iterator[Finding]:
    data = distributions[key]
    spread = stats[key].spread(mode)[: len(data.running.low)]
    extremes = normalized_extremes(key, stats, data, mode)
    moving = data.running.high - data.running.low > 1e-6 * np.maximum(np.abs(data.running.high), 1e-6)
    none = spread < NO_SPREAD
    yield from _without_spread(key, stats, distributions, mode, none & ~moving, none & moving)
    # Far numbers in a few episodes are those episodes' fault; in many episodes, the spread's.
    common = (extremes > FAR).mean(axis=0) > FEW_EPISODES
    small = ~none & moving & common & (spread < SMALL_PART / 2 * (data.running.high - data.running.low))
    if small.any():
        part = (spread / (data.running.high - data.running.low).clip(1e-300))[small].min()
        message = (
            f"the spread is {spread[small].min():.2g}, {part:.1%} of the range: it rarely changes, and when it does, "
            f"{_far(small, extremes, data)}"
        )
        yield Finding(
            "scale-near-zero", "warning", key, _where(small), message, offer_floor(stats, distributions, mode)
        )
    share = share_beyond(key, stats, data, mode)
    far = ((share > SHARE_FAR) | (extremes.max(axis=0) > VERY_FAR)) & moving & ~none & ~small
    if far.any():
        message = f"up to {share[far].max():.2%} of the numbers are beyond ±{FAR:g}; {_far(far, extremes, data)}"
        way_out = "Check that episode; data.exclude_episodes leaves it out"
        if (common & far).any():
            way_out = "Use statistics of these data (leave data.norm_stats empty), or a larger data.norm_floor"
        yield Finding("beyond-5", "warning", key, _where(far), message, way_out)
    yield from _of_other_data(key, stats[key], data, mode, moving & ~none)


def _without_spread(
    key: str,
    stats: Stats,
    distributions: Mapping[str, Distribution],
    mode: Mode,
    constant: NDArray[np.bool_],
    moving: NDArray[np.bool_],
) -> Iterator[Finding]:
    data = distributions[key]
    if mode == "mean_std":  # Zero padding by the dataset format is normalised to zero.
        constant = constant & ~((data.running.low == 0) & (data.running.high == 0))
    if constant.any():
        at = " (its one value becomes -1)" if mode == "quantile" else ""
        message = (
            f"never changes in the data{at}; a robot that is off by 0.01 gives the policy "
            f"{0.01 / (stats[key].spread(mode)[: len(constant)][constant].max() + EPSILON):.0f}"
        )
        yield Finding("constant", "warning", key, _where(constant), message, offer_floor(stats, distributions, mode))
    if moving.any():
        extremes = normalized_extremes(key, stats, data, mode)
        message = f"the statistics have no spread, but the data vary; {_far(moving, extremes, data)}"
        yield Finding("no-spread", "warning", key, _where(moving), message, offer_floor(stats, distributions, mode))


def _of_other_data(
    key: str, stats: NormStats, data: Distribution, mode: Mode, compared: NDArray[np.bool_]
) -> Iterator[Finding]:
    """Findings about statistics whose range or scale suggests other data."""
    width, own = len(compared), data.stats
    low, high = stats.q01[:width], stats.q99[:width]
    if mode == "mean_std":
        low, high = stats.mean[:width] - 3 * stats.std[:width], stats.mean[:width] + 3 * stats.std[:width]
    way_out = "They are of other data, units or transforms. Leave data.norm_stats empty to compute them"
    apart = compared & ((own.q99 < low) | (own.q01 > high))
    if apart.any():
        first = _where(apart)[0]
        message = (
            f"the data are outside the statistics' range: {own.q01[first]:.3g} to {own.q99[first]:.3g}, not "
            f"{low[first]:.3g} to {high[first]:.3g} (dimension {_ranges((first,), data.names)[1:-1]})"
        )
        yield Finding("disjoint", "warning", key, _where(apart), message, way_out)
    ratio = np.full(width, 1.0)
    known = compared & (own.spread(mode) > NO_SPREAD)
    ratio[known] = stats.spread(mode)[:width][known] / own.spread(mode)[known]
    if (wide := ratio > OTHER_SCALE).any():
        message = f"the statistics are up to {ratio.max():.3g} times as wide as the data, which become small numbers"
        yield Finding("too-wide", "warning", key, _where(wide), message, way_out)
    if (narrow := ratio < 1 / OTHER_SCALE).any():
        message = f"the data are up to {1 / ratio.min():.3g} times as wide as the statistics"
        yield Finding("too-tight", "warning", key, _where(narrow), message, way_out)


def normalized_extremes(key: str, stats: Stats, data: Distribution, mode: Mode) -> NDArray[np.float64]:
    """[E, D], the largest absolute normalised value in each episode."""
    normalize = Normalize({key: stats[key]}, mode)
    low, high = normalize.normalized(key, data.episode_low), normalize.normalized(key, data.episode_high)
    return np.asarray(np.maximum(np.abs(low), np.abs(high)))


def share_beyond(key: str, stats: Stats, data: Distribution, mode: Mode, limit: float = FAR) -> NDArray[np.float64]:
    """[D], the share of normalised values beyond ±`limit`, to the precision of the histogram's bins."""
    middles = (data.running.edges[:, 1:] + data.running.edges[:, :-1]) / 2
    normalized = Normalize({key: stats[key]}, mode).normalized(key, middles.T).T
    counted = data.running.counts
    return np.asarray((counted * (np.abs(normalized) > limit)).sum(axis=1) / counted.sum(axis=1).clip(1))


def offer_floor(stats: Stats, distributions: Mapping[str, Distribution], mode: Mode) -> str:
    """The `data.norm_floor` that would bring all values it affects within ±5, and what it would change."""
    spreads = {
        key: stats[key].spread(mode)[: len(data.running.low)] for key, data in distributions.items() if key in stats
    }
    for floor in 10.0 ** np.arange(-3, 3):
        widened = {key: stats[key].floored(floor) for key in spreads}
        worst = {
            key: float(
                normalized_extremes(key, widened, distributions[key], mode)[:, spreads[key] < floor].max(initial=0)
            )
            for key in spreads
        }
        changes = {key: _where(spread < floor) for key, spread in spreads.items() if (spread < floor).any()}
        if changes and max(worst.values()) <= FAR:
            what = " and ".join(
                f"{key} {_ranges(dimensions, distributions[key].names)}" for key, dimensions in changes.items()
            )
            return f"data.norm_floor = {floor:g} would widen {what}; their largest normalised number is then " + (
                f"{max(worst.values()):.2g}"
            )
    return "No data.norm_floor helps: leave the dimension out of the dataset's columns, or exclude the outliers"


def _far(which: NDArray[np.bool_], extremes: NDArray[np.float64], data: Distribution) -> str:
    """The largest normalised value in some dimensions, and its episode."""
    chosen = extremes[:, which]
    episode, _ = np.unravel_index(int(chosen.argmax()), chosen.shape)
    return f"the largest is normalised to {chosen.max():.3g}, in episode {data.episodes[episode]}"


def _where(flags: NDArray[np.bool_]) -> tuple[int, ...]:
    return tuple(np.flatnonzero(flags).tolist())


MOST_NAMES = 6
"""Dimensions that a message calls by their names; of more, the first and the last."""


def _ranges(dimensions: tuple[int, ...], names: tuple[str, ...] = ()) -> str:
    """`[0, 3-6]`, or with names `[0, 3-4: x, gripper, wrist]`."""
    runs: list[list[int]] = []
    for dimension in dimensions:
        if runs and dimension == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], dimension]
        else:
            runs.append([dimension])
    named = {dimension: names[dimension] for dimension in dimensions if dimension < len(names)}
    # A dimension without a name among others that have one is called by its number.
    called = [name or str(dimension) for dimension, name in named.items()] if any(named.values()) else []
    if len(called) > MOST_NAMES:
        called = [f"{called[0]} ... {called[-1]}"]
    numbers = ", ".join("-".join(map(str, run)) for run in runs)
    return f"[{numbers}: {', '.join(called)}]" if called else f"[{numbers}]"
