"""A simulator as the site: rows that are recorded in it.

Actions of demonstrations are executed one at a time, and what the simulator shows before each is recorded with it. The
rows have the columns of the training data, so that the tests of the site apply to them: what the simulator shows, and
what actions do in it, must be as in training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlinf_core.contract.datasets import LeRobotDatasetConfig, SampleSource
from rlinf_core.data.sample import Row
from rlinf_core.errors import UserError
from rlinf_core.inference import LoadedPolicy
from rlinf_core.rollout.agents import Agent, PolicyAgent, Replay, demonstrations_of, seconds_per_action
from rlinf_core.rollout.config import RolloutSettings
from rlinf_core.rollout.episodes import plan_episodes
from rlinf_core.rollout.play import play
from rlinf_core.rollout.pool import Asking

RECORDED = "recorded"
EPISODES = 12
"""Episodes to record, over all tasks."""
MOST_STEPS = 40
"""Actions of an episode to record."""


@dataclass(eq=False)
class Recorder:
    """Executes the actions of another agent one at a time, and records what it saw."""

    agent: Agent
    episodes: dict[tuple[str, int], list[tuple[Mapping[str, Any], NDArray[np.floating]]]] = field(default_factory=dict)
    prompts: dict[tuple[str, int], str] = field(default_factory=dict)
    looks: bool = True

    def __call__(self, asking: Sequence[Asking]) -> list[NDArray[np.floating]]:
        """The next action of each episode."""
        chunks = [chunk[:1] for chunk in self.agent(asking)]
        for one, chunk in zip(asking, chunks, strict=True):
            key = one.episode.task.name, one.episode.number
            rows = self.episodes.setdefault(key, [])
            self.prompts[key] = one.episode.task.prompt
            if len(rows) < self._length(one):
                rows.append((one.observation or {}, np.asarray(chunk[0])))
        return chunks

    def _length(self, one: Asking) -> int:
        """Actions to record: a demonstration that has ended is followed by idle actions, which are of no use."""
        if not isinstance(self.agent, Replay):
            return MOST_STEPS
        found = self.agent.demonstrations[one.episode.task.prompt]
        return min(MOST_STEPS, len(found[one.episode.number % len(found)]))


class RecordedRows:
    """Recorded rows; implements `SampleSource`."""

    def __init__(self, recorder: Recorder, data: LeRobotDatasetConfig, example: Row, steps: int, name: str) -> None:
        """Make rows of what was recorded.

        Args:
            recorder: What was recorded.
            data: Names the columns.
            example: A training row, for the widths of action columns.
            steps: Actions of a chunk.
            name: The simulator's name.
        """
        self._rows: list[Row] = []
        self._name = name
        episodes: list[int] = []
        widths = [np.shape(example[column])[-1] for column in data.actions]
        for number, (key, rows) in enumerate(recorder.episodes.items()):
            actions = np.stack([action for _, action in rows])
            for frame, (observation, _) in enumerate(rows):
                at = np.minimum(np.arange(frame, frame + steps), len(rows) - 1)
                row: Row = {**observation, "task": recorder.prompts[key], "episode_index": number, "frame_index": frame}
                start = 0
                for column, width in zip(data.actions, widths, strict=True):
                    row[column] = actions[at, start : start + width].astype(np.float32)
                    row[f"{column}_is_pad"] = np.arange(frame, frame + steps) >= len(rows)
                    start += width
                self._rows.append(row)
                episodes.append(number)
        if not self._rows:
            raise UserError(f"nothing could be recorded in {name}")
        self._episodes = np.asarray(episodes, np.int64)
        self._images = frozenset(data.images.values())

    @property
    def episodes(self) -> NDArray[np.int64]:
        """[N]."""
        return self._episodes

    def __len__(self) -> int:
        return len(self._rows)

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        return [dict(self._rows[index]) for index in indices]

    def without_images(self, indices: Sequence[int]) -> list[Row]:
        """Rows without image columns."""
        rows = (self._rows[index] for index in indices)
        return [{key: value for key, value in row.items() if key not in self._images} for row in rows]

    def describe(self, index: int) -> str:
        """Episode and frame."""
        row = self._rows[index]
        return f"{self._name}, episode {row['episode_index']}, frame {row['frame_index']}"

    def fingerprint(self) -> str:
        """Recorded rows are not kept."""
        return ""


def record_site(
    settings: RolloutSettings, policy: LoadedPolicy, training: SampleSource | None
) -> tuple[RecordedRows, str]:
    """Record rows in a simulator, while demonstrations of the same tasks are replayed; without any, the policy acts.

    Args:
        settings: The simulator and its tasks.
        policy: The policy.
        training: Its training rows.

    Returns:
        The rows, and how the simulator's rate differs from that of the data.

    Raises:
        UserError: The simulator fails, or the data are not in LeRobot's layout.
    """
    data = policy.data
    if training is None or not isinstance(data, LeRobotDatasetConfig):
        raise UserError("rows of a simulator are compared with those of training, which are not on this machine")
    tasks = settings.chosen_tasks()
    demonstrations = demonstrations_of(training, policy.pipeline, [task.prompt for task in tasks])
    known = [task for task in tasks if task.prompt in demonstrations]
    agent: Agent = Replay(demonstrations, settings.env) if known else PolicyAgent(policy.act, 1)
    recorder, notes = Recorder(agent), list[str]()
    shortest = settings.env.action_repeat * MOST_STEPS
    short = settings.model_copy(
        update={"env": settings.env.model_copy(update={"horizon": shortest}), "videos": 0, "baselines": ()}
    )
    chosen = known or tasks
    per_task = max(1, -(-EPISODES // len(chosen)))
    episodes = plan_episodes([RECORDED], chosen[:EPISODES], per_task, settings.seed)
    play(
        short,
        episodes,
        {RECORDED: recorder},
        step_seconds=seconds_per_action(training),
        warn=notes.append,
    )
    example = training.without_images([0])[0]
    rows = RecordedRows(recorder, data, example, policy.config.chunk_length(), settings.env.type)
    return rows, notes[0] if notes else ""
