"""Open the training rows or the held-out rows of a run's dataset, whichever plugin reads it."""

from __future__ import annotations

import numpy as np

from rlinf_core.contract.datasets import ColumnSource, SampleSource, Split
from rlinf_core.contract.run import LoadedPlugins, RunConfig
from rlinf_core.errors import UserError


def open_split(run: RunConfig, plugins: LoadedPlugins, split: Split) -> SampleSource:
    """The rows of a split, from the plugin that reads the dataset."""
    source: SampleSource | None = plugins.hook.rlinf_open_dataset(dataset=run.data, policy=run.policy, split=split)
    if source is None:
        raise UserError(
            f"No installed plugin opens the dataset {run.data.config_name!r} ({type(run.data).__name__}): "
            "its config must derive from LeRobotDatasetConfig, or a plugin must implement rlinf_open_dataset."
        )
    return source


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
