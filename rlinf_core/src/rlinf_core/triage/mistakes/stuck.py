"""Signals that carry nothing: cameras that are black, gray, frozen or missing, and numbers that never change.

No correction brings back what they should show, so they are not part of the search.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from rlinf_core.triage.mistakes.rows import Rows, Vectors

BLACK = 1.5 / 255
FLAT = 0.01
"""Deviation of the values of an image of a single color."""
SAME = 1e-5
"""Mean difference of two images that are the same frame."""
STALE, STALE_THERE = 0.3, 0.1
"""Share of steps without a new image that is a mistake, and what training may have at most of the difference."""
FEW_STEPS = 12
"""Steps that must be seen before a camera is called frozen."""
GRAY, COLORED = 0.004, 0.02
"""Mean difference of the channels of a gray image, and of one with colors."""
STILL = 1e-3
"""A number that varies by less, in standard deviations of training, does not change."""


def stuck_cameras(site: Rows, reference: Rows, stand_in: Rows) -> Iterator[tuple[str, str, float]]:
    """Cameras that show less at the site than in training.

    Args:
        site: Runs of consecutive rows.
        reference: Training rows.
        stand_in: Runs of consecutive training rows.

    Yields:
        The camera, what is wrong with its images, and the share of them.
    """
    for camera, images in site.images.items():
        there = reference.images.get(camera)
        if there is not None and len(images) and (how := _stuck(camera, images, there, site, stand_in)):
            yield camera, how, _stale(site, camera) if " the frame before " in how else 1.0
    for camera in sorted(reference.images.keys() - site.images.keys()):
        yield camera, f"camera {camera!r} is missing", 1.0


def _stuck(camera: str, images: NDArray[np.float32], there: NDArray[np.float32], site: Rows, stand_in: Rows) -> str:
    named = f"images of camera {camera!r}"
    if images.max() <= BLACK < there.max():
        return f"{named} are black, or have values from 0 to 1 where 0 to 255 are expected"
    if images.std((1, 2, 3)).max() < FLAT < there.std((1, 2, 3)).mean():
        return f"{named} are of a single color"
    if len(images) > 4 and np.ptp(images, axis=0).max() < 0.004 < np.ptp(there, axis=0).max():
        return f"{named} never change"
    share, usual = _stale(site, camera), _stale(stand_in, camera)
    if share - usual > STALE and usual < STALE_THERE:
        how = "are the same frame" if share > 0.95 else "are the frame before"
        return f"{named} {how} in {share:.0%} of the steps in which something else changes, in training in {usual:.0%}"
    if float(_colors(images).max()) < GRAY and float(np.median(_colors(there))) > COLORED:
        return f"{named} are gray, and have colors in training"
    return ""


def _stale(rows: Rows, camera: str) -> float:
    """The share of steps in which the image stays the same, though the state or another camera changes."""
    if camera not in rows.images:
        return 0.0
    step = (rows.runs[1:] == rows.runs[:-1]) & (rows.indices[1:] == rows.indices[:-1] + 1)
    moved = np.zeros(len(rows) - 1, np.bool_)
    if rows.state is not None:
        changes = np.abs(np.diff(rows.state, axis=0)) / np.maximum(rows.state.std(0), 1e-9)
        moved |= changes.max(1) > 0.02
    for other, images in rows.images.items():
        if other != camera:
            moved |= _apart(images) > SAME
    counted = step & moved
    return float((_apart(rows.images[camera])[counted] <= SAME).mean()) if counted.sum() >= FEW_STEPS else 0.0


def _apart(images: NDArray[np.float32]) -> Vectors:
    """[N - 1], mean difference of neighbouring images."""
    return np.asarray(np.abs(np.diff(images, axis=0)).mean((1, 2, 3)))


def _colors(images: NDArray[np.float32]) -> Vectors:
    """[N], mean difference of the channels."""
    return np.asarray(np.abs(images - images.mean(-1, keepdims=True)).mean((1, 2, 3)))


def still_numbers(here: Vectors, there: Vectors) -> list[int]:
    """Numbers that never change at the site, at a value that is unusual in training, where they vary.

    Args:
        here: [M, D], the site's rows.
        there: [N, D], training rows.
    """
    found = []
    for i in range(here.shape[1]):
        spread = float(there[:, i].std())
        if len(here) < 8 or spread < 1e-9 or float(np.ptp(here[:, i])) > STILL * spread:
            continue
        # A gripper may stay open in all rows of a site: its value is then a usual one.
        usual = float((np.abs(there[:, i] - here[0, i]) < 0.1 * spread).mean())
        if usual < 0.1:
            found.append(i)
    return found
