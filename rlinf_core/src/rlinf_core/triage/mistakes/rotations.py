"""Mistakes that are made with rotations: the order and sign of quaternions, frames, branches, other forms."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np

from rlinf_core.data.rotations import from_matrix, to_matrix
from rlinf_core.triage.mistakes.changes import Change, Named, said, times, within
from rlinf_core.triage.mistakes.corrections import Correction
from rlinf_core.triage.mistakes.rows import Vectors

FORMS = ("euler_xyz", "euler_XYZ", "euler_zyx", "euler_ZYX", "axis_angle")
QUATERNIONS = ("quaternion_xyzw", "quaternion_wxyz")


def rotation_corrections(named: Named, site: Vectors, training: Vectors) -> Iterator[tuple[Correction, Change]]:
    """Corrections of all rotations that a vector may hold.

    Args:
        named: Names its numbers.
        site: [M, D].
        training: [N, D].

    Yields:
        A correction whose change is not set yet, and the change of arrays [..., D].
    """
    width = training.shape[1]
    for start in range(width - 3):
        there = training[:, start : start + 4]
        if np.abs(np.linalg.norm(there, axis=1) - 1).max() < 0.02:
            yield from _quaternions(named, list(range(start, start + 4)), site[:, start : start + 4], there)
    for start in range(width - 2):
        there, here = training[:, start : start + 3], site[:, start : start + 3]
        if np.abs(there).max() < 2 * np.pi + 0.01 and np.abs(here).max() < 2 * np.pi + 0.01:
            yield from _three_numbers(named, list(range(start, start + 3)), there)
    for i in range(width):
        if np.ptp(site[:, i]) > np.pi or np.abs(site[:, i].mean() - training[:, i].mean()) > np.pi:
            middle = float(np.median(training[:, i]))
            yield (
                said(f"{named([i])} is wrapped: an angle that differs by 360°", f"unwrapping {named([i])}", 1.5),
                within(i, 1, lambda x, middle=middle: x - 2 * np.pi * np.round((x - middle) / (2 * np.pi))),  # type: ignore[misc]
            )


def _quaternions(
    named: Named, numbers: list[int], here: Vectors, there: Vectors
) -> Iterator[tuple[Correction, Change]]:
    start = numbers[0]
    for shift, order in ((1, "w first where training has w last"), (-1, "w last where training has w first")):
        yield (
            said(
                f"the quaternion {named(numbers)} has another order of numbers ({order})",
                f"rolling the quaternion {named(numbers)} by {-shift}",
                0.9,
            ),
            within(start, 4, lambda x, shift=shift: np.roll(x, -shift, axis=-1)),  # type: ignore[misc]
        )
    axis = np.linalg.eigh(there.T @ there)[1][:, -1]
    axis = axis if (there @ axis).mean() > 0 else -axis
    if ((there @ axis) < 0).mean() < 0.05:

        def canonical(x: Vectors) -> Vectors:
            return np.where((x @ axis)[..., None] < 0, -x, x)

        yield (
            said(
                f"the quaternion {named(numbers)} has the opposite sign in some or all rows (q and -q are the same "
                "rotation, but not the same numbers)",
                f"choosing the sign of the quaternion {named(numbers)} as in training",
                0.9,
            ),
            within(start, 4, canonical),
        )
    for a, b in combinations(range(3), 2):
        factors = np.ones(4)
        factors[[a, b]] = -1
        yield (
            said(
                f"{named([start + a, start + b])} of a quaternion have the opposite sign",
                f"negating {named([start + a, start + b])}",
                1.4,
            ),
            within(start, 4, times(factors)),
        )
    if np.abs(np.linalg.norm(here, axis=1) - 1).max() < 0.02:
        yield from _frames(named, numbers, axis)
    for signs in ((-1.0, -1.0, -1.0, 1.0), (1.0, -1.0, -1.0, -1.0)):
        yield (
            said(
                f"the quaternion {named(numbers)} is inverted (conjugate)", f"inverting the quaternion {named(numbers)}"
            ),
            within(start, 4, times(np.array(signs))),
        )


def _frames(named: Named, numbers: list[int], usual: Vectors) -> Iterator[tuple[Correction, Change]]:
    """Rotations of another frame: of the tool's, as a flange and a hand that is mounted at 45°, or of the base's."""
    for form in QUATERNIONS:
        for axis, angle in [(axis, angle) for axis in range(3) for angle in (90, -90, 180)] + [(2, 45), (2, -45)]:
            vector = np.zeros(3)
            vector[axis] = np.radians(angle)
            turn = to_matrix(vector, "axis_angle")
            for tool, whose in ((True, "the tool's"), (False, "the base's")):
                what = f"{whose} frame by {angle}° about its {'xyz'[axis]} axis"
                yield (
                    said(
                        f"the quaternion {named(numbers)} is of another frame: training has it after turning {what}",
                        f"turning {what}",
                        1.6,
                    ),
                    within(numbers[0], 4, partial(_reframed, form=form, turn=turn, tool=tool, usual=usual)),
                )


def _reframed(x: Vectors, form: Any, turn: Vectors, tool: bool, usual: Vectors) -> Vectors:
    matrix = to_matrix(x, form)
    found = from_matrix(matrix @ turn if tool else turn @ matrix, form)
    return np.where((found @ usual)[..., None] < 0, -found, found)


def _three_numbers(named: Named, numbers: list[int], there: Vectors) -> Iterator[tuple[Correction, Change]]:
    """Axis-angle vectors of the other branch, and rotations in another form."""
    start, mean = numbers[0], there.mean(0)
    if np.linalg.norm(there, axis=1).max() > 1.0:

        def near(x: Vectors) -> Vectors:
            length = np.linalg.norm(x, axis=-1, keepdims=True)
            other = x * (1 - 2 * np.pi / np.maximum(length, 1e-6))
            closer = np.linalg.norm(other - mean, axis=-1) < np.linalg.norm(x - mean, axis=-1)
            return np.where(closer[..., None], other, x)

        yield (
            said(
                f"the rotation {named(numbers)} is on the other branch in some or all rows (an angle of 360° minus it "
                "about the opposite axis)",
                f"choosing the branch of {named(numbers)} as in training",
                1.2,
            ),
            within(start, 3, near),
        )
    for form in FORMS:
        for other in FORMS:
            if form != other:
                yield (
                    said(
                        f"the rotation {named(numbers)} is in another form ({form} where training has {other})",
                        f"converting {named(numbers)} from {form} to {other}",
                        1.8,
                    ),
                    within(start, 3, _converting(form, other)),
                )


def _converting(form: Any, other: Any) -> Change:
    return lambda x: from_matrix(to_matrix(x, form), other)
