"""Diagnose whether a robot's actions are positions or displacements, and whether the config agrees.

A commanded position is where the robot is one frame later, so the action resembles the next state. A displacement
correlates with the change of the state, not with the state.
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
"""Pairs of consecutive rows to compare."""
FEWEST = 16
"""With fewer pairs, nothing is concluded."""

Flags = NDArray[np.bool_]


def diagnose_actions(source: SampleSource, transforms: Sequence[Transform]) -> list[Finding]:
    """Findings if the config treats displacements as positions, or positions as displacements.

    Args:
        source: Training rows.
        transforms: Repacking, then the dataset's transforms.
    """
    rows = pairs(source)
    if not len(rows):
        return []
    position, displacement = kinds_of_action(source, transforms[0], rows)
    as_recorded, relative = treatment(source, transforms, rows, len(position))
    findings = []
    absolute = position & as_recorded
    if not relative.any() and 2 * absolute.sum() > len(position):
        findings.append(
            Finding(
                "actions-look-absolute",
                "warning",
                "actions",
                tuple(np.flatnonzero(absolute).tolist()),
                "they are trained as recorded, and nearly equal the state of the next frame: positions, which policies "
                "learn better relative to the state",
                "Unless absolute actions are intended, set data.raw_action_is_delta = false if the dataset has that "
                "key, or let its transforms make them relative to the state",
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
                "the state is subtracted from them, but they correlate with its change and not with the state itself: "
                "they appear to be displacements already",
                "Train them as recorded, unless the weights were trained like this (π0's for LIBERO were)",
            )
        )
    return findings


def kinds_of_action(source: SampleSource, repack: Transform, rows: NDArray[np.int64]) -> tuple[Flags, Flags]:
    """Classify action dimensions as positions or displacements of the same state dimension.

    Args:
        source: Training rows.
        repack: Converts rows to samples, in the data's own units.
        rows: Rows whose next row is of the same episode.

    Returns:
        Positions and displacements, both [width of the narrower of state and action]; unclear dimensions are neither.
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


def pairs(source: SampleSource, most: int = PAIRS) -> NDArray[np.int64]:
    """Up to `most` evenly spread rows whose next row is of the same episode; empty if there are too few."""
    episodes = source.episodes
    rows = np.flatnonzero(episodes[1:] == episodes[:-1])
    if len(rows) < FEWEST:
        return np.zeros(0, np.int64)
    return np.asarray(rows[np.unique(np.linspace(0, len(rows) - 1, most).astype(np.int64))])


def treatment(
    source: SampleSource, transforms: Sequence[Transform], rows: NDArray[np.int64], width: int
) -> tuple[Flags, Flags]:
    """Dimensions that the transforms leave as recorded, and those from which they subtract the state; both [width].

    Judged by their output, not by their class, because packages bring their own transforms.
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
    """[D], the correlation of each column of `a` with that of `b`; 0 if one is constant."""
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    norm = np.sqrt(np.square(a).sum(axis=0) * np.square(b).sum(axis=0))
    return np.asarray(np.divide((a * b).sum(axis=0), norm, out=np.zeros_like(norm), where=norm > 1e-30))
