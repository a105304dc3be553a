"""What a process of an environment and the process that started it send each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlinf_core.contract.environment import ActionSpace, EnvironmentConfig, EnvironmentTask, Start


@dataclass(frozen=True)
class Play:
    """Play an episode."""

    config: EnvironmentConfig
    task: EnvironmentTask
    start: Start
    looks: bool
    """Whether the agent needs observations."""
    video: str = ""
    """File to write a video of the episode to; empty: none."""
    video_every: int = 0
    """Actions between frames; 0: a frame whenever the agent looks."""


@dataclass(frozen=True, eq=False)
class Act:
    """Execute these actions, then ask again."""

    actions: NDArray[np.float32]
    """[n, D], each for `action_repeat` control steps."""


@dataclass(frozen=True, eq=False)
class Asks:
    """An episode has begun, or its last actions are executed: what next?"""

    observation: Mapping[str, Any] | None
    """A row in the dataset's format; None for an agent that does not look."""
    actions: ActionSpace
    steps: int
    """Control steps so far."""
    control_hz: float


@dataclass(frozen=True)
class Ended:
    """The episode has ended."""

    success: bool
    ever: bool
    steps: int
    first_success: int | None
    best_reward: float | None
    failure: str
    has_video: bool
    jerk: float | None = None


@dataclass(frozen=True)
class Broken:
    """The environment raised an error."""

    doing: str
    """What it was doing, such as `reset()`."""
    text: str
    """The error in words, with the last lines of its traceback unless the user can fix it."""
