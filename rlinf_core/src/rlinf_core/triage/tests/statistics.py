"""The test of the statistics: those of the policy beside those of its training data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from rlinf_core.contract.triage import TriageOutcome, TriageTest
from rlinf_core.data.normalize import KEYS, Normalize, NormStats, Stats, load_norm_stats
from rlinf_core.data.pipeline import Pipeline
from rlinf_core.data.statistics.compute import ROWS_WITH_IMAGES, compute_norm_stats, outputs
from rlinf_core.errors import UserError
from rlinf_core.results import Cell, ResultTable
from rlinf_core.triage.mistakes.changes import Named
from rlinf_core.triage.mistakes.rows import Vectors
from rlinf_core.triage.scene import Scene

OTHER = 0.1
"""Statistics that differ by more than this share of the spread are other ones."""
BETTER = 0.05
"""A fall of the squared action error by this share, on training rows, is an effect."""


class StatisticsTest(TriageTest):
    """The policy's statistics beside those of its training data."""

    name = "statistics"
    question = "Are the statistics those that the policy was trained with?"

    def run(self, scene: Scene) -> TriageOutcome:
        """Compare them, and what they do to the error on training rows."""
        normalize = scene.policy.pipeline.normalize
        if normalize is None:
            return TriageOutcome("skipped", "the policy does not normalise")
        data, own = scene.policy.data, _own_statistics(scene)
        table = _statistics_table(normalize, own)
        apart = {key: _apart(normalize, key, own[key]) for key in KEYS if key in own and key in normalize.stats}
        wrong = {key: np.flatnonzero(one > OTHER) for key, one in apart.items()}
        if not any(len(one) for one in wrong.values()):
            return TriageOutcome("fine", "the statistics are those of the training data", tables=[table])
        used = _run_statistics(scene)
        intended = bool(data.given_statistics()) and (used is None or not _differ(normalize, used))
        before, after = _errors_with(scene, normalize, own)
        falls = 1 - after / max(before, 1e-12)
        changed = scene.subject.changed_files("norm_stats")
        proof = falls > BETTER or changed or (used is not None and _differ(normalize, used))
        where = " and ".join(
            Named(key, scene.names.get(key, ()), len(apart[key]))(one.tolist())
            for key, one in wrong.items()
            if len(one)
        )
        sentence = f"the statistics of {where} are not those of the training data"
        if kind := _recognized(scene, normalize, own, wrong):
            sentence += f": they are {kind}"
        if falls > BETTER:
            sentence += f"; those of the data lower the action error from {np.sqrt(before):.2f} to {np.sqrt(after):.2f}"
        elif changed:
            sentence += f" ({changed[0]} was changed after the export)"
        way_out = "Use the norm_stats.json that the run was trained with (it is in its folder), or export again"
        if intended or not proof:
            way_out = (
                "That may be intended, for statistics of pretrained weights; otherwise leave data.norm_stats empty"
            )
        return TriageOutcome(
            "cause" if proof and not intended else "suspicious",
            sentence,
            way_out,
            strength=float(np.clip(max(falls, 0.5), 0, 1)) if proof else 0.2,
            tables=[table],
        )


def _own_statistics(scene: Scene) -> Stats:
    """The statistics of the training data."""
    data = scene.policy.data
    transforms, images = [data.repack(), *data.transforms()], data.stats_need_images
    own = compute_norm_stats(scene.trained, transforms, read_images=images, rows=ROWS_WITH_IMAGES if images else None)
    return {key: one.floored(data.norm_floor) for key, one in own.items()} if data.norm_floor else own


def with_own_statistics(scene: Scene) -> Pipeline | None:
    """The policy's pipeline with the statistics of the training data; None if it has them."""
    normalize = scene.pipeline.normalize
    if normalize is None or scene.training is None:
        return None
    own = _own_statistics(scene)
    shared = [key for key in KEYS if key in own and key in normalize.stats]
    if not any((_apart(normalize, key, own[key]) > OTHER).any() for key in shared):
        return None
    return replace(scene.pipeline, normalize=Normalize({**normalize.stats, **own}, normalize.mode))


