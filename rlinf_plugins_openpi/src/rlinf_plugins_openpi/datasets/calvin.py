"""CALVIN in RLinf's columns: two cameras; end-effector position, rotation and gripper in separate columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from rlinf_plugins_openpi.datasets.config import OpenpiDatasetConfig


class CalvinConfig(OpenpiDatasetConfig):
    """The columns. The actions are already displacements."""

    repo_id: str = "InternRobotics/InternData-Calvin_ABC"
    images: dict[str, str] = {"base_0_rgb": "video.image_base", "left_wrist_0_rgb": "video.image_wrist"}
    state: tuple[str, ...] = ("state.ee_pos", "state.ee_rot", "state.gripper")
    actions: tuple[str, ...] = ("action.delta_ee_pos", "action.delta_ee_rot", "action.gripper")
    raw_action_is_delta: bool = True
    action_width: int = 7


class Pi0CalvinConfig(CalvinConfig):
    """CALVIN for π0, in chunks of 5 actions."""

    run_defaults: ClassVar[Mapping[str, Any]] = {"policy": {"type": "pi0", "action_horizon": 5}}


class Pi05CalvinConfig(CalvinConfig):
    """CALVIN for π0.5, in chunks of 5 actions and without the state, as RLinf trains it."""

    run_defaults: ClassVar[Mapping[str, Any]] = {
        "policy": {"type": "pi05", "action_horizon": 5, "discrete_state_input": False}
    }
