"""Whether a robot's actions are positions or displacements, as far as the data tell, and whether the config agrees.

A position that is commanded is where the robot is a frame later: the action resembles the next state. A displacement
goes with the change of the state and not with the state.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rlinf_core.contract.datasets import SampleSource
from rlinf_core.data.normalize import Vector
from rlinf_core.data.statistics.compute import outputs
from rlinf_core.data.statistics.diagnose import Finding
from rlinf_core.data.transforms import Transform

PAIRS = 2048
"""Pairs of successive rows that are looked at."""
FEWEST = 16

Flags = NDArray[np.bool_]


def diagnose_actions(source: SampleSource, transforms: Sequence[Transform]) -> list[Finding]:
    """Findings where the config treats displacements as positions, or the reverse.

    Args:
        source: Training rows.
        transforms: Repacking first, then the dataset's.
    """
    rows = _pairs(source)
    if not len(rows):
        return []
    position, displacement = kinds_of_action(source, transforms[0], rows)
    as_recorded, relative = _treatment(source, transforms, rows, len(position))
    findings = []
    told = position & as_recorded
    if not relative.any() and 2 * told.sum() > len(position):
        findings.append(
            Finding(
                "actions-look-absolute",
                "warning",
                "actions",
                tuple(np.flatnonzero(told).tolist()),
                "they are trained as they are, and each is nearly the state of the next frame: positions, which "
                "policies learn better as distances to the state",
                "If absolute ones are not meant, set data.raw_action_is_delta = false, where the dataset has that key, "
                "or let its transforms make them relative to the state",
            )
        )
    wrong = relative & displacement
    if wrong.sum() > (relative & position).sum():
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


def kinds_of_action(source: SampleSource, repack: Transform, rows: NDArray[np.int64]) -> tuple[Flags, Flags]:
    """Which numbers of the action look like positions, and which like displacements of the same number of the state.

    Args:
        source: Training rows.
        repack: Makes samples of rows, in the data's own units.
        rows: Of which each is followed by one of the same episode.

    Returns:
        Two [width], where width is that of the narrower of both; numbers that tell nothing are in neither.
    """
    none = np.zeros(0, np.bool_)
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


def _pairs(source: SampleSource) -> NDArray[np.int64]:
    """Rows that are followed by one of the same episode, from all over the data; none if there are too few to tell."""
    episodes = source.episodes
    rows = np.flatnonzero(episodes[1:] == episodes[:-1])
    if len(rows) < FEWEST:
        return np.zeros(0, np.int64)
    return np.asarray(rows[np.unique(np.linspace(0, len(rows) - 1, PAIRS).astype(np.int64))])


def _treatment(
    source: SampleSource, transforms: Sequence[Transform], rows: NDArray[np.int64], width: int
) -> tuple[Flags, Flags]:
    """Which numbers of the action the transforms leave as recorded, and from which they take the state's; two [width].

    By what they do, not by their class: a package may bring transforms of its own.
    """
    before = outputs(source, transforms[:1], rows.tolist())
    after = outputs(source, transforms, rows.tolist())
    flags = np.zeros(width, np.bool_), np.zeros(width, np.bool_)
    if not width or "actions" not in after:
        return flags
    both = min(width, after["actions"].shape[-1])
    recorded, made = before["actions"][:, 0, :both], after["actions"][:, 0, :both]
    state = before["state"][:, :both]
    rounding = 1e-4 * (np.abs(recorded).max(axis=0) + np.abs(state).max(axis=0))
    flags[0][:both] = (np.abs(recorded - made) <= rounding).all(axis=0)
    flags[1][:both] = (np.abs(recorded - state - made) <= rounding).all(axis=0) & ~flags[0][:both]
    return flags


def _correlation(a: Vector, b: Vector) -> Vector:
    """[D], of each column of `a` with the same of `b`; 0 where one is constant."""
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    norm = np.sqrt(np.square(a).sum(axis=0) * np.square(b).sum(axis=0))
    return np.asarray(np.divide((a * b).sum(axis=0), norm, out=np.zeros_like(norm), where=norm > 1e-30))
