"""Recognise a camera whose images never change: unplugged, frozen, or filled with zeros by a converter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FEWEST = 3
"""With fewer images, nothing is concluded."""
SAME = 8
"""Images that differ by less everywhere, of 255, are the same: a codec changes a frozen image that much."""
BLACK = 16
"""The largest value of a black image; codecs with a limited range may not reach 0."""


def describe_still(images: Sequence[NDArray[np.uint8]]) -> str:
    """What is wrong with images of different times: `is black`, `never changes`, or nothing (empty).

    Args:
        images: Uint8 [height, width, 3] each, of rows that are far apart.
    """
    if len(images) < FEWEST or len({image.shape for image in images}) > 1:
        return ""
    first = images[0].astype(np.int16)
    if any(np.abs(image - first).max(initial=0) >= SAME for image in images[1:]):
        return ""
    return "is black" if max(image.max(initial=0) for image in images) <= BLACK else "never changes"


def still_camera(column: str, what: str) -> str:
    """The warning about an image column, with the result of `describe_still`."""
    return (
        f"still-camera: {column} {what} in the rows that were looked at. Check the images (`rlinf inspect` shows "
        "some), and take the camera out of data.images if it shows nothing"
    )
