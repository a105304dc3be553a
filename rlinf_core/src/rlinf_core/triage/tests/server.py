"""The test of a policy server: its actions beside those of the policy, on the same rows with the same noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np

from rlinf_core.contract.triage import TriageOutcome, TriageTest
from rlinf_core.data.loading.sampling import validation_generator
from rlinf_core.errors import UserError
from rlinf_core.results import ResultTable
from rlinf_core.triage.mistakes.changes import Named
from rlinf_core.triage.mistakes.corrections import Correction
from rlinf_core.triage.mistakes.images import image_corrections
from rlinf_core.triage.mistakes.rows import Rows, Vectors, read
from rlinf_core.triage.mistakes.vectors import action_corrections, state_corrections
from rlinf_core.triage.scene import Acted, Scene
from rlinf_core.triage.served import Served

ROWS, DRAWS = 8, 4
"""Rows that the server is asked for, and how often each if it draws its own noise."""
AGREE = 0.05
"""Differences below this share of the actions' spread are rounding, that of bf16 too."""
EXPLAINS = 0.3
"""A change explains a difference of which it leaves at most this share."""
CLOSER = 0.01
"""A change is better than those before it if it leaves less by at least this share."""
SIMPLE = 1.0
"""Complexity of the changes that are tried: a flip, a sign."""
MOST = 80
"""Changes of the observation that the policy tries."""


class ServerTest(TriageTest):
    """A server's actions beside the policy's, and what would make the policy act as the server does."""

    name = "server"
    question = "Does the server act as the policy does?"
    needs_site: ClassVar[bool] = False

    def run(self, scene: Scene) -> TriageOutcome:
        """Ask the server for training rows."""
        served: Served | None = scene.server
        if served is None:
            return TriageOutcome("skipped", "no server was named (--server)")
        rows = scene.spread_rows(scene.trained, ROWS)
        here = scene.act(scene.trained, rows)
        try:
            there = _ask(scene, served, rows)
        except UserError as error:
            return TriageOutcome(
                "cause",
                f"the server does not answer a training row: {error}",
                "Send what the message names, or serve the folder that is triaged",
                strength=0.9,
            )
        if there.shape[2] != here.predicted.shape[2]:
            return TriageOutcome(
                "cause",
                f"the server's actions have {there.shape[2]} numbers, the policy's {here.predicted.shape[2]}",
                "Serve the folder that is triaged",
                strength=1.0,
            )
        apart, least = _apart(scene, here.predicted, there), _tolerance(scene, served, rows)
        table = _table(scene, here.predicted, there)
        if apart <= least:
            text = f"server and policy agree to {apart:.1g} standard deviations of the actions"
            return TriageOutcome("fine", text, tables=[table])
        return replace(_explained(scene, served, here, there, apart, least), tables=[table])


def _ask(scene: Scene, served: Served, rows: Sequence[int]) -> Vectors:
    """[N, H, D], the server's actions; the mean of several if it draws its own noise."""
    found = []
    actions = getattr(scene.policy.data, "actions", ())
    for index, row in zip(rows, scene.trained.__getitems__(list(rows)), strict=True):
        seen = {key: value for key, value in row.items() if key not in actions}
        noise = scene.policy.config.draw(validation_generator(scene.seed, index))["noise"]
        draws = 1 if served.takes_noise else DRAWS
        found.append(np.mean([served.act(seen, noise) for _ in range(draws)], 0))
    steps = min(map(len, found))
    return np.stack([one[:steps] for one in found])


def _apart(scene: Scene, here: Vectors, there: Vectors) -> float:
    """Root mean squared difference, in standard deviations of the actions."""
    steps = min(here.shape[1], there.shape[1])
    return float(np.sqrt(np.square((here[:, :steps] - there[:, :steps]) / scene.action_spread).mean()))


