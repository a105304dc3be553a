"""Tests of the site: do cameras, state, actions, timing and prompts look as they did in training?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from rlinf_core.contract.triage import Outcome, TriageTest
from rlinf_core.results import ResultTable
from rlinf_core.triage.corrections import Correction
from rlinf_core.triage.image_mistakes import image_corrections, stuck_cameras
from rlinf_core.triage.pictures import camera_images
from rlinf_core.triage.rows import Rows, spread
from rlinf_core.triage.scene import Scene
from rlinf_core.triage.search import Search, search
from rlinf_core.triage.vector_mistakes import Named, action_corrections, state_corrections

FAR = 6.0
"""Standard deviations from training beyond which rows without an explanation are suspicious."""
LEAST = 1.15
"""... and this many times the usual cost."""
LAGS = (-3, -2, -1, 1, 2, 3)


class CameraTest(TriageTest):
    """Images of the site under flips, rotations, channel orders, swaps, crops and brightness."""

    name = "cameras"
    question = "Do the cameras show at the site what they showed in training?"
    needs_site: ClassVar[bool] = True

    def run(self, scene: Scene) -> Outcome:
        """Compare the images."""
        site, reference = scene.at_site, scene.likeness.reference
        if not reference.images:
            return Outcome("skipped", "the policy has no cameras")
        if stuck := list(stuck_cameras(site, reference)):
            return Outcome(
                "cause",
                " and ".join(text for _, text in stuck),
                "Give the policy images of all cameras that it was trained with, uint8 from 0 to 255",
                strength=1.0,
                images=camera_images(reference, site, None),
            )
        found = search(scene.comparison, image_corrections(reference, site))
        return _judged(scene, found, "images look as in training", "images", camera=True)


class StateTest(TriageTest):
    """The state under signs, units, orders and forms of rotations."""

    name = "state"
    question = "Are the numbers of the state at the site those of training?"
    needs_site: ClassVar[bool] = True

    def run(self, scene: Scene) -> Outcome:
        """Compare the states."""
        likeness, site = scene.likeness, scene.comparison.site
        if likeness.state is None or site.state is None:
            return Outcome("skipped", "the data have no state")
        named = Named("state", scene.names.get("state", ()), site.state.shape[1])
        found = search(scene.comparison, state_corrections(named, likeness.state, site, likeness.reference))
        return _judged(scene, found, "states look as in training", "states")


class ActionTest(TriageTest):
    """Recorded actions of the site under signs, units, orders, gripper ranges, and as positions or displacements."""

    name = "actions"
    question = "Do actions at the site mean what they meant in training?"
    needs_site: ClassVar[bool] = True

    def run(self, scene: Scene) -> Outcome:
        """Compare the actions."""
        likeness, site = scene.likeness, scene.comparison.site
        named = Named("action", scene.names.get("actions", ()), site.actions.shape[2])
        found = search(scene.comparison, action_corrections(named, likeness.action, site, likeness.reference))
        return _judged(scene, found, "actions look as in training", "actions")


class TimingTest(TriageTest):
    """Whether observations are late, and whether the site has the rate of training."""

    name = "timing"
    question = "Do observations and actions belong together, at the rate of training?"
    needs_site: ClassVar[bool] = True

    def run(self, scene: Scene) -> Outcome:
        """Compare lags, and how fast the state changes."""
        if outcome := _recorded_rate(scene):
            return outcome
        found = search(scene.comparison, _lags(scene), steps=1)
        late = _judged(scene, found, "observations and actions are of the same time", "rows")
        if late.verdict == "cause":
            return late
        return _speed(scene) or late


class PromptTest(TriageTest):
    """Prompts against those of training, and against what the images show."""

    name = "prompts"
    question = "Does the policy get the prompts that it was trained on?"
    needs_site: ClassVar[bool] = True

    def run(self, scene: Scene) -> Outcome:
        """Compare the prompts."""
        assert scene.site is not None
        trained = Counter(scene.wide.prompts)
        at = spread(len(scene.site), 400).tolist()
        pipeline = scene.pipeline
        here = Counter(str(pipeline.target(row).get("prompt", "")) for row in scene.site.without_images(at))
        table = ResultTable(
            title="Prompts",
            columns=("prompt", "share at the site", "share in training"),
            rows=tuple(
                (prompt or "(empty)", here[prompt] / here.total(), trained[prompt] / trained.total())
                for prompt, _ in (here | trained).most_common(24)
            ),
        )
        empty = sum(count for prompt, count in here.items() if not prompt.strip())
        if empty and all(prompt.strip() for prompt in trained):
            return Outcome(
                "cause",
                f"the prompt is empty in {empty / here.total():.0%} of the site's rows, and never was in training",
                f"Give the policy the task in words, for example {trained.most_common(1)[0][0]!r}",
                strength=empty / here.total(),
                tables=[table],
            )
        if wrong := _prompts_of_other_tasks(scene, table):
            return wrong
        unknown = [prompt for prompt in here if prompt not in trained]
        if unknown and len(trained) <= 200:
            share = sum(here[prompt] for prompt in unknown) / here.total()
            example = max(unknown, key=lambda prompt: here[prompt])
            return Outcome(
                "suspicious",
                f"{share:.0%} of the site's rows have a prompt that training never had, for example {example!r}",
                f"Use the words of training: {_nearest(example, trained)!r}",
                strength=share,
                tables=[table],
            )
        return Outcome("fine", f"all {len(here)} prompts of the site were trained", tables=[table])


def _judged(scene: Scene, found: Search, fine: str, what: str, *, camera: bool = False) -> Outcome:
    """The outcome of a search; a correction that explains the difference is kept for later tests."""
    table = _search_table(found)
    numbers = f"distance to training {found.before:.3g}, training's own {found.usual:.3g}"
    reference, site = scene.likeness.reference, scene.comparison.site
    if found.best is not None:
        images = camera_images(reference, site, found.best) if found.best.images else {}
        gain, effect = _effect(scene, found.best)
        scene.correction = scene.correction.then(found.best) if scene.correction.complexity else found.best
        doing = found.best.doing
        left = next((one.cost for one in found.tried if one.correction is found.best), found.usual)
        sentence = f"{found.best.mistake}: {doing} lowers the distance to training from {found.before:.3g} to {left:.3g}"
        return Outcome(
            "cause", sentence + gain, found.best.way_out, strength=found.explained, images=images,
            tables=[table, *effect],
        )
    if found.unlike > FAR and found.before > LEAST * found.usual:
        return Outcome(
            "suspicious",
            f"{what} are unlike those of training ({numbers}), and no known mistake explains it",
            "Look at the images and numbers of both on this page; other scenes or robots need data of their own",
            strength=min(1.0, found.unlike / 100),
            images=camera_images(reference, site, None) if camera else {},
            tables=[table],
        )
    return Outcome("fine", f"{fine} ({numbers})", tables=[table])


def _effect(scene: Scene, correction: Correction) -> tuple[str, list[ResultTable]]:
    """What a correction does to the error of the policy's actions at the site, in words and as a table."""
    assert scene.site is not None
    whole = scene.correction.then(correction)
    rows = scene.spread_rows(scene.site)
    before = scene.act(scene.site, rows, scene.correction)
    after = scene.act(scene.site, rows, whole)
    scale = scene.action_spread
    numbers = float(np.sqrt(before.errors(scale).mean())), float(np.sqrt(after.errors(scale).mean()))
    table = ResultTable(
        title="Error of the policy's actions at the site, in standard deviations of training",
        columns=("", "RMSE"),
        rows=(("as it is", numbers[0]), (correction.doing, numbers[1])),
    )
    if numbers[1] < 0.97 * numbers[0]:
        return f", and the action error from {numbers[0]:.2f} to {numbers[1]:.2f}", [table]
    return "", [table]


