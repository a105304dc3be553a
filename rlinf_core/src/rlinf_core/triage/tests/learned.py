"""Tests of the policy on its own data: has it learned, do all ways to it agree, how long is a chunk good for?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from rlinf_core.contract.datasets import SampleSource
from rlinf_core.contract.triage import TriageOutcome, TriageTest
from rlinf_core.data.loading.sampling import validation_generator
from rlinf_core.data.pipeline import encode_observation
from rlinf_core.errors import UserError
from rlinf_core.evaluators.action_error import last_action
from rlinf_core.inference import LoadedPolicy
from rlinf_core.results import Cell, Estimate, ResultTable, cell_text
from rlinf_core.triage.mistakes.changes import Named
from rlinf_core.triage.mistakes.rows import Vectors
from rlinf_core.triage.scene import Acted, Scene

USELESS, POOR = 0.95, 0.8
"""Squared error relative to the better baseline: no better than it, and hardly better."""
UNLEARNED = 1.0
"""Squared error of a number of the action relative to that of its mean: it has not been learned."""
RESAMPLES = 1000
AGREE = 0.01
"""Differences of actions below this share of their spread are rounding."""
COMPARED = 8
"""Rows on which ways to the policy are compared."""
GROWS = 1.15
"""Looking again helps if the error without it is at least so many times as large."""
LOOKED = 160
"""Rows on which it is measured."""


class LearnedTest(TriageTest):
    """The action error on training and held-out rows beside two baselines that ignore the observation."""

    name = "learned"
    question = "Has the policy learned its own data?"

    def run(self, scene: Scene) -> TriageOutcome:
        """Compare with the baselines."""
        found = {"training rows": (scene.on_training, scene.trained)}
        if scene.on_held_out is not None and scene.held_out is not None:
            found["held-out rows"] = (scene.on_held_out, scene.held_out)
        relative = {name: _relative(scene, acted, source) for name, (acted, source) in found.items()}
        tables = [_error_table(scene, found, relative), _number_table(scene, scene.on_training), _unused(scene)]
        trained = relative["training rows"]
        if trained.value > USELESS:
            return TriageOutcome(
                "cause",
                "the policy is no better than always the mean action or repeating the last one, on its own training "
                f"rows: its squared error is {trained.value:.2f} times theirs",
                "Look at the other tests first; then train longer, or with another learning rate, until the loss falls",
                strength=1.0,
                symptom=True,
                tables=tables,
            )
        held_out = relative.get("held-out rows")
        if held_out is not None and held_out.low > USELESS and trained.value < 0.5:
            return TriageOutcome(
                "cause",
                f"the policy has memorised its episodes: its squared error relative to the better baseline is "
                f"{trained.value:.2f} on training rows and {held_out.value:.2f} on held-out ones",
                "Use more demonstrations, augmentation, weight decay or fewer steps",
                strength=0.8,
                symptom=True,
                tables=tables,
            )
        worst = max(relative.values(), key=lambda one: one.value)
        if worst.value > POOR:
            return TriageOutcome(
                "suspicious",
                f"the policy is hardly better than the baselines: its squared error is {worst.value:.2f} times theirs",
                "Train longer, or on more demonstrations",
                strength=worst.value - POOR,
                symptom=True,
                tables=tables,
            )
        if unlearned := _unlearned(scene):
            return replace(unlearned, tables=tables)
        text = " and ".join(f"{one.value:.2f} on {name}" for name, one in relative.items())
        return TriageOutcome(
            "fine", f"its squared action error is, relative to the better baseline, {text}", tables=tables
        )


def _relative(scene: Scene, acted: Acted, source: SampleSource) -> Estimate:
    """The squared error relative to that of the better baseline, with an interval over episodes."""
    scale = scene.action_spread
    errors = np.stack([acted.errors(scale), *_baselines(scene, acted, source)])
    numbers, group = np.unique(acted.episodes, return_inverse=True)
    sums = np.stack([np.bincount(group, one) for one in errors])
    generator = np.random.Generator(np.random.Philox(key=scene.seed))
    draws = generator.multinomial(len(numbers), np.full(len(numbers), 1 / len(numbers)), RESAMPLES)

    def relative(weights: Any) -> Any:
        policy, *others = (weights @ one for one in sums)
        return policy / np.maximum(np.minimum(*others), 1e-12)

    low, high = np.quantile(relative(draws), [0.025, 0.975])
    return Estimate(value=float(relative(np.ones(len(numbers)))), low=float(low), high=float(high))


def _baselines(scene: Scene, acted: Acted, source: SampleSource) -> tuple[Vectors, Vectors]:
    """[N] each, squared errors of the mean action and of the action before."""
    scale, mean = scene.action_spread, scene.baseline
    last = np.stack([last_action(source, scene.pipeline, int(i), mean) for i in acted.indices])
    repeated = replace(acted, predicted=np.broadcast_to(last[:, None], acted.recorded.shape))
    return acted.errors_of(mean, scale), repeated.errors(scale)


def _error_table(
    scene: Scene, found: Mapping[str, tuple[Acted, SampleSource]], relative: Mapping[str, Estimate]
) -> ResultTable:
    rows: list[tuple[Cell, ...]] = []
    for name, (acted, source) in found.items():
        errors = (acted.errors(scene.action_spread), *_baselines(scene, acted, source))
        rows.append((name, *(float(np.sqrt(one.mean())) for one in errors), relative[name], len(acted.indices)))
    return ResultTable(
        title="Error of sampled actions, in standard deviations of training",
        columns=("of", "RMSE", "mean action", "repeated action", "squared, relative to the better", "rows"),
        rows=tuple(rows),
    )


def _number_table(scene: Scene, acted: Acted) -> ResultTable:
    names = [*scene.names.get("actions", ()), *[""] * acted.recorded.shape[-1]]
    by_number = acted.by_number(scene.action_spread)
    guessed = replace(acted, predicted=np.broadcast_to(scene.baseline, acted.recorded.shape))
    mean = guessed.by_number(scene.action_spread)
    return ResultTable(
        title="Per number of the action, on training rows, in standard deviations",
        columns=("number", "RMSE", "mean action"),
        rows=tuple((f"{i} {names[i]}".strip(), float(one), float(mean[i])) for i, one in enumerate(by_number)),
    )


def _unlearned(scene: Scene) -> TriageOutcome | None:
    """A suspicion if numbers of the action vary, and the policy knows them no better than their mean."""
    acted, varies = scene.on_training, np.ptp(scene.wide.actions[:, 0], axis=0) > 1e-6
    guessed = replace(acted, predicted=np.broadcast_to(scene.baseline, acted.recorded.shape))
    own, mean = (np.square(one.by_number(scene.action_spread)) for one in (acted, guessed))
    # Noise of teleoperation is not learned either: only numbers that vary as much as others do count.
    found = varies & (own > UNLEARNED * mean) & (mean > 0.5)
    if not found.any() or found.all():
        return None
    named = Named("action", scene.names.get("actions", ()), len(scene.action_spread))(np.flatnonzero(found).tolist())
    return TriageOutcome(
        "suspicious",
        f"the policy has learned its actions, but not {named}: there it is no better than always the mean, on its own "
        "training rows",
        "Look at these numbers in the data: a command that follows what no camera or state shows, that comes late, or "
        "that is too rare, as a gripper's, cannot be learned",
        strength=0.4,
    )


def _unused(scene: Scene) -> ResultTable:
    """What the error becomes if an input is that of another row: inputs that do not change it are not used."""
    rows: list[tuple[Cell, ...]] = [("as it is", float(np.sqrt(scene.on_training.errors(scene.action_spread).mean())))]
    indices = scene.spread_rows(scene.trained)
    for what in ("images", "state", "prompt"):
        try:
            acted = _act_with_other(scene, indices, what)
        except UserError:
            continue
        if acted is not None:
            rows.append((f"{what} of another row", float(np.sqrt(acted.errors(scene.action_spread).mean()))))
    return ResultTable(
        title="What the policy uses: its error if an input is that of another row",
        columns=("", "RMSE"),
        rows=tuple(rows),
    )


def _act_with_other(scene: Scene, indices: list[int], what: str) -> Acted | None:
    """Actions on training rows whose images, state or prompt are those of a row of another episode."""
    half = len(indices) // 2
    source = _Exchanged(
        scene.trained, scene.pipeline, what, dict(zip(indices, np.roll(indices, half).tolist(), strict=True))
    )
    sample = scene.pipeline.target(scene.trained.without_images(indices[:1])[0])
    if what != "images" and what not in sample:
        return None
    if what == "images" and not scene.likeness.reference.images:
        return None
    return scene.act(source, indices, pipeline=replace(scene.pipeline, repack=source))  # type: ignore[arg-type]


class _Exchanged:
    """Rows and their repacking: one input is that of another row."""

    def __init__(self, source: SampleSource, pipeline: Any, what: str, others: Mapping[int, int]) -> None:
        self._source, self._pipeline, self._what, self._others = source, pipeline, what, others

    @property
    def episodes(self) -> Any:
        return self._source.episodes

    def __len__(self) -> int:
        return len(self._source)

    def __getitems__(self, indices: list[int]) -> list[Any]:
        own = self._source.__getitems__(indices)
        other = self._source.__getitems__([self._others[i] for i in indices])
        return [{"own": a, "other": b} for a, b in zip(own, other, strict=True)]

    def describe(self, index: int) -> str:
        return self._source.describe(index)

    def __call__(self, row: Any) -> Any:
        if "own" not in row:
            return row
        own, other = (dict(self._pipeline.target(row[key])) for key in ("own", "other"))
        return {**own, self._what: other[self._what]}

    def inverse(self, sample: Any) -> Any:
        return sample


class PathsTest(TriageTest):
    """The same rows through training's path, through `infer`, and through the run that a folder was exported from."""

    name = "paths"
    question = "Do training, load_policy and the run compute the same actions?"

    def run(self, scene: Scene) -> TriageOutcome:
        """Compare actions on the same rows with the same noise."""
        rows = scene.spread_rows(scene.trained, COMPARED)
        trained = scene.act(scene.trained, rows)
        try:
            inferred = _infer(scene, rows)
        except UserError as error:
            return TriageOutcome(
                "cause",
                f"a training row is refused as an observation: {error}",
                "Correct what the message names; the robot's observations would be refused as well",
                strength=0.9,
            )
        apart = float(np.abs((inferred - trained.predicted) / scene.action_spread).max())
        if apart > AGREE:
            where = _parted(scene, rows)
            return TriageOutcome(
                "cause",
                f"an observation gives other actions than the training row that it is, by up to {apart:.2g} standard "
                f"deviations: {where}",
                "A transform of the dataset or the policy depends on columns that only training rows have",
                strength=0.7,
                symptom=True,
            )
        return self._beside_run(scene, rows, trained) or TriageOutcome(
            "fine", f"training's path and infer agree to {apart:.1g} standard deviations of the actions"
        )

    def _beside_run(self, scene: Scene, rows: list[int], trained: Acted) -> TriageOutcome | None:
        subject = scene.subject
        if not subject.exported or subject.run is None:
            return None
        from rlinf_core.export import Choice
        from rlinf_core.inference import load_run

        try:
            policy, _, _ = load_run(
                subject.run,
                Choice(subject.step, ema=subject.ema),
                device=scene.policy.device,
                dtype="fp32",
                plugins=scene.plugins,
            )
        except UserError:
            return None
        other = scene.act(scene.trained, rows, pipeline=policy.pipeline, policy=policy)
        apart = float(np.abs((other.predicted - trained.predicted) / scene.action_spread).max())
        tolerance = 0.2 if scene.subject.description.get("dtype") == "bf16" else 2 * AGREE
        if apart < tolerance:
            return TriageOutcome(
                "fine", f"run, folder and infer agree to {apart:.1g} standard deviations of the actions"
            )
        return TriageOutcome(
            "cause",
            f"the folder acts differently from the run that it is from, by up to {apart:.2g} standard deviations: "
            f"{_compared(scene, scene.pipeline, policy, rows)}",
            "Export the run again",
            strength=0.6,
            symptom=True,
        )