def _tolerance(scene: Scene, served: Served, rows: Sequence[int]) -> float:
    """How far actions may be apart: by rounding, and by the noise that the server draws."""
    if served.takes_noise:
        return AGREE
    other = replace(scene, seed=scene.seed + 1)  # The same rows with other noise.
    drawn = _apart(scene, scene.act(scene.trained, rows).predicted, other.act(scene.trained, rows).predicted)
    return AGREE + 1.5 * drawn


def _explained(scene: Scene, served: Served, here: Acted, there: Vectors, apart: float, least: float) -> TriageOutcome:
    """The cause: what would make the policy act as the server does, or what is known to be different."""
    best, doing = apart, ""
    for one, text in _acting_alike(scene, here, there):
        left = _apart(scene, one, there)
        if left < best - CLOSER * apart:  # Simple changes come first, and rounding does not decide.
            best, doing = left, text
    sentence = f"the server's actions differ from the policy's by {apart:.2g} standard deviations on training rows"
    if doing and best < max(least, EXPLAINS * apart):
        return TriageOutcome(
            "cause",
            f"{sentence}: it acts as the policy does after {doing} (then {best:.1g} are left)",
            "Look for it in the server, or in what is sent to it, and remove it there",
            strength=1.0,
        )
    if other := served.other_files(scene.subject.description):
        sentence += f": it has loaded other files ({', '.join(other)})"
    else:
        numbers = np.square((here.predicted[:, : there.shape[1]] - there) / scene.action_spread).mean((0, 1))
        most = np.flatnonzero(numbers > 0.5 * numbers.max()).tolist()
        sentence += f", most in {Named('action', scene.names.get('actions', ()), len(numbers))(most)}"
    return TriageOutcome("cause", sentence, "Serve the folder that is triaged", strength=0.9)


def _acting_alike(scene: Scene, here: Acted, there: Vectors) -> Iterator[tuple[Vectors, str]]:
    """Changed actions of the policy, and what was changed."""
    rows = read(scene.trained, scene.pipeline, here.indices)
    steps = min(there.shape[1], here.predicted.shape[1])
    own = replace(rows, actions=here.predicted[:, :steps], within=here.within[:, :steps])
    named = Named("action", scene.names.get("actions", ()), there.shape[2])
    served = replace(own, actions=there[:, :steps])
    for one in action_corrections(named, scene.likeness.action, own, served):
        if one.actions is not None:
            yield one.actions(own.actions, own.state), one.doing
    for shift in (1, 2):
        if steps > shift + 1:
            yield here.predicted[:, shift:steps], f"leaving out the first {shift} of its actions"
    for correction in _changes(scene, rows):
        yield scene.act(scene.trained, here.indices.tolist(), correction).predicted, correction.doing


def _changes(scene: Scene, rows: Rows) -> Iterator[Correction]:
    """Changes of the observation: simple ones of images and state, and other prompts."""
    found = [one for one in image_corrections(rows, rows) if one.complexity <= SIMPLE]
    if rows.state is not None and scene.likeness.state is not None:
        width = rows.state.shape[1]
        named = Named("state", scene.names.get("state", ()), width)
        states = state_corrections(named, scene.likeness.state, rows, rows)
        found.append(Correction(doing="setting the state to 0", state=lambda x: 0 * x))
        found += [one for one in states if one.complexity <= SIMPLE]
    prompts = sorted(set(rows.prompts))
    if any(prompts):
        for text, change in (("emptying the prompt", lambda x: ""), ("writing the prompt in lower case", str.lower)):
            found.append(Correction(doing=text, prompts={one: change(one) for one in prompts}))
    yield from found[:MOST]


def _table(scene: Scene, here: Vectors, there: Vectors) -> ResultTable:
    steps = min(here.shape[1], there.shape[1])
    names = [*scene.names.get("actions", ()), *[""] * here.shape[2]]
    apart = np.sqrt(np.square((here[:, :steps] - there[:, :steps]) / scene.action_spread).mean((0, 1)))
    return ResultTable(
        title="The server's actions beside the policy's, in standard deviations",
        columns=("number", "root mean squared difference"),
        rows=tuple((f"{i} {names[i]}".strip(), float(one)) for i, one in enumerate(apart)),
    )
