"""Episodes: what is to be played, what came of it, and the file that a second start continues."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from rlinf_core.contract.environment import EnvironmentTask, Start
from rlinf_core.errors import UserError
from rlinf_core.files import write_text
from rlinf_core.untrusted.text import parse_json

FILE = "episodes.jsonl"
LARGEST = 256 * 2**20
"""Bytes of an episodes file that is read."""


@dataclass(frozen=True)
class Episode:
    """An episode to play."""

    agent: str
    """Who acts: `policy`, or a baseline's name."""
    task: EnvironmentTask
    number: int
    """Its number within the task, from 0."""
    start: Start

    @property
    def key(self) -> tuple[str, str, int]:
        """What identifies it in the episodes file."""
        return self.agent, self.task.name, self.number


class Result(BaseModel):
    """What came of an episode: a line of the episodes file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    agent: str
    task: str
    number: int
    seed: int
    initial_state: int | None
    success: bool
    """Whether the task was solved at the end."""
    ever: bool
    """Whether it was solved after any control step."""
    steps: int
    """Control steps, without those that let the scene settle."""
    first_success: int | None = None
    """Control steps until the first success."""
    best_reward: float | None = None
    """The largest reward of a control step; None if the environment has none."""
    jerk: float | None = None
    """How unevenly the robot was commanded: the mean over the episode of the Euclidean length of the second difference
    a[i+1] - 2 a[i] + a[i-1] of executed actions, in the data's units; each action counts once, whatever `action_repeat`
    is. For actions that are displacements or velocities, it is proportional to the jerk of the command. None: fewer
    than three actions."""
    failure: str = ""
    """Why the environment could not finish the episode, which then counts as failed."""
    seconds: float = 0.0
    """Wall time."""
    video: str = ""
    """File of its video, relative to the folder of the episodes file; empty: none was kept."""

    @property
    def key(self) -> tuple[str, str, int]:
        """What identifies the episode."""
        return self.agent, self.task, self.number


def plan_episodes(agents: Iterable[str], tasks: Sequence[EnvironmentTask], count: int, seed: int) -> list[Episode]:
    """The episodes of all agents, who get the same ones; tasks alternate, so that a part of them is of all tasks.

    Args:
        agents: Who acts.
        tasks: The tasks.
        count: Episodes per task.
        seed: Seed of the first episode of each task.
    """
    return [
        Episode(
            agent, task, number, Start(seed + number, number % task.initial_states if task.initial_states else None)
        )
        for agent in agents
        for number in range(count)
        for task in tasks
    ]


def in_order(results: Iterable[Result], episodes: Iterable[Episode]) -> list[Result]:
    """Results in the order of their episodes, in whichever they were finished."""
    place = {episode.key: number for number, episode in enumerate(episodes)}
    return sorted((one for one in results if one.key in place), key=lambda one: place[one.key])


class EpisodesFile:
    """The finished episodes of an evaluation: a JSON object per line, after a line that says of what they are."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Open the file, or start it.

        Args:
            path: The file.
            identity: Everything that results depend on: policy, environment, protocol. JSON values.

        Raises:
            UserError: The file is of another evaluation, or damaged.
        """
        self._path = path
        self.results: dict[tuple[str, str, int], Result] = {}
        """Finished episodes."""
        if path.exists():
            self.results = {one.key: one for one in read_episodes(path, identity)}
            # What follows the last newline was being written when the process was killed.
            write_text(path, to_lines(identity, self.results.values()))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, to_lines(identity, ()))

    def add(self, result: Result) -> None:
        """Append a finished episode."""
        self.results[result.key] = result
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result.model_dump()) + "\n")


def to_lines(identity: Mapping[str, Any], results: Iterable[Result]) -> str:
    """The content of an episodes file."""
    lines = [{"evaluation": identity}, *(one.model_dump() for one in results)]
    return "".join(json.dumps(one) + "\n" for one in lines)


def read_episodes(path: Path, identity: Mapping[str, Any]) -> list[Result]:
    """Read an episodes file.

    Raises:
        UserError: It is of another evaluation, or damaged.
    """
    if path.stat().st_size > LARGEST:
        raise UserError(f"{path} is larger than {LARGEST // 2**20} MiB: this is not an episodes file")
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    try:
        first = parse_json(lines[0])
        there = first["evaluation"]
        results = [Result.model_validate(parse_json(line)) for line in lines[1:-1]]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is not an episodes file, or damaged: remove it to play its episodes again") from error
    if there != identity:
        raise UserError(
            f"{path} has episodes of another evaluation ({_difference(there, identity)}): remove it, or name another "
            "place with --output"
        )
    return results


def _difference(there: Any, wanted: Mapping[str, Any]) -> str:
    """Which entries differ."""
    if not isinstance(there, Mapping):
        return "its first line does not say of what"
    keys = [key for key in dict.fromkeys((*wanted, *there)) if there.get(key) != wanted.get(key)]
    return ", ".join(f"{key} was {there.get(key)!r}, now {wanted.get(key)!r}" for key in keys)
