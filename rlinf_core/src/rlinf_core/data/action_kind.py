"""Whether a robot's actions are positions or displacements, as far as the data tell, and whether the config agrees.

A position that is commanded is where the robot is a frame later: the action resembles the next state. A displacement
goes with the change of the state and not with the state.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rlinf_core.data.doctor import Finding
from rlinf_core.data.normalize import Vector
from rlinf_core.data.statistics import outputs
from rlinf_core.data.transforms import RelativeActions, RelativeUnless, Transform
from rlinf_core.datasets import SampleSource

PAIRS = 2048
"""Pairs of successive rows that are looked at."""

Flags = NDArray[np.bool_]


def examine_actions(source: SampleSource, transforms: Sequence[Transform]) -> list[Finding]:
    """Findings where the config treats displacements as positions, or the reverse.

    Args:
        source: Training rows.
        transforms: Repacking first, then the dataset's.
    """
    repack, *others = transforms
    position, displacement = kinds_of_action(source, repack)
    width = len(position)
    masked = np.zeros(width, np.bool_)
    for transform in others:
        if isinstance(transform, RelativeActions | RelativeUnless):
            masked |= np.array(transform.mask_of(width), np.bool_)
    findings = []
    told = position | displacement
    if not masked.any() and 2 * position.sum() > width:
        findings.append(
            Finding(
                "actions-look-absolute",
                "warning",
                "actions",
                tuple(np.flatnonzero(position).tolist()),
                "they are trained as they are, and each is nearly the state of the next frame: positions, which "
                "policies learn better as distances to the state",
                "Let the dataset make them relative to the state, if absolute ones are not meant",
            )
        )
    wrong = masked & displacement
    if wrong.any() and 2 * wrong.sum() >= (masked & told).sum():
        findings.append(
            Finding(
                "actions-look-relative",
                "warning",
                "actions",
                tuple(np.flatnonzero(wrong).tolist()),
                "the state is subtracted from them, though they go with its change and not with it: they look like "
                "displacements already",
                "Leave them as they are, unless the weights were trained so (π0's for LIBERO were)",
            )
        )
    return findings


def kinds_of_action(source: SampleSource, repack: Transform) -> tuple[Flags, Flags]:
    """Which numbers of the action look like positions, and which like displacements of the same number of the state.

    Returns:
        Two [width], where width is that of the narrower of both; numbers that tell nothing are in neither.
    """
    episodes = source.episodes
    rows = np.flatnonzero(episodes[1:] == episodes[:-1])
    none = np.zeros(0, np.bool_)
    if len(rows) < 16:
        return none, none
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, PAIRS).astype(np.int64))]
    here = outputs(source, [repack], rows.tolist())
    after = outputs(source, [repack], (rows + 1).tolist())
    if "state" not in here or "actions" not in here:
        return none, none
    width = min(here["state"].shape[-1], here["actions"].shape[-1])
    state, following = here["state"][:, :width], after["state"][:, :width]
    action = here["actions"][:, 0, :width]
    spread = state.std(axis=0)
    distance = np.median(np.abs(action - following), axis=0)
    moves = (spread > 0) & (action.std(axis=0) > 0)
    with_state, with_change = _correlation(action, following), _correlation(action, following - state)
    position = moves & (with_state > 0.95) & (distance < 0.2 * spread)
    displacement = moves & (np.abs(with_state) < 0.5) & (with_change > 0.4) & (distance > 0.2 * spread)
    return position, displacement


def _correlation(a: Vector, b: Vector) -> Vector:
    """[D], of each column of `a` with the same of `b`; 0 where one is constant."""
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    norm = np.sqrt(np.square(a).sum(axis=0) * np.square(b).sum(axis=0))
    return np.asarray(np.divide((a * b).sum(axis=0), norm, out=np.zeros_like(norm), where=norm > 1e-30))
