"""The random numbers of a training sample: noise, flow time and image augmentation. NumPy only.

They are drawn here and used on the device (`pi0.py`, `augment.py`), so that a sample looks the same on any number of
ranks and in any batch. The ranges are the reference's (openpi, `models/model.py` and `models/pi0.py`).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Draws = dict[str, NDArray[np.float32] | np.float32]

MAX_SHIFT = 6.0
"""In pixels: a crop of 212 out of 224 stays within the image."""
MAX_ANGLE = math.radians(5.0)
JITTER_PROBABILITY = 0.5
MAX_BRIGHTNESS, MAX_CONTRAST = 0.3, 0.4
MAX_HUE = 0.1
"""In turns. The reference does not set it, but the default of its library applies."""


def draw_flow(generator: np.random.Generator, action_horizon: int, action_dim: int) -> Draws:
    """`noise` [H, A], standard normal, and `time` = 0.001 + 0.999 s with s ~ Beta(1.5, 1); both float32."""
    noise = generator.standard_normal((action_horizon, action_dim), dtype=np.float32)
    # Beta(1.5, 1) has the distribution function s^1.5, so a uniform u gives s = u^(2/3).
    return {"noise": noise, "time": np.float32(0.001 + 0.999 * generator.random() ** (2 / 3))}


def draw_augmentation(generator: np.random.Generator) -> Draws:
    """Random numbers for augmenting a sample's images, float32.

    Returns:
        `crop_and_rotation` [3] for cameras that are not on a wrist, and `color_jitter` [2, 4], one row for these and
        one for wrist cameras; cameras of one kind share their numbers. See `augment.augment` for the meaning.
    """
    crop_and_rotation = generator.uniform(-1.0, 1.0, 3) * (MAX_SHIFT, MAX_SHIFT, MAX_ANGLE)
    applied = generator.uniform(size=(2, 1)) < JITTER_PROBABILITY
    amounts = generator.uniform(-1.0, 1.0, (2, 3)) * (MAX_BRIGHTNESS, MAX_CONTRAST, MAX_HUE)
    return {
        "crop_and_rotation": crop_and_rotation.astype(np.float32),
        "color_jitter": np.concatenate((applied, amounts), axis=1, dtype=np.float32),
    }
