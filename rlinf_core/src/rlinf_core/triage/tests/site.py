"""Tests of the site: do cameras, state, actions, timing and prompts look as they did in training?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from rlinf_core.contract.triage import TriageOutcome, TriageTest
from rlinf_core.results import ResultTable
from rlinf_core.triage.mistakes.changes import Named
from rlinf_core.triage.mistakes.corrections import Correction
from rlinf_core.triage.mistakes.rows import Rows, Vectors, read, spread
from rlinf_core.triage.mistakes.search import Explanation
from rlinf_core.triage.mistakes.stuck import still_numbers, stuck_cameras
from rlinf_core.triage.pictures import camera_images
from rlinf_core.triage.scene import Scene
from rlinf_core.triage.tests.prompts import other_tasks

FAR = 6.0
"""Standard deviations from training beyond which rows without an explanation are suspicious."""


OFTEN = 0.2
"""Share of rows with a wrong prompt that is a cause."""


class CameraTest(TriageTest):
    """Images of the site under flips, rotations, channel orders, swaps, crops and brightness."""

    name = "cameras"
    question = "Do the cameras show at the site what they showed in training?"
    needs_site: ClassVar[bool] = True

    def run(self, scene: Scene) -> TriageOutcome:
        """Compare the images."""
        site, reference = scene.at_site, scene.likeness.reference
        if not reference.images:
            return TriageOutcome("skipped", "the policy has no cameras")
        if stuck := list(stuck_cameras(site, reference, scene.stand_in)):
            return TriageOutcome(
                "cause",
                " and ".join(text for _, text, _ in stuck),
                "Give the policy current images of all cameras that it was trained with: RGB, uint8 from 0 to 255",
                strength=max(share for *_, share in stuck),
                images=camera_images(reference, site, None),
            )
        return _judged(scene, "cameras", "images", "image ")


class StateTest(TriageTest):
    """The state under signs, units, orders and forms of rotations."""

    name = "state"
    question = "Are the numbers of the state at the site those of training?"
    needs_site: ClassVar[bool] = True

    def run(self, scene: Scene) -> TriageOutcome:
        """Compare the states."""
        if wrong := _other_width(scene, "state"):
            return wrong
        if scene.likeness.state is None or scene.at_site.state is None:
            return TriageOutcome("skipped", "the data have no state")
        if scene.wide.state is not None and (still := still_numbers(scene.at_site.state, scene.wide.state)):
            named = Named("state", scene.names.get("state", ()), scene.wide.state.shape[1])(still)
            value = ", ".join(f"{one + 0.0:.3g}" for one in scene.at_site.state[0, still][:4])
            return TriageOutcome(
                "cause",
                f"{named} never {'changes' if len(still) == 1 else 'change'} at the site ({value}), and "
                f"{'has' if len(still) == 1 else 'have'} other values in training",
                "Give the policy the current state: read it before each observation",
                strength=0.9,
            )
        return _judged(scene, "state", "states", "state")


class ActionTest(TriageTest):
    """Recorded actions of the site under signs, units, orders, gripper ranges, and as positions or displacements."""

    name = "actions"
    question = "Do actions at the site mean what they meant in training?"
    needs_site: ClassVar[bool] = True

    def run(self, scene: Scene) -> TriageOutcome:
        """Compare the actions."""
        if wrong := _other_width(scene, "actions"):
            return wrong
        return _judged(scene, "actions", "actions", "action")


class TimingTest(TriageTest):
    """Whether observations are late, and whether the site has the rate of training."""

    name = "timing"
    question = "Do observations and actions belong together, at the rate of training?"
    needs_site: ClassVar[bool] = True

    def run(self, scene: Scene) -> TriageOutcome:
        """Compare lags, and how fast the state changes."""
        if scene.simulator is not None and scene.simulator.rate_note:
            return TriageOutcome("cause", *_sentence_and_way_out(scene.simulator.rate_note), strength=1.0)
        if outcome := _recorded_rate(scene):
            return outcome
        if outcome := _speed(scene):
            return outcome
        return _judged(scene, "timing", "observations and actions", None)


class PromptTest(TriageTest):
    """Prompts against those of training, and against what the images show."""

    name = "prompts"
    question = "Does the policy get the prompts that it was trained on?"
    needs_site: ClassVar[bool] = True

    def run(self, scene: Scene) -> TriageOutcome:
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
            return TriageOutcome(
                "cause" if empty > OFTEN * here.total() else "suspicious",
                f"the prompt is empty in {empty / here.total():.0%} of the site's rows, and never was in training",
                f"Give the policy the task in words, for example {trained.most_common(1)[0][0]!r}",
                strength=empty / here.total(),
                tables=[table],
            )
        if wrong := other_tasks(scene, table):
            return wrong
        unknown = [prompt for prompt in here if prompt not in trained]
        if spelled := {one: known for one in unknown if (known := _spelled_otherwise(one, trained))}:
            share = sum(here[prompt] for prompt in spelled) / here.total()
            own, known = next(iter(spelled.items()))
            return TriageOutcome(
                "cause" if share > OFTEN else "suspicious",
                f"{share:.0%} of the site's rows have the prompt of training in another spelling: {own!r} where it was "
                f"{known!r}",
                f"Give the policy the exact words of training, case and punctuation too: {known!r}",
                strength=0.6 * share,
                tables=[table],
            )
        if unknown and len(trained) <= 200:
            share = sum(here[prompt] for prompt in unknown) / here.total()
            example = max(unknown, key=lambda prompt: here[prompt])
            return TriageOutcome(
                "suspicious",
                f"{share:.0%} of the site's rows have a prompt that training never had, for example {example!r}",
                f"Use the words of training: {_nearest(example, trained)!r}",
                strength=share,
                tables=[table],
            )
        return TriageOutcome("fine", f"all {len(here)} prompts of the site were trained", tables=[table])


def _other_width(scene: Scene, key: str) -> TriageOutcome | None:
    """A cause if the site has more or fewer numbers than training."""
    sources = [source for source in (scene.site, scene.trained) if source]
    rows: list[Mapping[str, Any]] = [scene.pipeline.target(source.without_images([0])[0]) for source in sources]
    here, there = (np.shape(row[key])[-1] if key in row else 0 for row in rows)
    if here == there:
        return None
    return TriageOutcome(
        "cause",
        f"{'the state' if key == 'state' else 'actions'} of the site {'has' if key == 'state' else 'have'} {here} "
        f"numbers, of training {there}",
        "Send exactly the numbers of the training data, in their order",
        strength=1.0,
    )


def _judged(scene: Scene, family: str, what: str, part: str | None) -> TriageOutcome:
    """What the explanation says about a family of corrections."""
    found = scene.explanation
    reference, site = scene.likeness.reference, scene.at_site
    steps = found.of(family)
    table = _search_table(found, family)
    if steps:
        first, last = steps[0].before, steps[-1].best.cost
        own = [step.best.correction for step in steps]
        together = own[0]
        for one in own[1:]:
            together = together.then(one)
        images = camera_images(reference, site, together) if together.images else {}
        gain, effect = _effect(scene, together)
        sentence = (
            f"{together.mistake}: {together.doing} lowers the distance to training from {first:.3g} to {last:.3g}"
        )
        explained = sum(step.before - step.best.cost for step in steps) / max(
            found.steps[0].before - min(found.usual, found.steps[-1].before), 1e-9
        )
        return TriageOutcome(
            "cause",
            sentence + gain,
            together.way_out,
            # The share of the whole difference: a second mistake explains less than the first.
            strength=float(np.clip(min(explained, steps[0].explained), 0, 1)),
            images=images,
            tables=[table, *effect],
        )
    parts = {name: far for name, far in found.left.items() if part is not None and name.startswith(part)}
    if parts and (far := max(parts.values())) > FAR:
        name = max(parts, key=lambda one: parts[one])
        named = f"images of camera {name.removeprefix('image ')!r}" if family == "cameras" else what
        return TriageOutcome(
            "suspicious",
            f"{named} are unlike those of training, by {far:.0f} standard deviations, and no known mistake explains it",
            "Look at the images and numbers of both on this page; other scenes or robots need data of their own",
            strength=min(1.0, far / 100),
            images=camera_images(reference, site, None) if family == "cameras" else {},
            tables=[table],
        )
    return TriageOutcome(
        "fine", f"{what} look as in training, and no known mistake makes them more alike", tables=[table]
    )


def _effect(scene: Scene, correction: Correction) -> tuple[str, list[ResultTable]]:
    """What a correction does to the error of the policy's actions at the site, in words and as a table."""
    assert scene.site is not None
    rows, scale = scene.spread_rows(scene.site), scene.action_spread
    before = float(np.sqrt(scene.on_site.errors(scale).mean()))
    after = float(np.sqrt(scene.act(scene.site, rows, correction).errors(scale).mean()))
    table = ResultTable(
        title="Error of the policy's actions at the site, in standard deviations of training",
        columns=("", "RMSE"),
        rows=(("as it is", before), (correction.doing, after)),
    )
    if after < 0.97 * before:
        return f", and the action error from {before:.2f} to {after:.2f}", [table]
    return "", [table]


