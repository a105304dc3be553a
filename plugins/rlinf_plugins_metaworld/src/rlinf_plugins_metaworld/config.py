"""The settings of the environment `metaworld`. Imports neither MetaWorld nor MuJoCo."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata, util
from typing import Literal

from pydantic import Field, model_validator

from rlinf_core import Environment, EnvironmentConfig, EnvironmentTask, UserError
from rlinf_plugins_metaworld.tasks import HORIZON, PROMPTS

SUCCESS_LASTS = 40
"""Half a second."""


class MetaworldConfig(EnvironmentConfig):
    """MetaWorld, as `lerobot/metaworld_mt50` recorded it: 80 Hz, one camera, the hand's position and its opening."""

    type: Literal["metaworld"] = "metaworld"
    after_success: int = Field(default=SUCCESS_LASTS, ge=0)
    """Control steps, of 80 per second, to continue after the first success, to see whether it lasts."""
    image_size: int = Field(default=480, ge=16, le=1024)
    """Height and width of the images in pixels: those of the data, so that the policy's resizing does the same."""
    camera: Literal["corner2", "corner", "corner3", "corner4", "topview", "behindGripper", "gripperPOV"] = "corner2"
    """The camera. Images of `corner2`, which is mounted upside down, are turned by 180 degrees, as in the data."""
    camera_position: tuple[float, float, float] = (0.75, 0.075, 0.7)
    """Where `corner2` is, in metres; the default is that of lerobot's data, MetaWorld's own is (1.3, -0.2, 1.1). Other
    cameras stay where they are."""
    shadows: bool = True
    """Render shadows and reflections, which takes longer; the data say which."""
    antialiasing: int = Field(default=0, ge=0, le=16)
    """Samples per pixel; 0: as MetaWorld's scenes say."""
    prompts: dict[str, str] = {}
    """Task -> instruction, for data whose instructions are not those of `lerobot/metaworld_mt50`."""

    @model_validator(mode="after")
    def _prompts_are_of_tasks(self) -> MetaworldConfig:
        if unknown := [name for name in self.prompts if name not in PROMPTS]:
            raise ValueError(f"prompts: MetaWorld has no task {unknown[0]!r}")
        return self

    def tasks(self) -> Sequence[EnvironmentTask]:
        """The 50 tasks, by the numbers of `lerobot/metaworld_mt50`."""
        check_installed()
        return [EnvironmentTask(name, self.prompts.get(name, text), HORIZON) for name, text in PROMPTS.items()]

    def build(self, task: EnvironmentTask) -> Environment:
        """Build the environment of a task, with its renderer."""
        check_installed()
        from rlinf_plugins_metaworld.environment import MetaworldEnvironment

        return MetaworldEnvironment(self, task)

    def facts(self) -> dict[str, str]:
        """Versions of MetaWorld and MuJoCo."""
        return {name: metadata.version(name) for name in ("metaworld", "mujoco")}


def check_installed() -> None:
    """Raise `UserError` if the simulator is not installed."""
    missing = [name for name in ("metaworld", "mujoco") if util.find_spec(name) is None]
    if missing:
        raise UserError(f"not installed: {', '.join(missing)}. Use: pip install 'rlinf-plugins-metaworld[simulator]'")