def _infer(scene: Scene, rows: list[int]) -> Vectors:
    """[N, H, D], what `LoadedPolicy.infer` answers for rows, with the noise of the validation."""
    policy = scene.policy
    found = []
    quiet = replace(policy.pipeline, dataset=scene.pipeline.dataset)
    bare = LoadedPolicy(policy.config, policy.data, quiet, policy.module)
    for index, row in zip(rows, scene.trained.__getitems__(rows), strict=True):
        observation = {key: value for key, value in row.items() if key not in getattr(policy.data, "actions", ())}
        noise = policy.config.draw(validation_generator(scene.seed, index))["noise"]
        found.append(bare.infer(observation, noise))
    return np.stack(found)


def _parted(scene: Scene, rows: list[int]) -> str:
    """Where an observation and its training row part, in words."""
    row = scene.trained.__getitems__(rows[:1])[0]
    trained = scene.pipeline.encode(row)
    seen = encode_observation(scene.pipeline, scene.policy.data, row)
    different = [key for key in trained if key not in ("actions", "actions_is_pad") and not _equal(trained, seen, key)]
    return f"they are encoded differently in {', '.join(different)}" if different else "they are encoded alike"


def _compared(scene: Scene, pipeline: Any, policy: LoadedPolicy, rows: list[int]) -> str:
    row = scene.trained.__getitems__(rows[:1])[0]
    here, there = pipeline.encode(row), policy.pipeline.encode(row)
    different = [key for key in there if not _equal(here, there, key)]
    return f"they encode a row differently in {', '.join(different)}" if different else "their weights differ"


