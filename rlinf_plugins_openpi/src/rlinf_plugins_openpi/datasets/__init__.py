"""Dataset formats for π0 and π0.5, a short file a family; each class is registered in the group `rlinf.datasets`.

A format of your own subclasses `Pi0DatasetConfig` or `Pi05DatasetConfig` and fills in the facts of the robot. A class
writes its `run_defaults` whole: they replace those of its parent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator

from rlinf_core import LeRobotDatasetConfig
from rlinf_core.data.transforms import RelativeActions, SliceActions, Transform
from rlinf_plugins_openpi.transforms import CAMERAS


class OpenpiDatasetConfig(LeRobotDatasetConfig):
    """What both policies' datasets share: the three cameras' names, the robot's action and what is relative in it."""

    action_width: int = Field(default=0, ge=0)
    """Numbers of the robot's action, to which the policy's is cut; 0: as many as the statistics have."""
    relative: tuple[bool, ...] = ()
    """Which numbers of the action become relative to the same number of the state; those not named stay absolute."""

    @field_validator("images")
    @classmethod
    def _known_cameras(cls, images: dict[str, str]) -> dict[str, str]:
        if unknown := sorted(images.keys() - set(CAMERAS)):
            raise ValueError(f"the policy has no camera {', '.join(unknown)}: name some of {', '.join(CAMERAS)}")
        return images

    @model_validator(mode="after")
    def _facts_of_the_robot_are_there(self) -> OpenpiDatasetConfig:
        if not self.images:
            raise ValueError(f"images is empty: name the image column of at least one of {', '.join(CAMERAS)}")
        if any(self.relative) and not self.state:
            raise ValueError("relative actions need a state: name its columns in state, or leave relative empty")
        if self.action_width and len(self.relative) > self.action_width:
            raise ValueError(f"relative has {len(self.relative)} entries, an action has {self.action_width} numbers")
        return self

    def transforms(self) -> Sequence[Transform]:
        """Relative actions where asked for. The inverse adds the state, then cuts to the robot's action."""
        transforms: list[Transform] = []
        if self.action_width:
            transforms.append(SliceActions(self.action_width))
        if any(self.relative):
            transforms.append(RelativeActions(self.relative))
        return tuple(transforms)


class Pi0DatasetConfig(OpenpiDatasetConfig):
    """A dataset that trains π0 unless its class says otherwise."""

    run_defaults: ClassVar[Mapping[str, Any]] = {"policy": {"type": "pi0"}}


class Pi05DatasetConfig(OpenpiDatasetConfig):
    """A dataset that trains π0.5 unless its class says otherwise."""

    run_defaults: ClassVar[Mapping[str, Any]] = {"policy": {"type": "pi05"}}
