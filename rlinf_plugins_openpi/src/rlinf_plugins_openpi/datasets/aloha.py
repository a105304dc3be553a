"""RoboTwin in Aloha's columns: two arms with six joints and a gripper each, one overhead and two wrist cameras."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from rlinf_core import Sample, UserError
from rlinf_core.data.transforms import Transform
from rlinf_plugins_openpi.datasets.config import OpenpiDatasetConfig

SIGNS = np.array([1, -1, -1, 1, 1, 1, 1] * 2)
"""-1 for joints that turn the other way in the space that π0 was pretrained in."""
GRIPPERS = (6, 13)

# Aloha normalises a gripper's state to 0..1 between finger positions in metres (driven by a servo horn with a known arm
# and radius), its action to 0..1 between joint angles of the leader. π0 uses the angle, as 0..1 between encoder counts.
# Source: openpi, aloha_policy.
_POSITION = (0.01844, 0.05800)
_ARM, _HORN = 0.036, 0.022
_ANGLE = (0.5476, 1.6296)
_JOINT = (-0.6213, 1.4910)

Change = Callable[[NDArray[np.floating]], NDArray[np.floating]]


@dataclass(frozen=True)
class AlohaToPi(Transform):
    """Convert Aloha's joints to the space that π0 was pretrained in: other signs, grippers as angles.

    A gripper's state is a finger position, its action an angle of the leader, so they are converted differently.
    """

    batched: ClassVar[bool] = True

    def __call__(self, sample: Sample) -> Sample:
        """State [14] and actions [H, 14]."""
        return _changed(sample, _state_gripper, _action_gripper)

    def inverse(self, sample: Sample) -> Sample:
        """Convert back to Aloha's space. A gripper beyond its range comes back at its limit."""
        return _changed(sample, _state_gripper_back, _action_gripper_back)


class AlohaRobotwinConfig(OpenpiDatasetConfig):
    """The columns. The actions are joint positions; gripper actions are not made relative to the state."""

    images: dict[str, str] = {
        "base_0_rgb": "observation.images.cam_high",
        "left_wrist_0_rgb": "observation.images.cam_left_wrist",
        "right_wrist_0_rgb": "observation.images.cam_right_wrist",
    }
    raw_action_is_delta: bool = False
    gripper: tuple[int, ...] = GRIPPERS
    state_width: int = 14
    action_width: int = 14
    adapt_to_pi: bool = False
    """Whether joints and grippers are converted to the space that π0 was pretrained in, as data of a real Aloha need.
    These formats follow RLinf, which converts them for π0.5 but not for π0."""

    def transforms(self) -> Sequence[Transform]:
        """The conversion comes first, so that its inverse runs last, on the robot's 14 numbers."""
        return (*([AlohaToPi()] if self.adapt_to_pi else []), *super().transforms())


class Pi0AlohaRobotwinConfig(AlohaRobotwinConfig):
    """RoboTwin for π0, in chunks of 50 actions, in Aloha's own space."""

    run_defaults: ClassVar[Mapping[str, Any]] = {"policy": {"type": "pi0", "action_horizon": 50}}


class Pi05AlohaRobotwinConfig(AlohaRobotwinConfig):
    """RoboTwin for π0.5, in chunks of 50 actions, with the state in the prompt, in π0's space."""

    run_defaults: ClassVar[Mapping[str, Any]] = {
        "policy": {"type": "pi05", "action_horizon": 50, "discrete_state_input": True}
    }

    adapt_to_pi: bool = True


def _changed(sample: Sample, state_gripper: Change, action_gripper: Change) -> Sample:
    out = sample.copy()
    if "state" in sample:
        out["state"] = _converted("a state of the dataset", sample["state"], state_gripper)
    if "actions" in sample:
        out["actions"] = _converted("an action of the dataset", sample["actions"], action_gripper)
    return out


def _converted(what: str, vector: NDArray[np.floating], gripper: Change) -> NDArray[np.floating]:
    """Convert signs and grippers of the first 14 numbers; padding after them is unchanged."""
    width = len(SIGNS)
    if vector.shape[-1] < width:
        raise UserError(
            f"{what} has {vector.shape[-1]} numbers, Aloha's two arms have {width}: name other columns, or set "
            "data.adapt_to_pi = false for another robot"
        )
    robot = vector[..., :width] * SIGNS.astype(np.float64)
    robot[..., GRIPPERS] = gripper(robot[..., GRIPPERS])
    return np.concatenate([robot, vector[..., width:]], axis=-1)


def _scaled(x: NDArray[np.floating], limits: tuple[float, float]) -> NDArray[np.floating]:
    return (x - limits[0]) / (limits[1] - limits[0])


def _unscaled(x: NDArray[np.floating], limits: tuple[float, float]) -> NDArray[np.floating]:
    return x * (limits[1] - limits[0]) + limits[0]


def _state_gripper(opening: NDArray[np.floating]) -> NDArray[np.floating]:
    position = _unscaled(opening, _POSITION)
    sine = (_HORN**2 + position**2 - _ARM**2) / (2 * _HORN * position)
    return _scaled(np.arcsin(np.clip(sine, -1.0, 1.0)), _ANGLE)


def _state_gripper_back(angle: NDArray[np.floating]) -> NDArray[np.floating]:
    """The positive root of the equation that `_state_gripper` solves for the angle."""
    reach = _HORN * np.sin(_unscaled(angle, _ANGLE))
    return _scaled(reach + np.sqrt(reach**2 + _ARM**2 - _HORN**2), _POSITION)


def _action_gripper(opening: NDArray[np.floating]) -> NDArray[np.floating]:
    return _unscaled(opening, _JOINT) - _ANGLE[0]


def _action_gripper_back(angle: NDArray[np.floating]) -> NDArray[np.floating]:
    return _scaled(angle + _ANGLE[0], _JOINT)