def _equal(a: Any, b: Any, key: str) -> bool:
    if key not in b:
        return False
    first, second = a[key], b[key]
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_equal(first, second, inner) for inner in first)
    if isinstance(first, np.ndarray) and first.dtype.kind == "f":
        return first.shape == second.shape and bool(np.allclose(first, second, atol=1e-4))
    return bool(np.array_equal(first, second))


class ExecutionTest(TriageTest):
    """Whether looking again would help: each action late in a chunk beside the first of the chunk that begins there."""

    name = "execution"
    question = "How many actions of a chunk may be executed?"

    def run(self, scene: Scene) -> TriageOutcome:
        """Compare the steps of the chunk."""
        steps, executed = scene.policy.config.chunk_length(), scene.execution.steps
        if executed is not None and executed > steps:
            raise UserError(f"a chunk has {steps} actions: {executed} of them cannot be executed")
        source = scene.held_out or scene.trained
        looked = {step: _looking_again(scene, source, step) for step in _steps_to_compare(steps, executed)}
        good = max([1, *(step for step, ratio in looked.items() if ratio.low <= 1 or ratio.value < GROWS)])
        seconds = scene.step_seconds(scene.training)
        advice = f"execute up to {good} of {steps} actions" + (f" ({good * seconds:.2g} s)" if seconds else "")
        table = ResultTable(
            title="Squared error of an action of the chunk, relative to that of looking again just before it",
            columns=("action of the chunk", "relative error"),
            rows=tuple(looked.items()),
            note=f"In parentheses: 95 % intervals from resampling episodes. Above {GROWS:g}, looking again would help.",
        )
        ratio = looked.get(executed or 0)
        if executed is None or ratio is None or (ratio.low <= 1 or ratio.value < GROWS):
            text = f"the {executed} executed actions of a chunk are all good" if executed else advice
            return TriageOutcome("fine", text, tables=[table])
        return TriageOutcome(
            "cause",
            f"{executed} actions of a chunk are executed before the policy looks again, and the squared error of the "
            f"last is {cell_text(ratio)} times what it would be after looking again",
            advice[0].upper() + advice[1:] + " before the policy looks again",
            strength=float(np.clip(1 - 1 / ratio.value, 0, 1)),
            tables=[table],
        )