def _errors_with(scene: Scene, normalize: Normalize, own: Stats) -> tuple[float, float]:
    """Squared action error on training rows with the policy's statistics, and with those of the data."""
    pipeline = scene.pipeline
    replaced = replace(pipeline, normalize=Normalize({**normalize.stats, **own}, normalize.mode))
    rows, scale = scene.spread_rows(scene.trained), scene.action_spread
    before = float(scene.on_training.errors(scale).mean())
    return before, float(scene.act(scene.trained, rows, pipeline=replaced).errors(scale).mean())


def _ends(stats: NormStats, mode: str, width: int) -> tuple[Vectors, Vectors]:
    """[width], what one end and the other of a normalised unit mean."""
    if mode == "mean_std":
        return stats.mean[:width] - stats.std[:width], stats.mean[:width] + stats.std[:width]
    return stats.q01[:width], stats.q99[:width]


def _apart(normalize: Normalize, key: str, own: NormStats) -> Vectors:
    """[D], the largest difference of the ends, relative to the data's spread."""
    width = min(len(own.mean), len(normalize.stats[key].mean))
    used, right = _ends(normalize.stats[key], normalize.mode, width), _ends(own, normalize.mode, width)
    spread = np.maximum((right[1] - right[0]) / 2, 1e-6)
    # A number that never changes has no spread: rounding is no difference.
    spread = np.maximum(spread, 1e-3 * np.abs(right[0]))
    return np.asarray(np.maximum(np.abs(used[0] - right[0]), np.abs(used[1] - right[1])) / spread)


def _differ(normalize: Normalize, other: Stats) -> bool:
    return any(key in other and (_apart(normalize, key, other[key]) > 1e-3).any() for key in normalize.stats)


def _run_statistics(scene: Scene) -> Stats | None:
    """The statistics in the run that the folder is from; None if it is not on this machine."""
    run = scene.subject.run
    if run is None or not scene.subject.exported:
        return None
    try:
        return load_norm_stats(run / "norm_stats.json")
    except (UserError, OSError):
        return None


def _recognized(scene: Scene, normalize: Normalize, own: Stats, wrong: Mapping[str, Any]) -> str:
    """What the statistics are instead, if that can be seen."""
    if all(_exchanged(normalize, key, own[key], numbers) for key, numbers in wrong.items() if len(numbers)):
        return "the high quantile where the low one should be, and the low one where the high one should be"
    for words, candidate in _candidates(scene, normalize, own):
        keys = [key for key, numbers in wrong.items() if len(numbers)]
        if all(key in candidate and _same(normalize, key, candidate[key], wrong[key]) for key in keys):
            return words
    for key, numbers in wrong.items():
        if len(numbers) and (order := _order(normalize, key, own[key], numbers)):
            return order
        if len(numbers) and (factor := _factor(normalize, key, own[key], numbers)):
            return factor
    return ""


def _same(normalize: Normalize, key: str, candidate: NormStats, numbers: Any) -> bool:
    width = min(len(candidate.mean), len(normalize.stats[key].mean))
    inside = [i for i in numbers if i < width]
    return bool(inside) and bool((_apart(normalize, key, candidate)[inside] < OTHER).all())


