"""The settings of the environment `maniskill`. Imports neither ManiSkill nor SAPIEN."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata, util
from typing import Literal

from pydantic import Field, model_validator

from rlinf_core import Environment, EnvironmentConfig, EnvironmentTask, UserError
from rlinf_plugins_maniskill.tasks import KNOWN

INSTALL = "pip install 'rlinf-plugins-maniskill[simulator]'"


class ManiskillConfig(EnvironmentConfig):
    """ManiSkill 3, with the columns of RLinf's formats `pi0_maniskill` and `pi05_maniskill`."""

    type: Literal["maniskill"] = "maniskill"
    control_mode: str = "pd_ee_delta_pose"
    """What actions are; the default is RLinf's: displacements of the end effector, along the axes of the robot's base,
    and the gripper. Of the seven numbers in [-1, 1], 1 is 0.1 m or 0.1 rad, and opens the gripper."""
    camera: str = "base_camera"
    """The camera of `observation.images.top`."""
    wrist_camera: str = ""
    """A camera on the hand for the part `observation.images.wrist`, if the robot has one (`hand_camera` of
    `panda_wristcam`)."""
    image_size: int = Field(default=128, ge=16, le=1024)
    """Height and width of the images in pixels; ManiSkill's demonstrations have 128."""
    robot: str = ""
    """The robot, such as `panda_wristcam`; empty: the task's own."""
    state: Literal["qpos", "tcp_pose"] = "qpos"
    """`observation.state`: positions of all joints with the fingers (9 numbers of a Panda), or position and quaternion
    (w, x, y, z) of the tool in the world."""
    shader: Literal["minimal", "default"] = "default"
    """How images are rendered: `minimal` is quicker and without shadows; the data say which."""
    prompts: dict[str, str] = {}
    """Task -> instruction: of the tasks above, for data with other instructions, or of any other id, which becomes a
    task by it."""
    package: str = ""
    """The module that registers ids that ManiSkill does not have, on import."""

    @model_validator(mode="after")
    def _other_ids_have_a_horizon(self) -> ManiskillConfig:
        others = [name for name in self.prompts if name not in KNOWN]
        if others and not self.horizon:
            raise ValueError(f"prompts: the length of {others[0]} is not known: set horizon")
        if self.package and not others:
            raise ValueError("package registers ids that ManiSkill does not have: name them in prompts")
        return self

    def tasks(self) -> Sequence[EnvironmentTask]:
        """The known tasks, and those of `prompts`. Raises `UserError` if ManiSkill is not installed."""
        check_installed()
        known = [EnvironmentTask(name, self.prompts.get(name, one.prompt), one.horizon) for name, one in KNOWN.items()]
        others = [EnvironmentTask(name, text, self.horizon) for name, text in self.prompts.items() if name not in KNOWN]
        return [*known, *others]

    def build(self, task: EnvironmentTask) -> Environment:
        """Build a task. Raises `UserError` if ManiSkill is not installed or cannot render here."""
        check_installed()
        from rlinf_plugins_maniskill.environment import ManiskillEnvironment

        return ManiskillEnvironment(self, task)

    def facts(self) -> dict[str, str]:
        """Versions of ManiSkill, of SAPIEN and of what renders."""
        return {name: metadata.version(name) for name in ("mani_skill", "sapien")}


def check_installed() -> None:
    """Raise `UserError` if the simulator is not installed."""
    if missing := [name for name in ("mani_skill", "sapien") if util.find_spec(name) is None]:
        raise UserError(f"not installed: {', '.join(missing)}. Use: {INSTALL}")