def _steps_to_compare(steps: int, executed: int | None) -> list[int]:
    """A few numbers of executed actions, from 2."""
    found = {2, steps // 4, steps // 2, 3 * steps // 4, steps, executed or 2}
    return sorted(step for step in found if 2 <= step <= steps)


def _looking_again(scene: Scene, source: SampleSource, step: int) -> Estimate:
    """The squared error of the step-th action of a chunk relative to that of looking again just before it.

    Raises:
        UserError: No episode is so long.
    """
    episodes, lag = source.episodes, step - 1
    rows = [i for i in scene.spread_rows(source, LOOKED) if i + lag < len(source) and episodes[i] == episodes[i + lag]]
    if len(rows) < COMPARED:
        raise UserError(f"too few episodes are {step} actions long to compare the actions of a chunk")
    blind, looking = scene.act(source, rows), scene.act(source, [i + lag for i in rows])
    errors = [
        np.square((acted.predicted[:, at] - acted.recorded[:, at]) / scene.action_spread).mean(-1)
        for acted, at in ((blind, lag), (looking, 0))
    ]
    numbers, group = np.unique(blind.episodes, return_inverse=True)
    sums = [np.bincount(group, one) for one in errors]
    draws = np.random.Generator(np.random.Philox(key=scene.seed)).multinomial(
        len(numbers), np.full(len(numbers), 1 / len(numbers)), RESAMPLES
    )
    low, high = np.quantile((draws @ sums[0]) / np.maximum(draws @ sums[1], 1e-12), [0.025, 0.975])
    return Estimate(value=float(sums[0].sum() / max(sums[1].sum(), 1e-12)), low=float(low), high=float(high))
