"""LIBERO in the columns of `physical-intelligence/libero`: two cameras, 10 Hz, 256 px.

The state is the end effector's position, its rotation as an axis-angle vector, and two finger positions. The action is
the displacement of the first six numbers and a gripper command.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from rlinf_plugins_openpi.datasets.config import OpenpiDatasetConfig


class LiberoConfig(OpenpiDatasetConfig):
    """The columns."""

    repo_id: str = "physical-intelligence/libero"
    images: dict[str, str] = {"base_0_rgb": "image", "left_wrist_0_rgb": "wrist_image"}
    state: tuple[str, ...] = ("state",)
    actions: tuple[str, ...] = ("actions",)
    raw_action_is_delta: bool = True
    action_width: int = 7


class Pi0LiberoConfig(LiberoConfig):
    """LIBERO for π0, in chunks of 50 actions.

    The actions are already displacements. openpi subtracts the state nevertheless, and π0's published LIBERO weights
    were trained that way.
    """

    run_defaults: ClassVar[Mapping[str, Any]] = {"policy": {"type": "pi0", "action_horizon": 50}}

    relative: tuple[bool, ...] = (True,) * 6


class Pi0LiberoHorizon10Config(Pi0LiberoConfig):
    """LIBERO for π0 as above, in chunks of 10 actions."""

    run_defaults: ClassVar[Mapping[str, Any]] = {"policy": {"type": "pi0", "action_horizon": 10}}


class Pi05LiberoConfig(LiberoConfig):
    """LIBERO for π0.5, in chunks of 10 actions and without the state, as openpi and RLinf train it.

    The optimizer settings are theirs as well, for batches of 256: after warm-up the learning rate stays constant.
    """

    run_defaults: ClassVar[Mapping[str, Any]] = {
        "policy": {"type": "pi05", "action_horizon": 10, "discrete_state_input": False},
        "optim": {
            "lr": 5e-5,
            "min_lr": 5e-5,
            "warmup_steps": 10_000,
            "decay_steps": 1_000_000,
            "ema_decay": 0.999,
        },
    }
