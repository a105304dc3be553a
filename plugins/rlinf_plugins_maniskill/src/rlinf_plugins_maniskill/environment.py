"""A task of ManiSkill, stepped on the CPU without rendering, rendered when the policy looks.

ManiSkill computes in torch: its process loads it, unlike those of other simulators.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rlinf_core import ActionSpace, EnvironmentTask, EpisodeError, Outcome, Start, UserError

if TYPE_CHECKING:
    from rlinf_plugins_maniskill.config import ManiskillConfig

OPEN = 1.0
"""The gripper's action that opens it, in all of ManiSkill's controllers of a Panda."""
IMAGE, WRIST_IMAGE, STATE = "observation.images.top", "observation.images.wrist", "observation.state"


class ManiskillEnvironment:
    """A task of ManiSkill.

    Args:
        config: The settings.
        task: The task.

    Raises:
        UserError: The task, control mode or camera does not exist, or nothing here can render.
    """

    def __init__(self, config: ManiskillConfig, task: EnvironmentTask) -> None:
        import gymnasium

        importlib.import_module("mani_skill.envs")
        if config.package:
            _import_package(config.package)
        self._config = config
        more = {"robot_uids": config.robot} if config.robot else {}
        make: Any = gymnasium.make
        try:
            self._env: Any = make(
                task.name,
                num_envs=1,
                obs_mode="rgb",
                control_mode=config.control_mode,
                sim_backend="physx_cpu",  # One scene: the GPU's physics is for thousands, and differs.
                sensor_configs={
                    "width": config.image_size,
                    "height": config.image_size,
                    "shader_pack": config.shader,
                },
                **more,
            )
        except Exception as error:  # SAPIEN and ManiSkill raise RuntimeError, KeyError, AssertionError and others.
            raise UserError(_why(task.name, config, error)) from error
        self._base: Any = self._env.unwrapped
        self._look = self._base.get_obs
        self._base.get_obs = _without_rendering  # Else each step would render.
        cameras = [config.camera, *([config.wrist_camera] if config.wrist_camera else [])]
        if missing := [name for name in cameras if name not in self._base._sensors]:
            self._env.close()
            there = ", ".join(self._base._sensors) or "none"
            raise UserError(f"{task.name} has no camera {missing[0]!r} (it has {there}): set camera")
        self._seen: Mapping[str, Any] | None = None

    @property
    def control_hz(self) -> float:
        """Control steps per second: 20 unless the task says otherwise."""
        return float(self._base.control_freq)

    @property
    def actions(self) -> ActionSpace:
        """The controller's bounds. Zero displacements with the gripper open do the least, in delta modes."""
        space = self._env.action_space
        idle = np.zeros(space.shape, np.float32)
        idle[-1] = OPEN
        return ActionSpace(low=space.low.astype(np.float32), high=space.high.astype(np.float32), idle=idle)

    def reset(self, start: Start) -> None:
        """Build the scene again as the seed says: the shapes of some tasks depend on it, too."""
        self._env.reset(seed=start.seed % 2**32, options={"reconfigure": True})
        self._seen = None

    def observe(self) -> Mapping[str, Any]:
        """Images uint8 [size, size, 3] and the state, float32 [D]."""
        seen = {IMAGE: self._image(self._config.camera), STATE: self._state()}
        if self._config.wrist_camera:
            seen[WRIST_IMAGE] = self._image(self._config.wrist_camera)
        return seen

    def step(self, action: NDArray[np.float32]) -> Outcome:
        """Execute one control step."""
        if not np.isfinite(action).all():
            raise EpisodeError("an action contains NaN or infinity")
        _, reward, _, truncated, info = self._env.step(np.asarray(action, np.float32))
        self._seen = None
        if not np.isfinite(self._state()).all():
            raise EpisodeError("the simulation has become unstable")
        failed = bool(np.asarray(info.get("fail", False)).any())
        ended = failed or bool(np.asarray(truncated).any())
        return Outcome(bool(np.asarray(info["success"]).any()), ended, float(np.asarray(reward).reshape(-1)[0]))

    def frame(self) -> NDArray[np.uint8]:
        """The image of the fixed camera."""
        return self._image(self._config.camera)

    def close(self) -> None:
        """Release the renderer."""
        self._env.close()

    def _image(self, camera: str) -> NDArray[np.uint8]:
        if self._seen is None:
            self._seen = self._look()["sensor_data"]
        image: NDArray[np.uint8] = np.ascontiguousarray(np.asarray(self._seen[camera]["rgb"].cpu())[0, ..., :3])
        return image.astype(np.uint8, copy=False)

    def _state(self) -> NDArray[np.float32]:
        agent = self._base.agent
        value = agent.tcp.pose.raw_pose if self._config.state == "tcp_pose" else agent.robot.get_qpos()
        state: NDArray[np.float32] = np.asarray(value.cpu(), np.float32)[0]
        return state


def _without_rendering(*_: Any, **__: Any) -> dict[str, Any]:
    return {}


def _import_package(name: str) -> None:
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"package = {name!r} of the environment maniskill cannot be imported: {error}") from error


def _why(task: str, config: ManiskillConfig, error: Exception) -> str:
    """What went wrong when the environment was made, and the way out."""
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    if "render" in said.lower() or "vk::" in said or "physical device" in said:
        return (
            f"ManiSkill cannot render here ({said}). It needs Vulkan: the GPU's driver with its Vulkan part, or Mesa's "
            "software renderer lavapipe of version 24.3 or later (Debian: mesa-vulkan-drivers and libvulkan1, of "
            "bookworm-backports or newer); VK_ICD_FILENAMES names the file of one driver"
        )
    return (
        f"ManiSkill cannot make {task} with control_mode = {config.control_mode!r}"
        f"{f' and robot = {config.robot!r}' if config.robot else ''}: {said}"
    )
