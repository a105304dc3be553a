"""DROID in the columns of openpi's converter, with joint positions as actions, as the PolaRiS benchmark needs them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from rlinf_plugins_openpi.datasets.config import OpenpiDatasetConfig


class DroidPolarisConfig(OpenpiDatasetConfig):
    """The columns. The actions are seven joint positions, trained relative to the state, and the gripper's position."""

    images: dict[str, str] = {"base_0_rgb": "exterior_image_1_left", "left_wrist_0_rgb": "wrist_image_left"}
    state: tuple[str, ...] = ("joint_position", "gripper_position")
    actions: tuple[str, ...] = ("actions",)
    raw_action_is_delta: bool = False
    gripper: tuple[int, ...] = (7,)
    state_width: int = 8
    action_width: int = 8


class Pi0DroidPolarisConfig(DroidPolarisConfig):
    """DROID for π0, in chunks of 10 actions."""

    run_defaults: ClassVar[Mapping[str, Any]] = {"policy": {"type": "pi0", "action_horizon": 10}}


class Pi05DroidPolarisConfig(DroidPolarisConfig):
    """DROID for π0.5, in chunks of 15 actions, with the state in the prompt."""

    run_defaults: ClassVar[Mapping[str, Any]] = {
        "policy": {"type": "pi05", "action_horizon": 15, "discrete_state_input": True}
    }
