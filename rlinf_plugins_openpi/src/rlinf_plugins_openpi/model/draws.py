"""The random numbers of a training sample's flow: noise and flow time. NumPy only.

They are drawn here and used on the device (`pi0.py`), so that a sample looks the same on any number of ranks and in any
batch. The distributions are the reference's (openpi, `models/pi0.py`). Those of image augmentation are drawn by
`inputs.augmentation`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Draws = dict[str, NDArray[np.float32] | np.float32]


AUGMENTATION = "augmentation"
"""Key of a sample's random numbers, `<label>.<name>` -> [all cameras, ...], and of a batch's, camera ->
`<label>.<name>` -> [B, ...]."""


DELAY = "rtc_delay"
"""Key of the number of actions that a chunk is given, int64: of a sample, and [B] of a batch."""


def draw_flow(generator: np.random.Generator, action_horizon: int, action_dim: int) -> Draws:
    """`noise` [H, A], standard normal, and `time` = 0.001 + 0.999 s with s ~ Beta(1.5, 1); both float32."""
    noise = generator.standard_normal((action_horizon, action_dim), dtype=np.float32)
    # Beta(1.5, 1) has the distribution function s^1.5, so a uniform u gives s = u^(2/3).
    return {"noise": noise, "time": np.float32(0.001 + 0.999 * generator.random() ** (2 / 3))}


def draw_delay(generator: np.random.Generator, max_delay: int) -> np.int64:
    """How many actions of a chunk are given: each number from 0 to `max_delay` is equally likely."""
    return np.int64(generator.integers(0, max_delay, endpoint=True))
