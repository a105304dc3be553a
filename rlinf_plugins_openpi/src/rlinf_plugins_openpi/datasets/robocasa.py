"""RoboCasa in the columns of `daixianjie/robocasa_human_lerobot`: a mobile arm in kitchens.

State: end effector (position, quaternion), gripper (positions, velocities), end effector in the base's frame, and base.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from rlinf_plugins_openpi.datasets.config import OpenpiDatasetConfig


class RobocasaConfig(OpenpiDatasetConfig):
    """The columns: the left of two cameras beside the arm, and the one on the wrist.

    The actions are already displacements: six of the end effector, then gripper, base (3), torso, and base mode.
    """

    images: dict[str, str] = {"base_0_rgb": "image_left", "left_wrist_0_rgb": "wrist_image"}
    state: tuple[str, ...] = ("state",)
    actions: tuple[str, ...] = ("actions",)
    raw_action_is_delta: bool = True
    state_width: int = 25
    action_width: int = 12


class Pi0RobocasaHumanConfig(RobocasaConfig):
    """RoboCasa's human demonstrations for π0, in chunks of 5 actions."""

    run_defaults: ClassVar[Mapping[str, Any]] = {"policy": {"type": "pi0", "action_horizon": 5}}

    repo_id: str = "daixianjie/robocasa_human_lerobot"


class Pi0Robocasa365Config(RobocasaConfig):
    """RoboCasa365's 300 pretraining tasks for π0, in chunks of 50 actions, with longer prompts."""

    run_defaults: ClassVar[Mapping[str, Any]] = {"policy": {"type": "pi0", "action_horizon": 50, "max_token_len": 96}}


class Pi05Robocasa365Config(RobocasaConfig):
    """RoboCasa365's 300 pretraining tasks for π0.5, in chunks of 50 actions, with the state in the prompt."""

    run_defaults: ClassVar[Mapping[str, Any]] = {
        "policy": {"type": "pi05", "action_horizon": 50, "discrete_state_input": True}
    }
