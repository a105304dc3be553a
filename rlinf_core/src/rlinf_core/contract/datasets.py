"""What a dataset is to the rest of the project: a config that names columns and transforms, and a source of rows.

A `DatasetConfig` subclass is registered by an entry point in the group `rlinf.datasets`; it validates `[data]`.
`LeRobotDatasetConfig` is its form for robot data in LeRobot's layout; `data.lerobot` opens it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from rlinf_core.data.sample import Row
from rlinf_core.data.transforms import Box, Concatenate, Transform

Split = Literal["train", "validation"]
EpisodeRange = Annotated[str, Field(pattern=r"^\d+-\d+$")]
"""`"10-99"`: the first and the last episode."""


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


@runtime_checkable
class ColumnSource(SampleSource, Protocol):
    """A source that can give many rows at once: statistics then take seconds where they took minutes."""

    def columns(self, indices: Sequence[int]) -> Row:
        """Values of `without_images` with rows as their first axis: vectors [N, D], chunks [N, H, D], `task` a list.

        Transforms see such a batch in place of a row if their class says that they take it (`Transform.batched`).
        """
        ...


@runtime_checkable
class DecodingSource(SampleSource, Protocol):
    """A source that decodes its images from videos, and reports with what."""

    def check_decoder(self) -> str:
        """The decoder that the config names, without loading it; empty: there is no video, or no decoder is named.

        Raises:
            UserError: It is not installed.
        """
        ...

    def try_decoder(self) -> str:
        """What decodes the videos, and how fast, measured on a few rows; empty without videos."""
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
    """A local folder, or the id of a dataset on the hub, `owner/name` with an optional `@revision`."""
    revision: str = ""
    """Branch, tag or commit on the hub; empty: the hub's default."""
    num_workers: int = Field(default=2, ge=0)
    """Loader processes a rank; 0 loads in the training process."""
    shuffle: Literal["random", "chunked"] = "random"
    """`random` takes rows in random order. `chunked` reads runs of consecutive frames and mixes them in a buffer: for
    videos that are slow to seek in. Not for mixtures."""
    streams: int = Field(default=64, ge=1)
    """Chunked: virtual streams over all ranks, each with runs and a buffer of its own. A multiple of the number of
    ranks, and of any the run is to continue on."""
    chunk_frames: int = Field(default=16, ge=1)
    """Chunked: consecutive frames that are read together."""
    shuffle_buffer: int = Field(default=8192, ge=1)
    """Chunked: samples of all ranks together that wait to be drawn, in memory with their images as the policy gets
    them (0.15 MB an image of 224 x 224)."""
    norm_stats: str = ""
    """A `norm_stats.json` to use; empty: computed from the training rows when the run starts."""
    norm_floor: float = Field(default=0.0, ge=0.0)
    """The smallest spread by which a number is divided: standard deviation, or half of q99 - q01; in the data's units.
    Statistics with less are widened before they are used and kept. 0: none are, as in openpi."""
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

    @model_validator(mode="after")
    def _buffers_hold_runs(self) -> DatasetConfig:
        changed = [key for key in ("streams", "chunk_frames", "shuffle_buffer") if self._differs(key)]
        if self.shuffle == "random" and changed:
            raise ValueError(f'{changed[0]} does nothing without shuffle = "chunked"')
        if self.shuffle_buffer < self.streams * self.chunk_frames:
            raise ValueError(
                f"shuffle_buffer = {self.shuffle_buffer} is less than one run for each stream, streams x chunk_frames "
                f"= {self.streams * self.chunk_frames}: raise it, or lower one of these"
            )
        return self

    def _differs(self, key: str) -> bool:
        return bool(getattr(self, key) != type(self).model_fields[key].default)

    @property
    def has_validation(self) -> bool:
        """Whether any episode is held out."""
        return bool(self.validation_fraction or self.validation_episodes)

    def given_statistics(self) -> str:
        """The file of statistics to use; empty: computed from the training rows when the run starts."""
        return self.norm_stats

    @classmethod
    def facts(cls) -> dict[str, Any]:
        """What the class knows of its data without opening them, for `rlinf datasets --json`."""
        return {}

    def repack(self) -> Transform:
        """The transform from a row to a sample in the data's own units; it has no inverse."""
        raise NotImplementedError(f"{type(self).__name__} must define repack()")

    def observation_columns(self) -> Sequence[str]:
        """The columns that an acting policy needs of a row; empty where only `repack` knows."""
        return ()

    def transforms(self) -> Sequence[Transform]:
        """Transforms between repacking and normalisation; the inverses run in reverse on the policy's actions."""
        return ()


