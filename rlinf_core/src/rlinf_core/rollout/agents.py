"""Who acts in a simulator: a policy, and the baselines that show what luck gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rlinf_core.contract.datasets import SampleSource, TaskSource, TimedSource
from rlinf_core.contract.environment import EnvironmentConfig
from rlinf_core.contract.evaluation import EvaluationPipeline
from rlinf_core.rollout.config import BaselineName
from rlinf_core.rollout.pool import Asking

POLICY = "policy"
BLIND_CHUNK = 50
"""Actions that an agent which does not look gives at a time."""
MOST_DEMONSTRATIONS = 50
"""Demonstrations per task that are replayed in turn."""

Act = Callable[[Sequence[Mapping[str, Any]], Sequence[np.random.Generator]], list[NDArray[np.floating]]]
"""Observations and a generator for each -> a chunk of actions for each, [H, D], in the data's units."""


class Agent(Protocol):
    """Chooses actions."""

    @property
    def looks(self) -> bool:
        """Whether it needs observations."""
        ...

    def __call__(self, asking: Sequence[Asking]) -> list[NDArray[np.floating]]:
        """The actions for each episode that asks, [n, D]."""
        ...


@dataclass(frozen=True)
class PolicyAgent:
    """A policy, which computes the actions of all episodes that ask as one batch."""

    act: Act
    replan: int
    """Actions of a chunk to execute; 0: all."""
    looks: bool = True

    def __call__(self, asking: Sequence[Asking]) -> list[NDArray[np.floating]]:
        """The first actions of the policy's chunks."""
        chunks = self.act([one.observation or {} for one in asking], [one.generator for one in asking])
        return [chunk[: self.replan or None] for chunk in chunks]


@dataclass(frozen=True)
class Idle:
    """Does nothing, or as little as the controller can."""

    looks: bool = False

    def __call__(self, asking: Sequence[Asking]) -> list[NDArray[np.floating]]:
        """The idle action."""
        return [np.tile(one.space.idle, (BLIND_CHUNK, 1)) for one in asking]


@dataclass(frozen=True)
class Random:
    """Acts at random, uniformly between the bounds."""

    looks: bool = False

    def __call__(self, asking: Sequence[Asking]) -> list[NDArray[np.floating]]:
        """Independent random actions."""
        return [
            one.generator.uniform(one.space.low, one.space.high, (BLIND_CHUNK, len(one.space.idle))) for one in asking
        ]


@dataclass(frozen=True)
class Replay:
    """Replays recorded episodes of the same task without looking: episode i replays demonstration i, and then idles."""

    demonstrations: Mapping[str, Sequence[NDArray[np.floating]]]
    """Instruction -> the actions of its demonstrations, [steps, D]."""
    config: EnvironmentConfig
    looks: bool = False

    def __call__(self, asking: Sequence[Asking]) -> list[NDArray[np.floating]]:
        """The next actions of each demonstration."""
        return [self._next(one) for one in asking]

    def _next(self, one: Asking) -> NDArray[np.floating]:
        found = self.demonstrations[one.episode.task.prompt]
        actions = found[one.episode.number % len(found)]
        position = one.steps // self.config.action_repeat
        left = actions[position : position + BLIND_CHUNK]
        return left if len(left) else np.tile(one.space.idle, (BLIND_CHUNK, 1))


def demonstrations_of(
    rows: SampleSource, pipeline: EvaluationPipeline, prompts: Sequence[str]
) -> dict[str, list[NDArray[np.floating]]]:
    """The recorded actions of episodes, by instruction, in the data's units.

    Args:
        rows: The rows of the demonstrations.
        pipeline: The dataset's transforms.
        prompts: The instructions to look for; those without a demonstration are left out.
    """
    episodes = rows.episodes
    starts = np.flatnonzero(np.r_[True, episodes[1:] != episodes[:-1]])
    ends = np.r_[starts[1:], len(episodes)]
    wanted, found = set(prompts), dict[str, list[NDArray[np.floating]]]()
    texts = _task_of_rows(rows, starts.tolist())
    for start, end, text in zip(starts.tolist(), ends.tolist(), texts, strict=True):
        if text in wanted and len(found.setdefault(text, [])) < MOST_DEMONSTRATIONS:
            targets = (pipeline.target(row) for row in rows.without_images(range(start, end)))
            found[text].append(np.stack([np.asarray(target["actions"])[0] for target in targets]))
    return found


def seconds_per_action(rows: SampleSource) -> float:
    """Seconds between the actions of a chunk; 0 if the source does not know."""
    return rows.step_seconds() if isinstance(rows, TimedSource) else 0.0


def _task_of_rows(rows: SampleSource, indices: Sequence[int]) -> list[str]:
    if isinstance(rows, TaskSource):
        numbers, texts = rows.tasks()
        return [texts.get(int(numbers[index]), "") for index in indices]
    return [str(row.get("task", "")) for row in rows.without_images(indices)]


def build_baselines(
    names: Sequence[BaselineName],
    config: EnvironmentConfig,
    demonstrations: Mapping[str, Sequence[NDArray[np.floating]]],
) -> dict[str, Agent]:
    """The baselines that can be played; `replay` only if there are demonstrations."""
    agents: dict[str, Agent] = {}
    for name in names:
        if name == "idle":
            agents[name] = Idle()
        elif name == "random":
            agents[name] = Random()
        elif demonstrations:
            agents[name] = Replay(demonstrations, config)
    return agents
