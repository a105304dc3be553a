"""Tests of what is stored: the data, the statistics and the weights, in the run and in an exported folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from rlinf_core.contract.triage import TriageOutcome, TriageTest
from rlinf_core.data.normalize import KEYS, Normalize, NormStats, Stats, load_norm_stats
from rlinf_core.data.statistics.action_kind import diagnose_actions
from rlinf_core.data.statistics.compute import ROWS_WITH_IMAGES, compute_norm_stats, outputs
from rlinf_core.errors import UserError
from rlinf_core.export import Choice, find_checkpoint, read_weights
from rlinf_core.results import Cell, ResultTable
from rlinf_core.triage.rows import Rows, Vectors
from rlinf_core.triage.scene import Acted, Scene
from rlinf_core.triage.vector_mistakes import Named

OTHER = 0.1
"""Statistics that differ by more than this share of the spread are other ones."""
BETTER = 0.05
"""A fall of the squared action error by this share, on training rows, is an effect."""
BF16 = 0.01
"""Relative difference of weights that rounding to bf16 explains."""
EMA_GAIN = 0.05
"""The averaged weights are better if their validated error is lower by this share."""
FEW_INITIAL = 0.1
"""Share of the matrices that may have their initial values: those that the loss does not depend on."""
WORSE = 1.5
"""A folder whose error is this many times what its run measured is not what was validated."""


class DataTest(TriageTest):
    """The training data on their own: damage, flipping quaternions, actions that come after their effect."""

    name = "data"
    question = "Are the training data sound?"

    def run(self, scene: Scene) -> TriageOutcome:
        """Check the numbers."""
        wide = scene.wide
        if flips := list(_flips(scene, wide)):
            return TriageOutcome(
                "suspicious",
                flips[0],
                "Choose one sign per rotation, for example w >= 0 or that of the frame before, and convert again",
                strength=0.5,
            )
        if early := _acts_after(scene):
            return TriageOutcome(
                "suspicious",
                early,
                "Pair each observation with the action that was taken on it, and convert the data again",
                strength=0.5,
            )
        findings = diagnose_actions(scene.trained, [scene.policy.data.repack(), *scene.policy.data.transforms()])
        relative = [one for one in findings if one.id == "actions-look-relative"]
        if relative:
            return TriageOutcome("suspicious", str(relative[0]).partition(". ")[0], relative[0].way_out, strength=0.5)
        episodes = len(np.unique(scene.trained.episodes))
        return TriageOutcome(
            "fine", f"{len(scene.trained)} rows of {episodes} episodes: no contradiction in their numbers"
        )


class StatisticsTest(TriageTest):
    """The policy's statistics beside those of its training data."""

    name = "statistics"
    question = "Are the statistics those that the policy was trained with?"

    def run(self, scene: Scene) -> TriageOutcome:
        """Compare them, and what they do to the error on training rows."""
        normalize = scene.policy.pipeline.normalize
        if normalize is None:
            return TriageOutcome("skipped", "the policy does not normalise")
        data = scene.policy.data
        transforms = [data.repack(), *data.transforms()]
        images = data.stats_need_images
        own = compute_norm_stats(
            scene.trained, transforms, read_images=images, rows=ROWS_WITH_IMAGES if images else None
        )
        if data.norm_floor:
            own = {key: one.floored(data.norm_floor) for key, one in own.items()}
        table = _statistics_table(normalize, own)
        apart = {key: _apart(normalize, key, own[key]) for key in KEYS if key in own and key in normalize.stats}
        wrong = {key: np.flatnonzero(one > OTHER) for key, one in apart.items()}
        if not any(len(one) for one in wrong.values()):
            return TriageOutcome("fine", "the statistics are those of the training data", tables=[table])
        used = _run_statistics(scene)
        intended = bool(data.given_statistics()) and (used is None or not _differ(normalize, used))
        before, after = _errors_with(scene, normalize, own)
        falls = 1 - after / max(before, 1e-12)
        changed = _changed_files(scene, only="norm_stats")
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
    width = {key: len(one.mean) for key, one in own.items()}
    yield "the identity: nothing is normalised", {key: _between(-np.ones(w), np.ones(w)) for key, w in width.items()}
    yield "from 0 to 1", {key: _between(np.zeros(w), np.ones(w)) for key, w in width.items()}


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


