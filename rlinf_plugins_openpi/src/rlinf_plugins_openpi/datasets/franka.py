"""Franka arms as RLinf records them: one arm with one camera, simulated and real, and two arms with three cameras.

Unlike the formats of openpi, these pad state and action to 32 numbers before normalisation, as RLinf does. π0.5
normalises by quantiles, so the padding becomes -1 instead of 0; weights that RLinf trained expect that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from rlinf_core.data.rotations import RotationFormat
from rlinf_plugins_openpi.datasets.config import OpenpiDatasetConfig


class FrankaConfig(OpenpiDatasetConfig):
    """The columns of one arm. The actions are already displacements: position, rotation and the gripper command."""

    images: dict[str, str] = {"base_0_rgb": "image"}
    state: tuple[str, ...] = ("state",)
    actions: tuple[str, ...] = ("actions",)
    raw_action_is_delta: bool = True
    action_width: int = 7
    padded_width: int = 32


class Pi05FrankaConfig(FrankaConfig):
    """A real Franka without a gripper for π0.5, in chunks of 8 actions and without the state."""

    run_defaults: ClassVar[Mapping[str, Any]] = {
        "policy": {"type": "pi05", "action_horizon": 8, "discrete_state_input": False},
        "optim": {"ema_decay": 0.999},
    }

    action_width: int = 6


class Pi05FrankaStateConfig(FrankaConfig):
    """A real Franka for π0.5, in chunks of 20 actions, with the state, unpadded, in the prompt."""

    run_defaults: ClassVar[Mapping[str, Any]] = {
        "policy": {"type": "pi05", "action_horizon": 20, "discrete_state_input": True},
        "optim": {"ema_decay": 0.999},
    }

    pad_state: bool = False


class Pi05SimRealCoTrainingConfig(FrankaConfig):
    """ManiSkill's and a real Franka's rows alike for π0.5, in chunks of 8 actions and without the state.

    For co-training, name the simulated and the real dataset in `[[data.mixture]]`, each with this format.
    """

    run_defaults: ClassVar[Mapping[str, Any]] = {
        "policy": {"type": "pi05", "action_horizon": 8, "discrete_state_input": False},
        "optim": {"ema_decay": 0.999},
    }

    default_prompt: str = "default prompt"


class Pi05DualFrankaConfig(OpenpiDatasetConfig):
    """Two Frankas for π0.5, in chunks of 20 actions and without the state, with rotations as six numbers.

    An arm's action is its position, rotation and gripper. The recorded state has both grippers first, then the poses.
    A pose is trained relative to the state's, in its frame; grippers stay absolute.
    """

    run_defaults: ClassVar[Mapping[str, Any]] = {
        "policy": {"type": "pi05", "action_horizon": 20, "discrete_state_input": False}
    }

    images: dict[str, str] = {
        "base_0_rgb": "extra_view_image-0",
        "left_wrist_0_rgb": "image",
        "right_wrist_0_rgb": "extra_view_image-1",
    }
    state: tuple[str, ...] = ("state",)
    actions: tuple[str, ...] = ("actions",)
    state_order: tuple[int, ...] = (*range(2, 11), 0, *range(11, 20), 1)
    raw_action_is_delta: bool = False
    gripper: tuple[int, ...] = (9, 19)
    action_train_with_rotation_6d: bool = True
    rotation_format: RotationFormat = "rotation_6d"
    state_rotations: tuple[int, ...] = (3, 13)
    action_rotations: tuple[int, ...] = (3, 13)
    relative_poses: bool = True
    state_width: int = 20
    action_width: int = 20
    padded_width: int = 32
