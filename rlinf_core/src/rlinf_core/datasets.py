"""What a dataset is to the rest of the project: a config that names columns and transforms, and a source of rows.

A `DatasetConfig` subclass is registered by an entry point in the group `rlinf.datasets`; it validates `[data]`.
`LeRobotDatasetConfig` is its form for robot data in LeRobot's layout; `data.lerobot` opens it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from rlinf_core.data.sample import Row
from rlinf_core.data.transforms import Concatenate, Transform

Split = Literal["train", "validation"]


class SampleSource(Protocol):
    """Random access to the rows of one split. Safe to pickle into loader workers; opens files on first use."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        """Rows with images decoded; each `0 <= index < len(self)`."""
        ...

    def without_images(self, indices: Sequence[int]) -> list[Row]:
        """The same rows without their image columns; decodes nothing."""
        ...

    @property
    def episodes(self) -> NDArray[np.int64]:
        """[N], the dataset's own episode number of each row."""
        ...

    def describe(self, index: int) -> str:
        """Where a row comes from, for error messages: dataset, file, episode and frame."""
        ...

    def fingerprint(self) -> str:
        """A hash of what the rows are made of (not of the pixels); it changes when the data does."""
        ...


class DatasetConfig(BaseModel):
    """The `[data]` table. Subclasses add fields; every field may be set in TOML."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    run_defaults: ClassVar[Mapping[str, Any]] = {}
    """Defaults this dataset sets for the run, as a TOML table: `{"policy": {"type": "pi05", "action_horizon": 5}}`."""
    compatible_policies: ClassVar[tuple[str, ...]] = ()
    """Policy types that fit besides the one named in `run_defaults`."""

    config_name: str = ""
    """The registered name of this format, from `rlinf datasets`; `distribution:name` when two packages use one name."""
    repo_id: str = ""
    """A local folder, or the id of a dataset on the hub."""
    revision: str = ""
    """Branch, tag or commit on the hub; empty: the hub's default."""
    num_workers: int = Field(default=2, ge=0)
    """Loader processes a rank; 0 loads in the training process."""
    norm_stats: str = ""
    """A `norm_stats.json` to use; empty: computed from the training rows when the run starts."""
    stats_need_images: bool = False
    """Whether a transform looks at images to make state or actions, so that statistics must decode them (slow)."""
    validation_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the episodes, taken evenly over the tasks, that is held out of training for validation."""
    validation_episodes: tuple[int, ...] = ()
    """Episode numbers to hold out, instead of a share."""

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> DatasetConfig:
        if self.validation_fraction and self.validation_episodes:
            raise ValueError("set validation_fraction or validation_episodes, not both")
        return self

    @property
    def has_validation(self) -> bool:
        """Whether any episode is held out."""
        return bool(self.validation_fraction or self.validation_episodes)

    def repack(self) -> Transform:
        """The transform from a row to a sample in the data's own units; it has no inverse."""
        raise NotImplementedError(f"{type(self).__name__} must define repack()")

    def observation_columns(self) -> Sequence[str]:
        """The columns that an acting policy needs of a row; empty where only `repack` knows."""
        return ()

    def transforms(self) -> Sequence[Transform]:
        """Transforms between repacking and normalisation; the inverses run in reverse on the policy's actions."""
        return ()


class LeRobotDatasetConfig(DatasetConfig):
    """Robot data in LeRobot's layout: which column is which. Several columns of one kind are concatenated."""

    images: dict[str, str] = {}
    """Camera name of the policy -> image column of the dataset."""
    state: tuple[str, ...] = ("observation.state",)
    """Columns of the proprioceptive state."""
    actions: tuple[str, ...] = ("action",)
    """Columns of the action."""
    default_prompt: str = ""
    """The prompt of every row; empty: the row's own task text."""

    def observation_columns(self) -> Sequence[str]:
        """Cameras, state, and the task unless there is a default prompt."""
        return (*self.images.values(), *self.state, *(() if self.default_prompt else ("task",)))

    def repack(self) -> Transform:
        """Rename the dataset's columns to a sample's keys."""
        return Concatenate(
            images=self.images, state=self.state, actions=self.actions, default_prompt=self.default_prompt
        )
