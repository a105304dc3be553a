"""Images for the page: what the cameras showed in training, and what they show at the site."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from rlinf_core.triage.mistakes.corrections import Correction
from rlinf_core.triage.mistakes.rows import Rows

SHOWN = 3
"""Images of a kind."""
SCALE = 5
"""Pixels of the page for one of a small image."""


def camera_images(reference: Rows, site: Rows, correction: Correction | None) -> Mapping[str, NDArray[np.uint8]]:
    """Caption -> a strip of images of each camera: training, the site, and the site corrected."""
    corrected = correction.apply(site) if correction else None
    found: dict[str, NDArray[np.uint8]] = {}
    for camera, images in site.images.items():
        if camera not in reference.images or (correction and camera not in correction.images):
            continue
        found[f"{camera} in training"] = _strip(reference.images[camera])
        found[f"{camera} at the site"] = _strip(images)
        if corrected is not None:
            found[f"{camera} at the site, corrected"] = _strip(corrected.images[camera])
    return found


def _strip(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    chosen = images[np.linspace(0, len(images) - 1, SHOWN).astype(np.int64)]
    row = np.concatenate([np.nan_to_num(one, nan=0.0) for one in chosen], axis=1)
    pixels = (np.clip(row, 0, 1) * 255).astype(np.uint8)
    return np.asarray(pixels.repeat(SCALE, axis=0).repeat(SCALE, axis=1))