class WeightsTest(TriageTest):
    """The weights beside those of the run: whole, unchanged, and averaged where that is better."""

    name = "weights"
    question = "Are the weights those that the run validated?"

    def run(self, scene: Scene) -> TriageOutcome:
        """Compare files, tensors and validated errors."""
        subject, table = scene.subject, _validated_table(scene)
        tables = [table] if table.rows else []
        if compared := _compare_with_run(scene):
            return replace(compared, tables=[*tables, *compared.tables])
        changed = _changed_files(scene, only="safetensors")
        initial = _at_initial_values(scene)
        worse = _worse_than_validated(scene)
        if changed or worse:
            parts = [f"{changed[0]} is not the file that rlinf export wrote"] if changed else []
            parts += [worse] if worse else []
            parts += [initial] if initial else []
            return TriageOutcome(
                "cause",
                "the weights are not those that the run validated: " + "; ".join(parts),
                "Export the run again, and load its file completely (strict=True, no missing or unexpected names)",
                strength=1.0 if worse else 0.8,
                tables=tables,
            )
        if initial:
            return TriageOutcome(
                "cause",
                f"the weights were loaded in part: {initial}",
                "Load all weights (strict=True), and look for names that were not found",
                strength=0.9,
                tables=tables,
            )
        if better := _average_is_better(scene):
            return TriageOutcome(
                "cause" if subject.exported else "suspicious",
                better,
                "Export the run with --ema" + " again" * subject.exported,
                strength=0.6,
                tables=tables,
            )
        return TriageOutcome(
            "fine", "the weights are whole" + (", and those of the run" if subject.run else ""), tables=tables
        )


def _changed_files(scene: Scene, *, only: str) -> list[str]:
    """Files of an exported folder whose hash is not the recorded one."""
    sums = scene.subject.description.get("sha256", {})
    if not isinstance(sums, Mapping):
        return []
    changed = []
    for name, recorded in sums.items():
        path = scene.subject.folder / str(name)
        if only not in str(name) or not path.is_file():
            continue
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != recorded:
                changed.append(str(name))
    return changed


def _compare_with_run(scene: Scene) -> TriageOutcome | None:
    """A cause if the folder's tensors are not those of its run's checkpoint; None if they are, or it is not here."""
    subject = scene.subject
    if not subject.exported or subject.run is None or subject.step is None:
        return None
    from rlinf_core.config.load import load_config
    from rlinf_core.training.checkpoint.state import read_position

    try:
        run = load_config(subject.run / "config.toml", plugins=scene.plugins)
        choice = Choice(subject.step, ema=subject.ema)
        checkpoint = find_checkpoint(subject.run, run.runner.checkpoints_of(subject.run), choice, lambda text: None)
        run = run.model_copy(update={"policy": run.policy.with_data_layout(read_position(checkpoint).data_layout)})
        tensors, _ = read_weights(run, checkpoint, choice, scene.plugins)
    except UserError:
        return None  # The checkpoint may be deleted: then there is nothing to compare with.
    here = dict(scene.policy.module.named_parameters())
    other = {name: one for name, one in tensors.items() if name in here and _relative(here[name], one) > BF16}
    if not other:
        return None
    share = len(other) / max(len(tensors), 1)
    listed = ", ".join(list(other)[:3])
    return TriageOutcome(
        "cause",
        f"{len(other)} of {len(tensors)} tensors ({share:.0%}) are not those of the run's checkpoint at step "
        f"{subject.step}, for example {listed}: the weights were loaded in part, or are of another training",
        "Export the run again, and load its file completely (strict=True, no missing or unexpected names)",
        strength=1.0,
        tables=[_tensor_table(here, tensors, other)],
    )


def _relative(a: Any, b: Any) -> float:
    if tuple(a.shape) != tuple(b.shape):
        return float("inf")
    first, second = a.detach().float().cpu(), b.detach().float().cpu()
    return float((first - second).norm()) / max(float(second.norm()), 1e-12)


def _tensor_table(here: Mapping[str, Any], there: Mapping[str, Any], other: Mapping[str, Any]) -> ResultTable:
    rows = tuple(
        (
            name,
            "x".join(map(str, one.shape)),
            float(here[name].detach().float().std()),
            float(there[name].float().std()),
            _relative(here[name], one),
        )
        for name, one in list(other.items())[:20]
        if one.numel() > 1
    )
    return ResultTable(
        title="Tensors that differ",
        columns=("tensor", "shape", "std", "std in the checkpoint", "difference"),
        rows=rows,
    )


def _metrics(scene: Scene) -> tuple[Mapping[str, float], Mapping[str, Any]]:
    """What the run's validation measured at this checkpoint, and with which rows."""
    recorded = scene.subject.description.get("validation", {})
    if not isinstance(recorded, Mapping):
        return {}, {}
    metrics = recorded.get("metrics", {})
    good = (
        {k: float(v) for k, v in metrics.items() if isinstance(v, int | float)} if isinstance(metrics, Mapping) else {}
    )
    return good, recorded


def _validated_table(scene: Scene) -> ResultTable:
    metrics, _ = _metrics(scene)
    return ResultTable(
        title="What the run's validation measured",
        columns=("metric", "value"),
        rows=tuple((name, value) for name, value in metrics.items()),
    )


def _average_is_better(scene: Scene) -> str:
    metrics, _ = _metrics(scene)
    for name in ("val_action_mse", "val_loss"):
        live, average = metrics.get(name), metrics.get(f"ema_{name}")
        if live is None or average is None or scene.subject.ema:
            continue
        if average < (1 - EMA_GAIN) * live:
            return (
                f"the weights are the live ones, and the run's averaged weights (EMA) are better: {name} "
                f"{average:.3g}, not {live:.3g}"
            )
        return ""
    return ""


