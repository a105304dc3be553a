"""Isaac Lab's cube stacking in the columns of `RLinf/IsaacLab-Stack-Cube-Data`: a front and a wrist camera."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from rlinf_core.data.transforms import Transform
from rlinf_plugins_openpi.datasets.config import OpenpiDatasetConfig
from rlinf_plugins_openpi.inputs.transforms import SignOf

GRIPPER = 6


class Pi05IsaaclabStackCubeConfig(OpenpiDatasetConfig):
    """Stacking cubes for π0.5, in chunks of 10 actions and without the state.

    The actions are already displacements. The dataset has one task, whose text all rows get. The gripper has two
    commands, so its predicted number is replaced by its sign.
    """

    run_defaults: ClassVar[Mapping[str, Any]] = {
        "policy": {"type": "pi05", "action_horizon": 10, "discrete_state_input": False}
    }

    repo_id: str = "RLinf/IsaacLab-Stack-Cube-Data"
    images: dict[str, str] = {"base_0_rgb": "observation.images.front", "left_wrist_0_rgb": "observation.images.wrist"}
    prompt_from_task: bool = False
    default_prompt: str = "Stack the red block on the blue block, then stack the green block on the red block"
    raw_action_is_delta: bool = True
    action_width: int = GRIPPER + 1

    def transforms(self) -> Sequence[Transform]:
        """The sign comes first, so that its inverse runs last, on the robot's numbers."""
        return (SignOf(GRIPPER), *super().transforms())