def _search_table(found: Search) -> ResultTable:
    rows = tuple((one.correction.doing, one.cost, one.gain, one.by_chance) for one in found.tried[:6])
    return ResultTable(
        title="What would make the rows look more like training",
        columns=("correction", "distance", "gain", "gain on training rows"),
        rows=(("none", found.before, 0.0, 0.0), *rows),
        note=f"Training rows have a distance of {found.usual:.3g}; a gain must exceed {max(found.bar, 0):.2g}, the "
        "largest by chance.",
    )


def _lags(scene: Scene) -> Iterator[Correction]:
    for lag in LAGS:
        steps = f"{abs(lag)} step{'s' * (abs(lag) > 1)}"
        late = "late" if lag > 0 else "early"
        way_out = "Pair each observation with the action that was taken on it: stamp both with the time of capture"
        for what, image_lag, state_lag in (("observations", lag, lag), ("images", lag, 0), ("the state", 0, lag)):
            if state_lag and scene.at_site.state is None:
                continue
            yield Correction(
                mistake=f"{what} {'is' if what == 'the state' else 'are'} {steps} {late}",
                doing=f"using {what} of {steps} {'later' if lag > 0 else 'before'}",
                way_out=way_out,
                image_lag=image_lag,
                state_lag=state_lag,
                complexity=0.8 + 0.2 * abs(lag) + 0.2 * (what != "observations"),
            )


def _recorded_rate(scene: Scene) -> Outcome | None:
    """A cause if site and training have other rates by their own metadata, or as the robot was said to run."""
    trained, here = scene.step_seconds(scene.training), scene.step_seconds(scene.site)
    if scene.execution.rate:
        here = 1 / scene.execution.rate
    if not trained or not here or abs(here / trained - 1) < 0.05:
        return None
    return Outcome(
        "cause",
        f"the site runs at {1 / here:.4g} actions per second, training at {1 / trained:.4g}: every motion is "
        f"{max(here / trained, trained / here):.3g} times as {'slow' if here > trained else 'fast'}",
        f"Run the robot at {1 / trained:.4g} Hz, or train with another data.stride",
        strength=min(1.0, abs(float(np.log2(here / trained)))),
    )