def _worse_than_validated(scene: Scene) -> str:
    """How much larger the error is than what the run's validation measured, in words."""
    metrics, _ = _metrics(scene)
    validated = metrics.get(("ema_" if scene.subject.ema else "") + "val_action_mse")
    acted = scene.on_held_out
    if validated is None or acted is None or not validated > 0:
        return ""
    squared = np.square(acted.predicted - acted.recorded).mean(-1)
    per_row = (squared * acted.within).sum(1) / np.maximum(acted.within.sum(1), 1)
    low = _lower(per_row, acted)
    now = float(per_row.mean())
    if now < WORSE * validated or low < 1.2 * validated or _statistics_differ(scene):
        return ""
    return f"the mean squared error of its actions on held-out rows is {now:.3g}, the run measured {validated:.3g}"


def _statistics_differ(scene: Scene) -> bool:
    """Whether the folder's statistics were changed, which raises the error as well."""
    used = _run_statistics(scene)
    normalize = scene.policy.pipeline.normalize
    changed = bool(_changed_files(scene, only="norm_stats"))
    return changed or (used is not None and normalize is not None and _differ(normalize, used))


def _lower(values: Vectors, acted: Acted) -> float:
    """The lower end of the interval of a mean, from resampling episodes."""
    numbers, group = np.unique(acted.episodes, return_inverse=True)
    sums, counts = np.bincount(group, values), np.bincount(group)
    draws = np.random.Generator(np.random.Philox(key=0)).multinomial(
        len(numbers), np.full(len(numbers), 1 / len(numbers)), 500
    )
    return float(np.quantile((draws @ sums) / np.maximum(draws @ counts, 1), 0.01))


def _at_initial_values(scene: Scene) -> str:
    """Parameters that have exactly the values they were initialised with, in words; empty if there are none."""
    seed = _metrics(scene)[1].get("seed", scene.seed)
    from rlinf_core.training.state.build import initial_value

    module, config = scene.policy.module, scene.policy.config
    if config.weights not in ("", "random") and not scene.subject.exported:
        return ""
    total, same, names = 0, 0, []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad or parameter.ndim < 2:
            continue
        try:
            value = initial_value(config, module, int(seed), name, tuple(parameter.shape))
        except Exception:  # A policy may need pretrained weights: its initial values mean nothing.
            return ""
        total += 1
        if float(value.float().std()) > 0 and _relative(parameter.detach(), value) < 1e-6:
            same += 1
            names.append(name)
    if same < FEW_INITIAL * total:  # The loss may not depend on a few of them.
        return ""
    return f"{same} of {total} matrices still have their initial values, for example {names[0]}"


def _flips(scene: Scene, wide: Rows) -> Iterator[str]:
    """Quaternions in the state that change their sign from one row to the next."""
    if wide.state is None or wide.after is None:
        return
    known = ~np.isnan(wide.after).any(1)
    before, after = wide.state[known], wide.after[known]
    for start in range(wide.state.shape[1] - 3):
        q, p = before[:, start : start + 4], after[:, start : start + 4]
        if len(q) and np.abs(np.linalg.norm(q, axis=1) - 1).max() < 0.02:
            share = float(((q * p).sum(1) < 0).mean())
            if share > 0.001:
                named = Named("state", scene.names.get("state", ()), wide.state.shape[1])
                yield (
                    f"the quaternion {named(list(range(start, start + 4)))} changes its sign between neighbouring rows "
                    f"in {share:.1%} of the training rows: q and -q are the same rotation, and the policy cannot know"
                )


def _acts_after(scene: Scene) -> str:
    """Whether the state changes before the action that should cause it, in words."""
    stand_in = scene.stand_in
    if stand_in.state is None or stand_in.after is None:
        return ""
    change = stand_in.after - stand_in.state
    fits: dict[int, float] = {}
    for lag in (-2, -1, 0, 1, 2):
        places = np.arange(len(stand_in)) + lag
        inside = (places >= 0) & (places < len(stand_in))
        inside[inside] &= stand_in.runs[places[inside]] == stand_in.runs[inside]
        inside &= ~np.isnan(change).any(1)
        fits[lag] = _explained(stand_in.actions[places[inside], 0], change[inside])
    best = max(fits, key=lambda lag: fits[lag])
    if best > 0 and fits[best] > fits[0] + 0.2 and fits[0] < 0.5:
        return (
            f"the state changes {best} step{'s' * (best > 1)} before the action that predicts the change: observations "
            f"and actions of the training data are not of the same time (explained variance {fits[best]:.2f}, at the "
            f"same time {fits[0]:.2f})"
        )
    return ""


def _explained(x: Vectors, y: Vectors) -> float:
    """The share of the variance of y that a linear function of x explains, over its numbers that vary."""
    if len(x) < 3 * (x.shape[1] + 1):
        return 0.0
    x = np.concatenate([np.ones((len(x), 1)), (x - x.mean(0)) / np.maximum(x.std(0), 1e-9)], 1)
    y = (y - y.mean(0)) / np.maximum(y.std(0), 1e-12)
    left = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
    return float(1 - np.median(np.square(left).mean(0)))
