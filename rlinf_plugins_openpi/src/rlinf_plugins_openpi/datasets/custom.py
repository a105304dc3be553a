"""A dataset of your own without any Python: every fact is a key of `[data]`. The default columns are RLinf's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from rlinf_plugins_openpi.datasets.config import OpenpiDatasetConfig


class CustomConfig(OpenpiDatasetConfig):
    """One camera, state and actions, in the columns of RLinf's custom format. How actions are trained must be set."""

    images: dict[str, str] = {"base_0_rgb": "image"}
    state: tuple[str, ...] = ("state",)
    actions: tuple[str, ...] = ("actions",)


class Pi0CustomConfig(CustomConfig):
    """Your own format for π0, in chunks of 50 actions.

    RLinf pads state and action to 32 numbers before normalisation and cuts actions to 7, which would be
    `padded_width = 32` and `action_width = 7`. For π0 this makes no difference.
    """

    run_defaults: ClassVar[Mapping[str, Any]] = {"policy": {"type": "pi0", "action_horizon": 50}}


class Pi05CustomConfig(CustomConfig):
    """Your own format for π0.5: openpi's defaults, chunks of 50 actions, the state in the prompt, quantiles.

    States and actions are padded after normalisation: quantiles would turn the padding into -1.
    """

    run_defaults: ClassVar[Mapping[str, Any]] = {
        "policy": {"type": "pi05", "action_horizon": 50, "discrete_state_input": True, "max_token_len": 200}
    }
