"""Which episodes a run uses, and which of them are held out for validation.

The config first selects episodes by number, task, length and quality; some of those are then held out. The result
depends only on the dataset and that selection, so that runs can be compared.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rlinf_core.contract.datasets import DatasetConfig, LeRobotDatasetConfig
from rlinf_core.errors import UserError, did_you_mean

UNREAD = -1
"""No task: the rows of the episode were not read."""


@dataclass(frozen=True, eq=False)
class EpisodeTable:
    """What episodes are selected by; arrays are [E]."""

    numbers: NDArray[np.int64]
    """Episode numbers, as the dataset counts them."""
    lengths: NDArray[np.int64]
    """Number of frames."""
    tasks: NDArray[np.int64]
    """The task of each episode's first frame; `UNREAD` for episodes that `chosen_by_number` leaves out."""
    task_texts: dict[int, str]
    quality: NDArray[np.float64] | None = None
    """Values of `data.quality_column`."""
    numbered: bool = True
    """Whether the dataset numbers its tasks; if not (`data.prompt_column` names texts), the numbers mean nothing."""


def chosen_by_number(
    config: LeRobotDatasetConfig, numbers: NDArray[np.int64], lengths: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """[E], the episodes that pass what the metadata alone decide: number and length. Only these are read.

    Args:
        config: The `[data]` table.
        numbers: [E], the dataset's episode numbers.
        lengths: [E], their frames.

    Raises:
        UserError: The config names an episode that the dataset does not have, or no episode is left.
    """
    chosen = np.ones(len(numbers), np.bool_)
    if config.episodes:
        chosen &= np.isin(numbers, _numbers("data.episodes", config, config.episodes, numbers))
    if config.exclude_episodes:
        chosen &= ~np.isin(numbers, _numbers("data.exclude_episodes", config, config.exclude_episodes, numbers))
    if config.min_episode_length:
        chosen &= lengths >= config.min_episode_length
    if config.max_episode_length:
        chosen &= lengths <= config.max_episode_length
    if not (chosen & (lengths > 0)).any():
        raise _none_left(config, lengths)
    return chosen


def split_episodes(config: LeRobotDatasetConfig, table: EpisodeTable) -> tuple[frozenset[int], frozenset[int]]:
    """Return the episodes to train on and the held-out ones.

    Raises:
        UserError: The config names an episode or a task that the dataset does not have, or no episode is left.
    """
    chosen = chosen_by_number(config, table.numbers, table.lengths)
    table = replace(table, tasks=_one_number_a_text(table))
    if config.tasks:
        chosen &= np.isin(table.tasks, _tasks("data.tasks", config, config.tasks, table))
    if config.quality_column and table.quality is not None:
        chosen &= table.quality >= config.min_quality
    if not chosen.any():
        raise _none_left(config, table.lengths, table.quality)
    task_of = dict(zip(table.numbers[chosen].tolist(), table.tasks[chosen].tolist(), strict=True))
    if config.validation_tasks:
        wanted = _tasks("data.validation_tasks", config, config.validation_tasks, table)
        held_out = frozenset(episode for episode, task in task_of.items() if task in wanted)
        if len(held_out) in (0, len(task_of)):
            which = "every episode" if held_out else "no episode"
            raise UserError(f"data.validation_tasks holds out {which} of the selected ones: name other tasks")
    else:
        held_out = held_out_episodes(config, task_of)
    return frozenset(task_of) - held_out, held_out


def _none_left(
    config: LeRobotDatasetConfig, lengths: NDArray[np.int64], quality: NDArray[np.float64] | None = None
) -> UserError:
    keys = ("episodes", "exclude_episodes", "tasks", "min_episode_length", "max_episode_length")
    narrowed = [key for key in keys if getattr(config, key)]
    if quality is not None:
        narrowed.append(f"quality_column (from {np.nanmin(quality):g} to {np.nanmax(quality):g})")
    return UserError(
        f"no episode of {config.repo_id} is left: none of its {len(lengths)} episodes ({lengths.min()} to "
        f"{lengths.max()} frames) passes data." + ", data.".join(narrowed)
    )


def _one_number_a_text(table: EpisodeTable) -> NDArray[np.int64]:
    """Each episode's task, numbered by the first task with the same text: merged datasets list texts twice."""
    first = {text: number for number, text in sorted(table.task_texts.items(), reverse=True) if text}
    number_of = {number: first.get(text, number) for number, text in table.task_texts.items()}
    return np.array([number_of.get(task, task) for task in table.tasks.tolist()], np.int64)


def _numbers(key: str, config: DatasetConfig, named: Sequence[int | str], available: NDArray[np.int64]) -> list[int]:
    """The episode numbers in a list of numbers and ranges."""
    numbers: list[int] = []
    there = set(available.tolist())
    for one in named:
        first, last = (one, one) if isinstance(one, int) else map(int, one.split("-"))
        if first > last or first not in there or last not in there:
            raise UserError(
                f"{key} names {one}, but the episodes of {config.repo_id} are {min(there)} to {max(there)}"
                + ", with gaps" * (len(there) != max(there) - min(there) + 1)
            )
        numbers += range(first, last + 1)
    return numbers


def _tasks(key: str, config: DatasetConfig, named: Sequence[int | str], table: EpisodeTable) -> list[int]:
    """The task numbers for a list of texts and numbers; the first of those that share a text."""
    number_of = {text: number for number, text in sorted(table.task_texts.items(), reverse=True) if text}
    found = []
    for one in named:
        if isinstance(one, int) and not table.numbered:
            raise UserError(f"{key} names {one}, but data.prompt_column contains texts without numbers: name the text")
        number = number_of.get(table.task_texts.get(one, ""), one) if isinstance(one, int) else number_of.get(one)
        if number not in table.task_texts:
            listed = ", ".join(f"{number} {text!r}" for number, text in list(table.task_texts.items())[:10])
            near = did_you_mean(one, number_of) if isinstance(one, str) else ""
            raise UserError(
                f"{key} names {one!r}, which is not a task of {config.repo_id}{near}; it has {len(number_of)}: {listed}"
                + ", ..." * (len(number_of) > 10)
            )
        assert number is not None  # It is one of `task_texts`.
        found.append(number)
    return found


def held_out_episodes(config: DatasetConfig, tasks: dict[int, int]) -> frozenset[int]:
    """The held-out episodes; the others are for training.

    Args:
        config: `validation_episodes` names them, or `validation_fraction` says how many.
        tasks: Episode number -> number of its task.

    Raises:
        UserError: An episode does not exist, or none would be left to train on.
    """
    if config.validation_episodes:
        unknown = sorted(set(config.validation_episodes) - tasks.keys())
        if unknown:
            raise UserError(
                f"data.validation_episodes names {unknown}, but the {len(tasks)} selected episodes of {config.repo_id} "
                f"are numbered {min(tasks)} to {max(tasks)}"
            )
        if set(config.validation_episodes) == tasks.keys():
            raise UserError(
                f"data.validation_episodes holds out every episode of {config.repo_id}: leave some for training"
            )
        return frozenset(config.validation_episodes)
    if config.validation_fraction:
        return _share_of_each_task(config, tasks)
    return frozenset()


def _share_of_each_task(config: DatasetConfig, tasks: dict[int, int]) -> frozenset[int]:
    """Hold out the same share of every task, by the largest-remainder method."""
    members: dict[int, list[int]] = defaultdict(list)
    for episode in sorted(tasks, key=_shuffled):
        members[tasks[episode]].append(episode)
    room = {task: len(episodes) - 1 for task, episodes in members.items()}  # A task never loses its last episode.
    if not any(room.values()):
        raise UserError(
            f"data.validation_fraction = {config.validation_fraction}: each task of {config.repo_id} has only one "
            "episode, so none can be held out; name some in data.validation_episodes"
        )
    exact = {task: len(episodes) * config.validation_fraction for task, episodes in members.items()}
    count = {task: min(int(exact[task]), room[task]) for task in members}
    wanted = max(1, round(len(tasks) * config.validation_fraction))
    for task in sorted(members, key=lambda task: (int(exact[task]) - exact[task], _shuffled(task))):
        if sum(count.values()) < wanted and count[task] < room[task]:
            count[task] += 1
    return frozenset(episode for task, episodes in members.items() for episode in episodes[: count[task]])


def _shuffled(number: int) -> bytes:
    """A pseudo-random sort key that is the same on every machine and with every library version."""
    return hashlib.blake2b(str(number).encode(), digest_size=8).digest()
