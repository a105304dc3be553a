"""A dataset of your own without a line of Python: every fact is a key of `[data]`. The columns are RLinf's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from rlinf_plugins_openpi.datasets import OpenpiDatasetConfig


class CustomConfig(OpenpiDatasetConfig):
    """One camera, state and actions, where RLinf's custom format has them. How actions are trained must be said."""

    images: dict[str, str] = {"base_0_rgb": "image"}
    state: tuple[str, ...] = ("state",)
    actions: tuple[str, ...] = ("actions",)


class Pi0CustomConfig(CustomConfig):
    """Your own format for π0, in chunks of 50 actions.

    RLinf fills state and action up to 32 numbers before it normalises, and cuts actions to 7: `padded_width = 32` and
    `action_width = 7`. To π0 it is all the same.
    """

    run_defaults: ClassVar[Mapping[str, Any]] = {"policy": {"type": "pi0", "action_horizon": 50}}


class Pi05CustomConfig(CustomConfig):
    """Your own format for π0.5: openpi's defaults, chunks of 50 actions, the state in the prompt, quantiles.

    States and actions are filled up after they are normalised: quantiles would turn the filling into -1.
    """

    run_defaults: ClassVar[Mapping[str, Any]] = {
        "policy": {"type": "pi05", "action_horizon": 50, "discrete_state_input": True, "max_token_len": 200}
    }