class Crop(BaseModel):
    """A part of a camera's image, in pixels from its upper left corner."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    top: int = Field(default=0, ge=0)
    """Rows cut off above."""
    left: int = Field(default=0, ge=0)
    """Columns cut off on the left."""
    height: int = Field(ge=1)
    """Rows kept."""
    width: int = Field(ge=1)
    """Columns kept."""

    @property
    def box(self) -> Box:
        """As the transform takes it."""
        return Box(self.top, self.left, self.height, self.width)


class LeRobotDatasetConfig(DatasetConfig):
    """Robot data in LeRobot's layout: which column is which. Several columns of one kind are concatenated."""

    images: dict[str, str] = {}
    """Camera name of the policy -> image column of the dataset."""
    crops: dict[str, Crop] = {}
    """Camera name of the policy -> the part of its image that is kept, `{ top, left, height, width }` in pixels."""
    state: tuple[str, ...] = ("observation.state",)
    """Columns of the proprioceptive state."""
    actions: tuple[str, ...] = ("action",)
    """Columns of the action."""
    stride: int = Field(default=1, ge=1)
    """Frames from one action of a chunk to the next: 2 makes chunks of every second frame, for a robot that is
    controlled at half the dataset's rate."""
    prompt_from_task: bool = True
    """Whether the prompt is the row's own task text. Otherwise it is `default_prompt`."""
    default_prompt: str = ""
    """The prompt of rows that have no task text, or of all rows if `prompt_from_task` is false."""
    episodes: tuple[int | EpisodeRange, ...] = ()
    """Episodes to use, numbers and ranges: `[7, "10-99"]` is 7 and 10 to 99. Empty: all."""
    exclude_episodes: tuple[int | EpisodeRange, ...] = ()
    """Episodes to leave out, in the same form."""
    tasks: tuple[int | str, ...] = ()
    """Use episodes of these tasks only: texts, or numbers of the dataset (`task_index`). An episode's task is that of
    its first frame."""
    min_episode_length: int = Field(default=0, ge=0)
    """Leave out episodes of fewer frames."""
    max_episode_length: int = Field(default=0, ge=0)
    """Leave out episodes of more frames; 0: no limit."""
    quality_column: str = ""
    """A number or a truth value of each episode (a column of `meta/episodes`), or of each frame, which counts by its
    mean over the episode."""
    min_quality: float = 1.0
    """Leave out episodes with less in `quality_column`. Truth values count 0 and 1."""
    decoder: Literal["auto", "torchcodec", "pyav"] = "auto"
    """What decodes videos. `auto`: torchcodec where it loads, else PyAV, which is slower; a run says which."""
    cache: Literal["", "raw", "jpeg"] = ""
    """Read pictures from what `rlinf cache` has made, instead of decoding the dataset's: `raw`, bit-equal, or `jpeg`,
    smaller and with a loss. Empty: decode."""
    cache_quality: int = Field(default=95, ge=1, le=100)
    """Of JPEG, the `--quality` that the cache was made with: other pictures are another run."""
    cache_dir: str = ""
    """Folder of caches; empty: `frames` in `RLINF_CACHE`, by default `~/.cache/rlinf_core`."""
    validation_tasks: tuple[int | str, ...] = ()
    """Hold out all episodes of these tasks, instead of a share: how the policy does on tasks it has not seen."""

    @property
    def has_validation(self) -> bool:
        """Whether any episode is held out."""
        return super().has_validation or bool(self.validation_tasks)

    @model_validator(mode="after")
    def _makes_sense(self) -> LeRobotDatasetConfig:
        if mistakes := self.mistakes():
            raise ValueError("\n".join(mistakes))
        return self

    def mistakes(self) -> list[str]:
        """Everything that is wrong with the fields taken together; a subclass that knows more adds to it.

        Called when a config is made, so that all is reported at once.
        """
        return [
            *_twice("images", self.images.values()),
            *_twice("state", self.state),
            *_twice("actions", self.actions),
            *(f"{name!r} is named in state and in actions" for name in self.state if name in self.actions),
            *(
                f"crops names {name}, which images does not: {', '.join(self.images) or 'there are none'}"
                for name in self.crops
                if name not in self.images
            ),
            *(
                ["prompt_from_task = false needs default_prompt, the prompt of every row"]
                if not self.prompt_from_task and not self.default_prompt
                else []
            ),
            *(
                ['cache_quality is that of cache = "jpeg": set both']
                if self.cache_quality != 95 and self.cache != "jpeg"
                else []
            ),
            *self._wrong_subset(),
        ]

    def _wrong_subset(self) -> Iterator[str]:
        """What is wrong with the choice of episodes."""
        if self.validation_tasks and super().has_validation:
            yield "set one of validation_tasks, validation_fraction and validation_episodes"
        if self.min_quality != 1.0 and not self.quality_column:
            yield "min_quality needs quality_column, which names what it is compared with"
        if self.max_episode_length and self.max_episode_length < self.min_episode_length:
            yield f"max_episode_length {self.max_episode_length} is less than min_episode_length"

    @classmethod
    def facts(cls) -> dict[str, Any]:
        """The columns that its defaults name."""
        return {key: cls.model_fields[name].get_default() for key, name in _COLUMN_FACTS.items()}

    def observation_columns(self) -> Sequence[str]:
        """Cameras, state, and the task unless there is a prompt without it."""
        return (*self.images.values(), *self.state, *(() if self.default_prompt else ("task",)))

    def repack(self) -> Transform:
        """Rename the dataset's columns to a sample's keys and cut the images."""
        return Concatenate(
            images=self.images,
            state=self.state,
            actions=self.actions,
            default_prompt=self.default_prompt,
            prompt_from_task=self.prompt_from_task,
            crops={name: crop.box for name, crop in self.crops.items()},
        )


_COLUMN_FACTS = {"cameras": "images", "state": "state", "actions": "actions"}


def _twice(key: str, columns: Iterable[str]) -> list[str]:
    """What is wrong with a list of columns by itself."""
    counts = Counter(columns)
    wrong = [f"{key} names {column!r} {count} times" for column, count in counts.items() if count > 1]
    return wrong + [f"{key} holds an empty column name"] * ("" in counts)
