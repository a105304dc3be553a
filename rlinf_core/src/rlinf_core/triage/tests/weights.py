"""The test of the weights: those of an exported folder beside those of its run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from rlinf_core.contract.triage import TriageOutcome, TriageTest
from rlinf_core.errors import UserError
from rlinf_core.export import Choice, find_checkpoint, read_weights
from rlinf_core.results import ResultTable
from rlinf_core.triage.mistakes.rows import Vectors
from rlinf_core.triage.scene import Acted, Scene
from rlinf_core.triage.tests.statistics import with_own_statistics

BF16 = 0.01
"""Relative difference of weights that rounding to bf16 explains."""
EMA_GAIN = 0.05
"""The averaged weights are better if their validated error is lower by this share."""
ROUNDED = 0.99
"""Share of the weights that have no more digits than bfloat16 has, if they were trained or saved in it."""
FEW_INITIAL = 0.1
"""Share of the matrices that may have their initial values: those that the loss does not depend on."""
WORSE = 1.5
"""A folder whose error is this many times what its run measured is not what was validated."""


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
        changed = scene.subject.changed_files("safetensors")
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
        if rounded := _rounded(scene):
            return TriageOutcome(
                "suspicious" if subject.exported else "cause",
                rounded,
                "Keep float32 weights while training, and round copies only: updates below 0.4 % of a weight are lost",
                strength=0.5,
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


def _compare_with_run(scene: Scene) -> TriageOutcome | None:
    """A cause if the folder's tensors are not those of its run's checkpoint; None if they are, or it is not here."""
    subject = scene.subject
    if not subject.exported or subject.run is None or subject.step is None:
        return None
    from rlinf_core.config.load import load_saved_config
    from rlinf_core.training.checkpoint.state import read_position

    try:
        run = load_saved_config(subject.run, scene.plugins)
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


def _rounded(scene: Scene) -> str:
    """Whether weights that should be float32 all are numbers of bfloat16, in words."""
    if scene.subject.exported and scene.subject.description.get("dtype") == "bf16":
        return ""
    same, total = 0, 0
    for parameter in scene.policy.module.parameters():
        if parameter.requires_grad and parameter.ndim > 1 and parameter.element_size() == 4:
            same += int((parameter == parameter.bfloat16()).sum())
            total += parameter.numel()
    if not total or same < ROUNDED * total:
        return ""
    return f"{same / total:.0%} of the trained weights are numbers of bfloat16: they were trained, or saved, in it"


def _metrics(scene: Scene) -> Mapping[str, float]:
    """What the run's validation measured at this checkpoint."""
    recorded = scene.subject.description.get("validation", {})
    metrics = recorded.get("metrics", {}) if isinstance(recorded, Mapping) else {}
    if not isinstance(metrics, Mapping):
        return {}
    return {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}


def _validated_table(scene: Scene) -> ResultTable:
    metrics = _metrics(scene)
    return ResultTable(
        title="What the run's validation measured",
        columns=("metric", "value"),
        rows=tuple((name, value) for name, value in metrics.items()),
    )


def _average_is_better(scene: Scene) -> str:
    metrics = _metrics(scene)
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
    metrics = _metrics(scene)
    validated = metrics.get(("ema_" if scene.subject.ema else "") + "val_action_mse")
    acted = scene.on_held_out
    if validated is None or acted is None or not validated > 0:
        return ""
    errors = _squared(acted)
    if (pipeline := with_own_statistics(scene)) is not None and scene.held_out is not None:
        # Wrong statistics raise the error as well: the weights are worse only if they are with the data's own, too.
        rows = scene.spread_rows(scene.held_out)
        errors = min(errors, _squared(scene.act(scene.held_out, rows, pipeline=pipeline)), key=lambda one: one.mean())
    now, low = float(errors.mean()), _lower(errors, acted)
    if now < WORSE * validated or low < 1.2 * validated:
        return ""
    return f"the mean squared error of its actions on held-out rows is {now:.3g}, the run measured {validated:.3g}"


def _squared(acted: Acted) -> Vectors:
    """[N], mean squared errors in the data's units."""
    squared = np.square(acted.predicted - acted.recorded).mean(-1)
    return np.asarray((squared * acted.within).sum(1) / np.maximum(acted.within.sum(1), 1))


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
    from rlinf_core.training.state.build import initial_value

    module, config = scene.policy.module, scene.policy.config
    if config.weights not in ("", "random") and not scene.subject.exported:
        return ""
    total, same, names = 0, 0, []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad or parameter.ndim < 2:
            continue
        try:
            value = initial_value(config, module, scene.seed, name, tuple(parameter.shape))
        except Exception:  # A policy may need pretrained weights: its initial values mean nothing.
            return ""
        total += 1
        if float(value.float().std()) > 0 and _relative(parameter.detach(), value) < 1e-6:
            same += 1
            names.append(name)
    if same < FEW_INITIAL * total:  # The loss may not depend on a few of them.
        return ""
    return f"{same} of {total} matrices still have their initial values, for example {names[0]}"
