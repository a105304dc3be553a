"""MetaWorld and its renderer, in a process of its own."""

from __future__ import annotations

import os
import sys

if sys.platform == "linux":  # MuJoCo reads it on import; its default needs a display, and macOS has no EGL.
    os.environ.setdefault("MUJOCO_GL", "egl")

from collections.abc import Mapping
from typing import Any

import metaworld
import mujoco
import numpy as np
from numpy.typing import NDArray

from rlinf_core import ActionSpace, EnvironmentTask, EpisodeError, Outcome, Start
from rlinf_plugins_metaworld.config import MetaworldConfig

CONTROL_HZ = 80.0
UPSIDE_DOWN = "corner2"
UPSIDE_DOWN_INDEX = 2
"""Row of `model.cam_pos` of `corner2`, in every scene of MetaWorld."""


class MetaworldEnvironment:
    """A task of MetaWorld, with new random objects and goal for each seed."""

    control_hz = CONTROL_HZ

    def __init__(self, config: MetaworldConfig, task: EnvironmentTask) -> None:
        self._camera, size = config.camera, config.image_size
        one_task: Any = metaworld.MT1
        benchmark = one_task(task.name, seed=42)  # The seed selects a list of goals, which is not used.
        self._env: Any = benchmark.train_classes[task.name]()
        self._env.set_task(benchmark.train_tasks[0])
        self._env._freeze_rand_vec = False  # Otherwise each reset repeats the goal of `set_task`.
        self._env.seeded_rand_vec = True  # Draw from the generator that `seed` seeds, not from NumPy's global one.
        self._env.model.cam_pos[UPSIDE_DOWN_INDEX] = config.camera_position
        if config.antialiasing:
            self._env.model.vis.quality.offsamples = config.antialiasing
        self._env.model.vis.global_.offwidth = max(size, self._env.model.vis.global_.offwidth)
        self._env.model.vis.global_.offheight = max(size, self._env.model.vis.global_.offheight)
        self._renderer = mujoco.Renderer(self._env.model, height=size, width=size)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._renderer.scene.flags[flag] = int(config.shadows)
        self._state: NDArray[np.float32] = np.zeros(4, np.float32)
        self._image: NDArray[np.uint8] | None = None

    @property
    def actions(self) -> ActionSpace:
        """Displacements of the hand along three axes and the gripper's effort, each in [-1, 1]."""
        one = np.ones(4, np.float32)
        return ActionSpace(low=-one, high=one, idle=np.zeros(4, np.float32))

    def reset(self, start: Start) -> None:
        """Place objects and goal as the seed says."""
        self._env.seed(start.seed)
        observation, _ = self._env.reset()
        # MetaWorld moves the goal after its last forward pass: without this one, the first image shows another goal.
        mujoco.mj_forward(self._env.model, self._env.data)
        self._see(observation)

    def observe(self) -> Mapping[str, Any]:
        """The columns of `lerobot/metaworld_mt50`."""
        return {"observation.image": self.frame(), "observation.state": self._state}

    def step(self, action: NDArray[np.float32]) -> Outcome:
        """Execute one control step; actions outside of [-1, 1] are clipped, as MetaWorld does."""
        try:
            observation, reward, _, truncated, info = self._env.step(np.clip(action, -1.0, 1.0))
        except mujoco.FatalError as error:
            raise EpisodeError(f"MuJoCo: {error}") from error
        if not np.isfinite(observation[:4]).all():
            raise EpisodeError("the simulation has become unstable")
        self._see(observation)
        return Outcome(success=bool(info["success"]), ended=bool(truncated), reward=float(reward))

    def frame(self) -> NDArray[np.uint8]:
        """The camera's image, upright."""
        if self._image is None:
            self._renderer.update_scene(self._env.data, camera=self._camera)
            image: NDArray[np.uint8] = self._renderer.render()
            self._image = np.ascontiguousarray(image[::-1, ::-1] if self._camera == UPSIDE_DOWN else image)
        return self._image

    def close(self) -> None:
        """Release the renderer."""
        self._renderer.close()
        self._env.close()

    def _see(self, observation: NDArray[np.float64]) -> None:
        self._state, self._image = observation[:4].astype(np.float32), None
