"""What a policy sees of LIBERO: a row in the columns of `physical-intelligence/libero`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


def upright(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """An image of the simulator [height, width, 3] as the dataset has it: rotated by 180 degrees."""
    return np.ascontiguousarray(image[::-1, ::-1])


def axis_angle(quaternion_xyzw: NDArray[np.float64]) -> NDArray[np.float64]:
    """The rotation vector [3] in radians of a unit quaternion [4], as the dataset and openpi's evaluation have it.

    The angle is from 0 to 2π, and not reduced to π: a gripper that points down is rotated by about π, where the
    reduced vector changes its sign from one frame to the next. The simulator's quaternion changes continuously.
    """
    x, y, z, w = np.clip(quaternion_xyzw, -1.0, 1.0)
    sine = math.sqrt(1.0 - w * w)
    if sine == 0.0:
        return np.zeros(3)
    return np.array([x, y, z]) * (2.0 * math.acos(w) / sine)


def proprioception(values: Mapping[str, Any]) -> NDArray[np.float32]:
    """The state, float32 [8]: position of the end effector in metres, its rotation vector, and the two fingers."""
    position, fingers = values["robot0_eef_pos"], values["robot0_gripper_qpos"]
    state: NDArray[np.float32] = np.concatenate([position, axis_angle(values["robot0_eef_quat"]), fingers], dtype="f4")
    return state
