"""An environment of Gymnasium, in a process of its own."""

from __future__ import annotations

import os
import sys

if sys.platform == "linux":  # MuJoCo reads it on import; its default needs a display, and macOS has no EGL.
    os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # Read by pygame, which draws PushT.

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from rlinf_core import ActionSpace, EnvironmentTask, Outcome, Start, UserError
from rlinf_plugins_gymnasium.config import GymnasiumConfig
from rlinf_plugins_gymnasium.tasks import Known

RENDER = "render"
"""The rendered image, as a part of the observation."""


def spec_of(name: str, package: str) -> Any:
    """What an environment is registered with.

    Raises:
        UserError: There is no such environment, or its package is not installed.
    """
    try:
        if package:
            import_module(package)
        return gymnasium.spec(name)
    except (ModuleNotFoundError, gymnasium.error.Error) as error:
        raise UserError(f"the environment {name!r} cannot be found: {error}") from error


class GymnasiumEnvironment:
    """An environment of Gymnasium with a continuous action."""

    def __init__(self, config: GymnasiumConfig, task: EnvironmentTask, known: Known) -> None:
        spec_of(task.name, known.package)
        self._config, self._known, self._name = config, known, task.name
        options: dict[str, Any] = {"render_mode": "rgb_array", **known.options}
        self._env: Any = gymnasium.make(task.name, **options)
        space = self._env.action_space
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
            raise UserError(f"{task.name} has the actions {space}: policies of robots act with one vector")
        self._low, self._high = (np.asarray(one, np.float32) for one in (space.low, space.high))
        self._seen: Any = None

    @property
    def actions(self) -> ActionSpace:
        """The environment's own bounds; without bounds, -1 and 1."""
        low, high = (np.where(np.isfinite(one), one, sign) for one, sign in ((self._low, -1), (self._high, 1)))
        idle = np.zeros_like(low)
        if self._known.actions and self._seen is not None:
            idle = np.asarray(self._part(self._known.actions), np.float32)
        return ActionSpace(low=low.astype(np.float32), high=high.astype(np.float32), idle=idle)

    @property
    def control_hz(self) -> float:
        """As set, or as the environment says."""
        return self._known.control_hz or float(self._env.metadata.get("render_fps", 0.0))

    def reset(self, start: Start) -> None:
        """Reset with the seed."""
        self._seen, _ = self._env.reset(seed=start.seed % 2**31)

    def observe(self) -> Mapping[str, Any]:
        """The parts of the observation, images as uint8 and vectors as float32."""
        return {column: _as_recorded(self._part(path)) for path, column in self._known.observation.items()}

    def step(self, action: NDArray[np.float32]) -> Outcome:
        """Execute one control step."""
        self._seen, reward, terminated, truncated, info = self._env.step(action)
        if self._config.reward_of_success is not None:
            success = reward >= self._config.reward_of_success
        elif self._config.success in info:
            success = bool(info[self._config.success])
        else:
            raise UserError(
                f"{self._name}: a step's info has no {self._config.success!r} (it has {', '.join(info) or 'nothing'}): "
                "set `success` to the key that says whether the task is solved, or `reward_of_success`"
            )
        return Outcome(success=bool(success), ended=bool(terminated or truncated), reward=float(reward))

    def frame(self) -> NDArray[np.uint8]:
        """The rendered image."""
        return np.asarray(self._env.render(), np.uint8)

    def close(self) -> None:
        """Release the renderer."""
        self._env.close()

    def _part(self, path: str) -> Any:
        if path == RENDER:
            return self._env.render()
        found = self._seen
        for key in path.split("/") if path else ():
            if not isinstance(found, Mapping) or key not in found:
                there = ", ".join(found) if isinstance(found, Mapping) else f"an array {np.shape(found)}"
                raise UserError(f"{self._name}: its observation has no {path!r}: there is {there}")
            found = found[key]
        return found


def _as_recorded(value: Any) -> NDArray[Any]:
    array = np.asarray(value)
    return array if array.dtype == np.uint8 else array.astype(np.float32)
