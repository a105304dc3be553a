"""The rows of a run, in two splits: those for training, and those of the episodes that are held out for validation.

Which episodes are held out depends on the dataset alone, so that runs can be compared.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict

from rlinf_core.config.run import RunConfig
from rlinf_core.datasets import DatasetConfig, SampleSource, Split
from rlinf_core.errors import UserError
from rlinf_core.plugins import Plugins


def open_split(run: RunConfig, plugins: Plugins, split: Split) -> SampleSource:
    """The rows of a split, from the plugin that knows the dataset."""
    source: SampleSource | None = plugins.hook.rlinf_open_dataset(dataset=run.data, policy=run.policy, split=split)
    if source is None:
        raise UserError(
            f"No installed plugin opens the dataset {run.data.config_name!r} ({type(run.data).__name__}): "
            "its config must derive from LeRobotDatasetConfig, or a plugin must implement rlinf_open_dataset."
        )
    return source


def held_out_episodes(config: DatasetConfig, tasks: dict[int, int]) -> frozenset[int]:
    """The episodes of the validation split; the others are for training.

    Args:
        config: Its `validation_episodes`, or its `validation_fraction`, says how many.
        tasks: Episode number -> number of its task.

    Raises:
        UserError: An episode does not exist, or nothing would be left to train on.
    """
    if config.validation_episodes:
        unknown = sorted(set(config.validation_episodes) - tasks.keys())
        if unknown:
            raise UserError(
                f"data.validation_episodes names {unknown}, but the episodes of {config.repo_id} are "
                f"{min(tasks)} to {max(tasks)}"
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
    """A share of every task: its whole part, and one more where the fraction is largest until the total is reached."""
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
    """A sort key in no particular order, the same on every machine and for every version of every library."""
    return hashlib.blake2b(str(number).encode(), digest_size=8).digest()
