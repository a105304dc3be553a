"""ManiSkill in RLinf's columns, and what is built on it: GSEnv's splatted scenes, and peg insertion by joints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from rlinf_plugins_openpi.datasets.config import OpenpiDatasetConfig


class ManiskillConfig(OpenpiDatasetConfig):
    """The columns: one camera, a state of any width and an action of seven numbers, which is a displacement."""

    images: dict[str, str] = {"base_0_rgb": "observation.images.top"}
    actions: tuple[str, ...] = ("actions",)
    raw_action_is_delta: bool = True
    action_width: int = 7


class Pi0ManiskillConfig(ManiskillConfig):
    """ManiSkill for π0, in chunks of 50 actions."""

    run_defaults: ClassVar[Mapping[str, Any]] = {"policy": {"type": "pi0", "action_horizon": 50}}


class Pi05ManiskillConfig(ManiskillConfig):
    """ManiSkill for π0.5, in chunks of 10 actions and without the state, as RLinf trains it."""

    run_defaults: ClassVar[Mapping[str, Any]] = {
        "policy": {"type": "pi05", "action_horizon": 10, "discrete_state_input": False},
        "optim": {"ema_decay": 0.999},
    }


class Pi05GsenvConfig(ManiskillConfig):
    """GSEnv, ManiSkill in scenes of Gaussian splats, for π0.5, in chunks of 5 actions and without the state."""

    run_defaults: ClassVar[Mapping[str, Any]] = {
        "policy": {"type": "pi05", "action_horizon": 5, "discrete_state_input": False}
    }

    repo_id: str = "RLinf/GSEnv-PutCubeOnPlate-v0"
    images: dict[str, str] = {"base_0_rgb": "observation.image"}


class Pi05RltManiskillJointConfig(ManiskillConfig):
    """Peg insertion in joint space for π0.5, in chunks of 10 actions, with the state in the prompt.

    RLinf names it after its RLT recipe, whose first stage adds a loss to this fine-tuning. All rows get the same text.
    """

    run_defaults: ClassVar[Mapping[str, Any]] = {
        "policy": {"type": "pi05", "action_horizon": 10, "discrete_state_input": True},
        "optim": {"ema_decay": 0.999},
    }

    images: dict[str, str] = {"base_0_rgb": "image", "left_wrist_0_rgb": "wrist_image"}
    state: tuple[str, ...] = ("state",)
    prompt_from_task: bool = False
    default_prompt: str = "insert the peg in the hole"
    action_width: int = 8