def _search_table(found: Explanation, family: str) -> ResultTable:
    step = next((one for one in found.steps if one.family == family), found.steps[0])
    rows = tuple((one.correction.doing, one.cost, one.gain) for one in step.tried.get(family, ()))
    return ResultTable(
        title="What would make the rows look more like training",
        columns=("correction", "distance", "gain"),
        rows=(("none", step.before, 0.0), *rows),
        note=f"Training rows have a distance of {found.usual:.3g}. A gain must exceed {max(step.bar, 0):.2g}, the "
        "largest by chance.",
    )


def _sentence_and_way_out(text: str) -> tuple[str, str]:
    """A note in two parts: `what is wrong: what to do`."""
    sentence, _, way_out = text.rpartition(": ")
    return (sentence, way_out[:1].upper() + way_out[1:]) if sentence else (text, "")


def _recorded_rate(scene: Scene) -> TriageOutcome | None:
    """A cause if site and training have other rates by their own metadata, or as the robot was said to run."""
    trained, here = scene.step_seconds(scene.training), scene.step_seconds(scene.site)
    if scene.execution.rate:
        here = 1 / scene.execution.rate
    if not trained or not here or abs(here / trained - 1) < 0.05:
        return None
    return TriageOutcome(
        "cause",
        f"the site runs at {1 / here:.4g} actions per second, training at {1 / trained:.4g}: every motion is "
        f"{max(here / trained, trained / here):.3g} times as {'slow' if here > trained else 'fast'}",
        f"Run the robot at {1 / trained:.4g} Hz, or train with another data.stride",
        strength=min(1.0, abs(float(np.log2(here / trained)))),
    )


