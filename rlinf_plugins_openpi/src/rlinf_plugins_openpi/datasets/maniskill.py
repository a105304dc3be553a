"""ManiSkill in RLinf's columns: one camera, a state of any width and an action of seven numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from rlinf_plugins_openpi.datasets.config import OpenpiDatasetConfig


class ManiskillConfig(OpenpiDatasetConfig):
    """The columns."""

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
