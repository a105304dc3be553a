"""RLinf's real-world Franka: two cameras; a state of 19 numbers (gripper, forces, pose, velocities), or some of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from rlinf_plugins_openpi.datasets.config import OpenpiDatasetConfig


class RealworldConfig(OpenpiDatasetConfig):
    """The columns, with statistics of 32 numbers as in RLinf.

    The actions are already displacements: position, rotation and the gripper command.
    """

    images: dict[str, str] = {"base_0_rgb": "image", "left_wrist_0_rgb": "extra_view_image"}
    state: tuple[str, ...] = ("state",)
    actions: tuple[str, ...] = ("actions",)
    raw_action_is_delta: bool = True
    action_width: int = 7
    padded_width: int = 32


class Pi0RealworldConfig(RealworldConfig):
    """A real Franka for π0, in chunks of 10 actions."""

    run_defaults: ClassVar[Mapping[str, Any]] = {"policy": {"type": "pi0", "action_horizon": 10}}


class Pi05FrankaPnpConfig(RealworldConfig):
    """A real Franka that picks and places for π0.5, in chunks of 5 actions and without the state."""

    run_defaults: ClassVar[Mapping[str, Any]] = {
        "policy": {"type": "pi05", "action_horizon": 5, "discrete_state_input": False}
    }

    repo_id: str = "RLinf/pick_red"