def _speed(scene: Scene) -> TriageOutcome | None:
    """A cause if the state changes faster or slower per step by a common factor, over the range of training.

    An operator may be slower, too: actions are then smaller, and what training predicts from them agrees with what
    happens. With another control rate, it does not.
    """
    assert scene.site is not None
    wide, at = scene.wide, spread(len(scene.site), 1500)
    raw = read(scene.site, scene.pipeline, at, images=False)
    correction = scene.explanation.correction
    here = raw if correction.image_lag or correction.state_lag else correction.apply(raw)
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
    beside = scene.likeness.speed(here)
    proven = beside is not None and abs(np.log(ratio / beside)) < 0.5 * abs(np.log(ratio))
    if beside is not None and not proven:
        return None  # The actions are larger or smaller as well: another operator, or another task.
    way = "fast" if ratio > 1 else "slow"
    sentence = (
        f"the state changes {max(ratio, 1 / ratio):.2g} times as {way} per step as in training, over the same range"
    )
    if proven:
        sentence += ", with the same actions: the control rate is another one, or frames were left out or repeated"
    return TriageOutcome(
        "cause" if proven and abs(np.log(ratio)) > np.log(1.45) else "suspicious",
        sentence,
        "Run the robot and record at the rate of training, one action per frame",
        strength=min(1.0, abs(float(np.log2(ratio)))),
    )


def _speeds(rows: Rows) -> Vectors | None:
    """[D], the typical size of the state's change in a step."""
    if rows.state is None or rows.after is None:
        return None
    change = np.abs(rows.after - rows.state)
    change = change[~np.isnan(change).any(1)]
    return change.mean(0) if len(change) else None


def _spelled_otherwise(prompt: str, trained: Counter[str]) -> str:
    """The prompt of training that has the same letters and digits; empty if there is none."""

    def plain(text: str) -> str:
        return "".join(one for one in text.casefold() if one.isalnum())

    same = {plain(one): one for one in trained}
    return same.get(plain(prompt), "")


def _nearest(prompt: str, trained: Counter[str]) -> str:
    import difflib

    near = difflib.get_close_matches(prompt, trained.keys(), 1, 0.0)
    return near[0] if near else next(iter(trained))
