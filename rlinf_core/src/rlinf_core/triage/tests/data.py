"""The test of the training data."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rlinf_core.contract.triage import TriageOutcome, TriageTest
from rlinf_core.data.statistics.action_kind import diagnose_actions
from rlinf_core.triage.mistakes.changes import Named
from rlinf_core.triage.mistakes.rows import Rows, Vectors
from rlinf_core.triage.scene import Scene

IDLE, STILL = 0.3, 0.02
"""Share of idle rows that is suspicious; a smaller share of the usual change does not count."""


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
        if (idle := _idle(scene)) > IDLE:
            return TriageOutcome(
                "suspicious",
                f"the robot does nothing in {idle:.0%} of the training rows: neither state nor action changes, and a "
                "policy that learns it may never start, or stop in between",
                "Leave idle frames out, above all those before the first motion of an episode",
                strength=0.4,
            )
        findings = diagnose_actions(scene.trained, [scene.policy.data.repack(), *scene.policy.data.transforms()])
        relative = [one for one in findings if one.id == "actions-look-relative"]
        if relative:
            return TriageOutcome("suspicious", str(relative[0]).partition(". ")[0], relative[0].way_out, strength=0.5)
        episodes = len(np.unique(scene.trained.episodes))
        return TriageOutcome(
            "fine", f"{len(scene.trained)} rows of {episodes} episodes: no contradiction in their numbers"
        )


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


def _idle(scene: Scene) -> float:
    """The share of steps in which neither the state nor the action changes."""
    rows = scene.stand_in
    if rows.state is None:
        return 0.0
    step = (rows.runs[1:] == rows.runs[:-1]) & (rows.indices[1:] == rows.indices[:-1] + 1)
    still = np.ones(len(rows) - 1, np.bool_)
    for values in (rows.state, rows.actions[:, 0]):
        changes = np.abs(np.diff(values, axis=0))
        usual = np.quantile(changes[step], 0.9, axis=0) if step.any() else np.zeros(values.shape[1])
        still &= (changes <= STILL * usual + 1e-9).all(1)
    return float(still[step].mean()) if step.any() else 0.0


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
