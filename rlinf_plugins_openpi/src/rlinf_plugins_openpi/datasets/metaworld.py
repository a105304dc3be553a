"""MetaWorld in the columns of `lerobot/metaworld_mt50`: one camera, end-effector position and gripper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from rlinf_plugins_openpi.datasets.config import OpenpiDatasetConfig


class MetaworldConfig(OpenpiDatasetConfig):
    """The columns. The action is already a displacement (three axes and the gripper's effort, each in [-1, 1])."""

    repo_id: str = "lerobot/metaworld_mt50"
    images: dict[str, str] = {"base_0_rgb": "observation.image"}
    raw_action_is_delta: bool = True
    action_width: int = 4


class Pi0MetaworldConfig(MetaworldConfig):
    """MetaWorld for π0, in chunks of 5 actions."""

    run_defaults: ClassVar[Mapping[str, Any]] = {"policy": {"type": "pi0", "action_horizon": 5}}


class Pi05MetaworldConfig(MetaworldConfig):
    """MetaWorld for π0.5, in chunks of 5 actions and without the state, as RLinf trains it."""

    run_defaults: ClassVar[Mapping[str, Any]] = {
        "policy": {"type": "pi05", "action_horizon": 5, "discrete_state_input": False}
    }