def _speed(scene: Scene) -> Outcome | None:
    """A cause if the state changes faster or slower per step by a common factor, though its range is that of training."""
    assert scene.site is not None
    wide, at = scene.wide, spread(len(scene.site), 1500)
    from rlinf_core.triage.rows import read

    here = scene.correction.apply(read(scene.site, scene.pipeline, at, images=False)) if not scene.correction.image_lag \
        and not scene.correction.state_lag else read(scene.site, scene.pipeline, at, images=False)
    speeds = [_speeds(rows) for rows in (here, wide)]
    if speeds[0] is None or speeds[1] is None or wide.state is None or here.state is None:
        return None
    spreads = here.state.std(0) / np.maximum(wide.state.std(0), 1e-12)
    counted = (speeds[1] > 1e-9) & (speeds[0] > 1e-9) & (spreads > 0.6) & (spreads < 1.7)
    if not counted.any():
        return None
    ratios = speeds[0][counted] / speeds[1][counted]
    ratio = float(np.exp(np.median(np.log(ratios))))
    agree = np.abs(np.log(ratios / ratio)) < 0.25
    if agree.mean() < 0.6 or abs(np.log(ratio)) < np.log(1.35):
        return None
    way = "fast" if ratio > 1 else "slow"
    return Outcome(
        "cause" if abs(np.log(ratio)) > np.log(1.45) else "suspicious",
        f"the state changes {max(ratio, 1 / ratio):.2g} times as {way} per step as in training, over the same range: the "
        "control rate is another one, or frames were left out or repeated",
        "Run the robot and record at the rate of training, one action per frame",
        strength=min(1.0, abs(float(np.log2(ratio)))),
    )


def _speeds(rows: Rows) -> np.ndarray | None:
    """[D], the typical size of the state's change in a step."""
    if rows.state is None or rows.after is None:
        return None
    change = np.abs(rows.after - rows.state)
    change = change[~np.isnan(change).any(1)]
    return change.mean(0) if len(change) else None


def _prompts_of_other_tasks(scene: Scene, table: ResultTable) -> Outcome | None:
    """A cause if images, states and actions say that most prompts are those of other tasks."""
    comparison, likeness = scene.comparison, scene.likeness
    if len(set(likeness.reference.prompts)) < 2:
        return None
    guessed = _guessed_prompts(likeness.cost_matrix(comparison.stand_in, other_episodes=True), likeness.reference)
    known = _by_episode(comparison.stand_in, guessed)
    right = np.mean([own == guess for own, guess in known])
    found = _by_episode(comparison.site, _guessed_prompts(likeness.cost_matrix(comparison.site), likeness.reference))
    wrong = [(own, guess) for own, guess in found if own != guess]
    share = len(wrong) / len(found)
    if right < 0.75 or share < 0.5 or share < 3 * (1 - right):
        return None
    changes = Counter(wrong)
    mapping: dict[str, str] = {}
    for (own, guess), _ in changes.most_common():
        mapping.setdefault(own, guess)
    (own, guess), count = changes.most_common(1)[0]
    correction = Correction(mistake="prompts are of other tasks", doing="using the prompts that fit", prompts=mapping)
    gain, effect = _effect(scene, correction)
    trained = own in set(likeness.reference.prompts)
    what = "the prompt of another task" if trained else "a prompt that was not trained"
    return Outcome(
        "cause",
        f"{share:.0%} of the site's episodes have {what}: with {own!r}, images and motions are those of {guess!r}" + (
            gain and f"; with the prompts that fit{gain.removeprefix(', and')} changes"
        ),
        f"Give the policy the prompt of its task: {guess!r}",
        strength=share * (1 if trained or gain else 0.5),
        tables=[table, *effect],
    )


def _guessed_prompts(costs: np.ndarray, reference: Rows) -> list[str]:
    """The prompt of the most similar training rows of each row: the vote of the nearest five."""
    nearest = np.argsort(costs, axis=1)[:, :5]
    return [Counter(reference.prompts[i] for i in row).most_common(1)[0][0] for row in nearest.tolist()]


def _by_episode(rows: Rows, guessed: list[str]) -> list[tuple[str, str]]:
    """Own and guessed prompt of each episode, by a vote of its rows."""
    found = []
    for episode in np.unique(rows.episodes):
        at = np.flatnonzero(rows.episodes == episode).tolist()
        own = Counter(rows.prompts[i] for i in at).most_common(1)[0][0]
        found.append((own, Counter(guessed[i] for i in at).most_common(1)[0][0]))
    return found


def _nearest(prompt: str, trained: Counter[str]) -> str:
    import difflib

    near = difflib.get_close_matches(prompt, trained.keys(), 1, 0.0)
    return near[0] if near else next(iter(trained))
