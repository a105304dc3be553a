"""A point must pass a disk on one side or the other: the smallest task in which chunks can contradict one another.

Demonstrations pass it above or below, at random. While the point is before the disk and in the middle, both are right,
so that two chunks of a good policy may choose different sides (arXiv 2506.07339, figure 2). A robot that goes on with
one chunk and then switches to the middle of the other runs into the disk. The state is the position alone, without
images, so that a small policy learns it in minutes on one thread.

Two things decide what a delay costs. Without `wind`, and with room around a small disk, nothing that happens during the
delay matters, and only chunks that contradict each other fail: coherence. With wind and a large disk, the policy must
react, and a late reaction fails however chunks are joined.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rlinf_core import ActionSpace, DatasetConfig, EnvironmentConfig, EnvironmentTask, Outcome, Sample, Start
from rlinf_core.data.sample import Row
from rlinf_core.data.transforms import Transform

HZ = 20
STEP = 0.035
"""Way in a control step at the largest command; the course is 1 long."""
DISK = np.array([0.6, 0.0])
WIDTH = 0.13
"""How early demonstrations turn aside."""
TASK = "pass the disk"
HORIZON = 60


@dataclass(frozen=True)
class Conditions:
    """How hard the course is."""

    radius: float = 0.1
    """Of the disk."""
    wind: float = 0.001
    """Standard deviation of what moves the point besides the command, per step."""


def start_of(generator: np.random.Generator) -> NDArray[np.float64]:
    """Where an episode begins."""
    return np.array([0.0, generator.uniform(-0.03, 0.03)])


def move(
    point: NDArray[np.float64], command: NDArray[Any], conditions: Conditions, generator: np.random.Generator
) -> NDArray[np.float64]:
    """The point after a control step; commands are velocities from -1 to 1."""
    moved: NDArray[np.float64] = point + STEP * np.clip(command, -1, 1) + conditions.wind * generator.standard_normal(2)
    return moved


def demonstrate(
    conditions: Conditions, generator: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """States and actions, [N, 2] each, of one demonstration that passes the disk."""
    while True:
        point, states, actions = start_of(generator), [], []
        height = generator.choice([-1, 1]) * generator.uniform(0.28, 0.34)
        while point[0] < 1.0 and len(states) < HORIZON:
            ahead = point[0] + STEP
            aim = np.array([ahead, height * np.exp(-(((ahead - DISK[0]) / WIDTH) ** 2))]) - point
            command = 0.9 * aim / np.linalg.norm(aim) + 0.03 * generator.standard_normal(2)
            states.append(point.astype(np.float32))
            actions.append(command.astype(np.float32))
            point = move(point, command, conditions, generator)
            if np.linalg.norm(point - DISK) < conditions.radius:
                break
        else:
            return np.stack(states), np.stack(actions)


class Repack(Transform):
    """Position and task, without images."""

    def __call__(self, sample: Row) -> Sample:
        """Row -> sample."""
        out = Sample(state=sample["observation.state"], prompt=TASK)
        return {**out, "actions": sample["action"]} if "action" in sample else out


class CourseData(DatasetConfig):
    """Demonstrations, in the columns that the environment has."""

    def repack(self) -> Transform:
        """No camera: of the prefix, only the task is left."""
        return Repack()

    def observation_columns(self) -> tuple[str, ...]:
        """The position."""
        return ("observation.state",)


class Course:
    """The task, as `rollout` plays it."""

    control_hz = float(HZ)
    actions = ActionSpace(low=np.full(2, -1, np.float32), high=np.full(2, 1, np.float32), idle=np.zeros(2, np.float32))

    def __init__(self, conditions: Conditions) -> None:
        self._conditions = conditions

    def reset(self, start: Start) -> None:
        """Start and wind follow from the seed."""
        self._generator = np.random.default_rng(start.seed)
        self._point = start_of(self._generator)

    def observe(self) -> Mapping[str, Any]:
        """The position."""
        return {"observation.state": self._point.astype(np.float32)}

    def step(self, action: NDArray[np.float32]) -> Outcome:
        """Move; touching the disk ends the episode."""
        self._point = move(self._point, action, self._conditions, self._generator)
        touched = bool(np.linalg.norm(self._point - DISK) < self._conditions.radius)
        return Outcome(self._point[0] >= 1.0, touched)

    def frame(self) -> NDArray[np.uint8]:
        """Nothing to see: no videos are kept."""
        return np.zeros((16, 16, 3), np.uint8)

    def close(self) -> None:
        """Nothing to release."""


class CourseConfig(EnvironmentConfig):
    """The environment `course`."""

    type: Literal["course"] = "course"
    replan: int = 4

    def tasks(self) -> list[EnvironmentTask]:
        """The one task."""
        return [EnvironmentTask("course", TASK, HORIZON)]

    def build(self, task: EnvironmentTask) -> Course:
        """The task."""
        return Course(Conditions())