def _candidates(scene: Scene, normalize: Normalize, own: Stats) -> Iterator[tuple[str, Stats]]:
    data = scene.policy.data
    transforms = [data.repack(), *data.transforms()]
    if not data.stats_need_images:
        every = outputs(scene.trained, transforms, range(len(scene.trained)))
        flat = {key: one.reshape(-1, one.shape[-1]) for key, one in every.items()}
        yield (
            "minimum and maximum, not the quantiles of 1 % and 99 %"
            if normalize.mode == "quantile"
            else "minimum and maximum, not mean and standard deviation",
            {key: _between(one.min(0), one.max(0)) for key, one in flat.items()},
        )
        yield (
            "of actions before the dataset's transforms (absolute, where relative ones are trained)",
            compute_norm_stats(scene.trained, transforms[:1]),
        )
        for low, high in ((0.05, 0.95), (0.02, 0.98), (0.1, 0.9), (0.25, 0.75)):
            yield (
                f"the quantiles of {low:.0%} and {high:.0%}, not those of 1 % and 99 %",
                {key: _between(*np.quantile(one, [low, high], axis=0)) for key, one in flat.items()},
            )
    for times in (1.0, 2.0, 3.0):
        yield (
            f"the mean plus and minus {times:g} standard deviations",
            {key: _between(one.mean - times * one.std, one.mean + times * one.std) for key, one in own.items()},
        )
    if len(own) == 2:
        yield "exchanged: those of the state and of the action", {"state": own["actions"], "actions": own["state"]}
    if scene.site is not None:
        yield "those of the site's rows, not of the training data", compute_norm_stats(scene.site, transforms)
    if normalize.mode == "mean_std":
        squares = {key: NormStats(one.mean, one.std**2, one.q01, one.q99) for key, one in own.items()}
        yield "variances where standard deviations should be", squares
    width = {key: len(one.mean) for key, one in own.items()}
    yield "the identity: nothing is normalised", {key: _between(-np.ones(w), np.ones(w)) for key, w in width.items()}
    yield "from 0 to 1", {key: _between(np.zeros(w), np.ones(w)) for key, w in width.items()}


def _exchanged(normalize: Normalize, key: str, own: NormStats, numbers: Any) -> bool:
    if normalize.mode != "quantile":
        return False
    used = normalize.stats[key]
    width = min(len(own.q01), len(used.q01))
    apart = np.maximum(np.abs(used.q01[:width] - own.q99[:width]), np.abs(used.q99[:width] - own.q01[:width]))
    spread = np.maximum(own.q99[:width] - own.q01[:width], 1e-6)
    return bool((apart / spread)[numbers].max() < OTHER)


def _between(low: Vectors, high: Vectors) -> NormStats:
    """Statistics whose normalised unit reaches from one number to another, in either mode."""
    return NormStats((low + high) / 2, (high - low) / 2, low, high)


def _order(normalize: Normalize, key: str, own: NormStats, numbers: Any) -> str:
    """Whether the statistics of the numbers are those of others."""
    width = len(own.mean)
    used, right = _ends(normalize.stats[key], normalize.mode, width), _ends(own, normalize.mode, width)
    order = []
    for i in range(width):
        apart = np.abs(used[0][i] - right[0]) + np.abs(used[1][i] - right[1])
        nearest = int(np.argmin(apart + 1e-9 * (np.arange(width) != i)))
        if apart[nearest] > OTHER * max(right[1][nearest] - right[0][nearest], 1e-6):
            return ""
        order.append(nearest)
    return f"in another order (that of the numbers [{', '.join(map(str, order))}])" if sorted(order) != order else ""


def _factor(normalize: Normalize, key: str, own: NormStats, numbers: Any) -> str:
    """Whether the statistics are those of the data in another unit."""
    width = len(own.mean)
    used, right = _ends(normalize.stats[key], normalize.mode, width), _ends(own, normalize.mode, width)
    spread = right[1] - right[0]
    ratios = (used[1] - used[0])[numbers] / np.maximum(spread[numbers], 1e-9)
    ratio = float(np.median(ratios))
    if len(ratios) and ratio > 0 and abs(np.log(ratio)) > 0.1 and np.allclose(ratios, ratio, rtol=0.1):
        return f"{ratio:.4g} times as wide as those of the data, as numbers in another unit would be"
    return ""


def _statistics_table(normalize: Normalize, own: Stats) -> ResultTable:
    rows: list[tuple[Cell, ...]] = []
    for key, right in own.items():
        if key not in normalize.stats:
            continue
        width = min(len(right.mean), len(normalize.stats[key].mean))
        ends = *_ends(normalize.stats[key], normalize.mode, width), *_ends(right, normalize.mode, width)
        apart = _apart(normalize, key, right)
        rows += [(f"{key} {i}", *(float(one[i]) for one in ends), float(apart[i])) for i in range(width)]
    columns = ("low", "high") if normalize.mode == "quantile" else ("mean - std", "mean + std")
    return ResultTable(
        title="Statistics of the policy, and of the training data",
        columns=("number", *columns, *(f"{one} of the data" for one in columns), "difference / spread"),
        rows=tuple(rows),
    )
