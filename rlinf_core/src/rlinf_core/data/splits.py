"""Open the training rows or the held-out rows of a run's dataset, whichever plugin reads it."""

from __future__ import annotations

from typing import get_args

import numpy as np

from rlinf_core.contract.datasets import ColumnSource, DatasetConfig, LeRobotDatasetConfig, SampleSource, Split
from rlinf_core.contract.policy import PolicyConfig
from rlinf_core.contract.run import LoadedPlugins, RunConfig
from rlinf_core.errors import UserError

HOLDING_OUT = ("validation_fraction", "validation_episodes", "validation_tasks")
"""Keys of `[data]`; not every dataset has all."""


def open_split(run: RunConfig, plugins: LoadedPlugins, split: Split, *, images: bool = True) -> SampleSource:
    """The rows of a split of a run's dataset; see `open_rows_of`."""
    return open_rows_of(run.data, run.policy, plugins, split, images=images)


def open_rows_of(
    dataset: DatasetConfig, policy: PolicyConfig, plugins: LoadedPlugins, split: Split, *, images: bool = True
) -> SampleSource:
    """The rows of a split, from the plugin that reads the dataset.

    Args:
        dataset: The dataset.
        policy: The policy that gets the rows.
        plugins: The loaded plugins.
        split: Training or held-out rows.
        images: Whether images will be read; if not, a LeRobot dataset's videos may be missing.

    Raises:
        UserError: There is no such split, it has no rows, or no plugin can open the dataset.
    """
    if split not in (splits := get_args(Split)):
        raise UserError(f"there is no split {split!r}: use {' or '.join(splits)}")
    if split == "validation" and not dataset.has_validation:
        keys = [f"data.{key}" for key in HOLDING_OUT if key in type(dataset).model_fields]
        name = dataset.repo_id or dataset.config_name
        raise UserError(f"no episode of {name} is held out for validation: set {' or '.join(keys)}")
    if isinstance(dataset, LeRobotDatasetConfig) and not (images or dataset.stats_need_images):
        dataset = dataset.model_copy(update={"images": {}, "crops": {}, "cache": ""})
    source: SampleSource | None = plugins.hook.rlinf_open_dataset(dataset=dataset, policy=policy, split=split)
    if source is None:
        raise UserError(
            f"No installed plugin opens the dataset {dataset.config_name!r} ({type(dataset).__name__}): "
            "its config must derive from LeRobotDatasetConfig, or a plugin must implement rlinf_open_dataset."
        )
    if not len(source):
        raise UserError(f"the dataset {dataset.config_name!r} has no rows for {split}")
    return source


def open_splits(run: RunConfig, plugins: LoadedPlugins) -> tuple[SampleSource, SampleSource | None]:
    """The training rows, and the held-out rows if the dataset holds episodes out; raises as `open_split` does."""
    train = open_split(run, plugins, "train")
    return train, open_split(run, plugins, "validation") if run.data.has_validation else None


def describe_splits(train: SampleSource, held_out: SampleSource | None) -> str:
    """One line: `92 episodes of 3 tasks, 1607 rows; held out: 16 episodes of 3 tasks, 285 rows`."""
    text = f"{_counted(train)}, {len(train)} rows"
    return text if held_out is None else f"{text}; held out: {_counted(held_out)}, {len(held_out)} rows"


def _counted(source: SampleSource) -> str:
    first = np.unique(source.episodes, return_index=True)[1]
    text = f"{len(first)} episode{'s' * (len(first) != 1)}"
    if isinstance(source, ColumnSource) and "task" in (columns := source.columns(first.tolist())):
        tasks = len(set(columns["task"]))
        text += f" of {tasks} task{'s' * (tasks != 1)}"
    return text
