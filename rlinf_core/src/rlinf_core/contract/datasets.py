"""The dataset interface: a config that names columns and transforms, and a source of rows.

A `DatasetConfig` subclass is registered by an entry point in the group `rlinf.datasets`; it validates `[data]`.
`LeRobotDatasetConfig` is for robot data in LeRobot's layout; `data.lerobot` opens it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from rlinf_core.data.sample import Row
from rlinf_core.data.transforms import Box, Concatenate, Transform

Split = Literal["train", "validation"]
DOWNLOAD_LIMIT = 100.0
"""Default of `LeRobotDatasetConfig.download_limit_gb`."""
FILES_MIXED = 8
"""`data.stream_of = "files"`: a stream mixes as many files at a time as have this many times the rows of its buffer."""
EpisodeRange = Annotated[str, Field(pattern=r"^\d+-\d+$")]
"""`"10-99"`: the first and the last episode."""


class SampleSource(Protocol):
    """Random access to the rows of one split. Safe to pickle into loader workers; opens files on first use."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        """Rows with decoded images; `0 <= index < len(self)` for each index."""
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
        """A hash of the rows' contents (without pixels); it changes when the data changes."""
        ...


@runtime_checkable
class ColumnSource(SampleSource, Protocol):
    """A source that can return many rows at once: statistics then take seconds instead of minutes."""

    def columns(self, indices: Sequence[int]) -> Row:
        """The values of `without_images` stacked along a first axis: vectors [N, D], chunks [N, H, D], `task` a list.

        Transforms get such a batch instead of a row if their class declares support (`Transform.batched`).
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


@runtime_checkable
class NamingSource(SampleSource, Protocol):
    """A source whose dataset names the numbers of its vectors, for messages and the page of `rlinf inspect`."""

    def names_of(self, columns: Sequence[str]) -> tuple[str, ...]:
        """The name of each number of these columns, concatenated; empty if the dataset does not name all of them."""
        ...


@runtime_checkable
class TimedSource(SampleSource, Protocol):
    """A source that knows how long its chunks last, so that the datasets of a mixture can be compared."""

    def step_seconds(self) -> float:
        """Seconds between consecutive actions of a chunk."""
        ...


@runtime_checkable
class TaskSource(SampleSource, Protocol):
    """A source whose rows have one of a list of texts, so that rows without a text are found without reading them."""

    def tasks(self) -> tuple[NDArray[np.int64], Mapping[int, str]]:
        """[N], the number of each row's text, and the texts by number; a number without one has no text."""
        ...


@runtime_checkable
class AnnotatedSource(SampleSource, Protocol):
    """A source whose dataset says more about its episodes and rows than the config uses."""

    def named_splits(self) -> Mapping[str, Sequence[int]]:
        """Name of a split, such as `val`, -> its episodes, of those that exist."""
        ...

    def other_prompts(self) -> Mapping[str, str]:
        """Columns with texts that the config neither uses nor leaves out by name -> the text of the first row."""
        ...


@runtime_checkable
class StillSource(SampleSource, Protocol):
    """A source that notices cameras whose images never change."""

    def still_images(self) -> Mapping[str, str]:
        """Image columns that are the same in a few evenly spread rows -> what they show, as `is black`."""
        ...


@runtime_checkable
class ReportingSource(SampleSource, Protocol):
    """A source that says what it made of its data: columns it does not use, what may train a wrong model."""

    def facts(self) -> Mapping[str, str]:
        """What users should know: short name -> one line of text. Shown by `rlinf validate` and when a run starts."""
        ...

    def warnings(self) -> Sequence[str]:
        """What may train a wrong model, one sentence each with its way out."""
        ...


@runtime_checkable
class FileSource(SampleSource, Protocol):
    """A source that names its files, so that a run can name those that differ between machines or between starts."""

    def row_files(self) -> Mapping[str, Path]:
        """Name within the dataset -> file that the rows are read from. They are read only if fingerprints differ."""
        ...

    def image_files_by_name(self) -> Mapping[str, Path]:
        """Name within the dataset -> file of this split's images, which `fingerprint` does not cover.

        Machines of a run compare their names, sizes and digests of some parts, and so does a run that continues.
        """
        ...


@runtime_checkable
class FileStreamSource(SampleSource, Protocol):
    """A source whose rows are in files one after another, so that streams of the chunked order can have their own."""

    def file_starts(self) -> NDArray[np.int64]:
        """[F], ascending: the first row, and those whose images are in another file than the images of the row before.

        With several files per row, such as those of several cameras, the rows that share the largest of them.
        """
        ...


@runtime_checkable
class VersionedSource(SampleSource, Protocol):
    """A source whose storage knows the versions of its image files, so that they are compared without being read."""

    def image_versions(self) -> Mapping[str, str]:
        """Name within the dataset -> size and version (an ETag, say) of an image file; empty for files on a disk."""
        ...


@runtime_checkable
class PrefetchingSource(SampleSource, Protocol):
    """A source whose files are not all on this machine."""

    def prefetch(self, indices: Sequence[int]) -> None:
        """Start fetching the files of rows that will be read soon, in other threads; fails silently."""
        ...


@runtime_checkable
class VariedSource(SampleSource, Protocol):
    """A source whose rows have images of their own, in number and size, unlike the cameras of a robot."""

    @property
    def images_differ(self) -> bool:
        """Whether no row's images can stand for those of another."""
        ...


class DatasetConfig(BaseModel):
    """The `[data]` table. Subclasses add fields; every field can be set in TOML."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    run_defaults: ClassVar[Mapping[str, Any]] = {}
    """Run defaults set by this dataset, as a TOML table: `{"policy": {"type": "pi05", "action_horizon": 5}}`."""
    compatible_policies: ClassVar[tuple[str, ...]] = ()
    """Compatible policy types besides the one in `run_defaults`."""

    config_name: str = ""
    """The registered name of this format, from `rlinf datasets`; `distribution:name` if two packages share a name."""
    repo_id: str = ""
    """A local folder; or the id of a dataset on the hub, `owner/name` with an optional `@revision`; or, for robot data,
    an address in object storage: `s3://bucket/folder`, `gs://`, `az://`, `hf://datasets/owner/name/folder`."""
    revision: str = ""
    """Branch, tag or commit on the hub; empty: the hub's default."""
    num_workers: int = Field(default=2, ge=0)
    """Loader processes per rank; 0 loads in the training process."""
    shuffle: Literal["random", "chunked"] = "random"
    """`random` reads rows in random order. `chunked` reads runs of consecutive frames and mixes them in a buffer, for
    videos in which seeking is slow. Not for mixtures."""
    streams: int = Field(default=64, ge=1)
    """Chunked: virtual streams over all ranks, each with its own runs of frames and its own buffer. A multiple of the
    number of ranks, and of every number of ranks on which the run is to resume."""
    stream_of: Literal["runs", "files"] = "runs"
    """Chunked: what streams are made of. `runs`: any runs of frames, so every node reads every file. `files`: each
    stream has files of its own, the same ones in every epoch, and a node reads only those of its streams."""
    chunk_frames: int = Field(default=16, ge=1)
    """Chunked: consecutive frames that are read together."""
    shuffle_buffer: int = Field(default=8192, ge=1)
    """Chunked: buffered samples of all ranks together, in memory with their images at the policy's size (0.15 MB per
    image of 224 x 224)."""
    on_bad_sample: Literal["stop", "skip"] = "stop"
    """What happens when a row cannot be read: a corrupt image, say. `stop` ends the run, which names the row. `skip`
    uses another row of the dataset instead, the same one on any number of ranks and after a resume, and lists both in
    `anomalies.jsonl`. Storage that is away makes no row bad. Statistics that need images (`stats_need_images`) stop
    at a bad one in any case."""
    max_bad_samples: int = Field(default=100, ge=1)
    """With `on_bad_sample = "skip"`: a run ends when more rows than these could not be read since its last start."""
    norm_stats: str = ""
    """A `norm_stats.json` to use; empty: computed from the training rows when the run starts."""
    norm_floor: float = Field(default=0.0, ge=0.0)
    """The smallest spread to divide by: standard deviation, or half of q99 - q01; in the data's units. Statistics with
    a smaller spread are widened before they are used and saved. 0: never, as in openpi."""
    stats_need_images: bool = False
    """Whether a transform uses images to compute state or actions, so that statistics must decode them (slow)."""
    validation_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Fraction of the episodes, spread evenly over the tasks, that is held out of training for validation."""
    validation_episodes: tuple[int, ...] = ()
    """Episodes to hold out, instead of a fraction: numbers, and ranges such as `"10-99"`."""

    @field_validator("validation_episodes", mode="before")
    @classmethod
    def _ranges_as_numbers(cls, value: Any) -> Any:
        return [*chain.from_iterable(map(_expanded, value))] if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> DatasetConfig:
        if self.validation_fraction and self.validation_episodes:
            raise ValueError("set validation_fraction or validation_episodes, not both")
        return self

    @model_validator(mode="after")
    def _buffers_hold_runs(self) -> DatasetConfig:
        changed = [key for key in ("streams", "stream_of", "chunk_frames", "shuffle_buffer") if self._differs(key)]
        if self.shuffle == "random" and changed:
            raise ValueError(f'{changed[0]} has no effect without shuffle = "chunked"')
        if self.shuffle_buffer < self.streams * self.chunk_frames:
            raise ValueError(
                f"shuffle_buffer = {self.shuffle_buffer} is less than streams x chunk_frames = "
                f"{self.streams * self.chunk_frames}, one run of frames per stream: raise it, or lower one of these"
            )
        return self

    @model_validator(mode="after")
    def _counts_what_it_skips(self) -> DatasetConfig:
        if self.on_bad_sample == "stop" and self._differs("max_bad_samples"):
            raise ValueError('max_bad_samples has no effect without on_bad_sample = "skip"')
        return self

    def _differs(self, key: str) -> bool:
        return bool(getattr(self, key) != type(self).model_fields[key].default)

    @property
    def has_validation(self) -> bool:
        """Whether any episode is held out."""
        return bool(self.validation_fraction or self.validation_episodes)

    def given_statistics(self) -> str:
        """The statistics file to use; empty: computed from the training rows when the run starts."""
        return self.norm_stats

    @classmethod
    def facts(cls) -> dict[str, Any]:
        """What the class knows about its data without opening them, for `rlinf datasets --json`."""
        return {}

    def repack(self) -> Transform:
        """The transform from a row to a sample in the data's own units; it has no inverse."""
        raise NotImplementedError(f"{type(self).__name__} must define repack()")

    def observation_columns(self) -> Sequence[str]:
        """The columns that inference needs from a row; empty if only `repack` knows."""
        return ()

    def observation_names(self) -> Mapping[str, str]:
        """Other names under which robots and simulators send the columns -> the column, for `rlinf serve`.

        Maps within an observation are joined with `/`: `images/cam_high`. The columns' own names are always accepted.
        """
        return {"prompt": "task", "task_description": "task"}

    def transforms(self) -> Sequence[Transform]:
        """Transforms between repacking and normalisation; their inverses run in reverse on the policy's actions."""
        return ()


class Crop(BaseModel):
    """A crop of a camera's image, in pixels from its upper left corner."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    top: int = Field(default=0, ge=0)
    """Rows cut off at the top."""
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
    """Robot data in LeRobot's layout: which column is which. Several state or action columns are concatenated."""

    images: dict[str, str] = {}
    """Camera name of the policy -> image column of the dataset."""
    crops: dict[str, Crop] = {}
    """Camera name of the policy -> the crop of its image to keep, `{ top, left, height, width }` in pixels."""
    state: tuple[str, ...] = ("observation.state",)
    """Columns of the proprioceptive state."""
    actions: tuple[str, ...] = ("action",)
    """Columns of the action."""
    stride: int = Field(default=1, ge=1)
    """Frames between consecutive actions of a chunk: 2 makes chunks of every second frame, for a robot that is
    controlled at half the dataset's rate."""
    prompt_from_task: bool = True
    """Whether the prompt is the row's own task text. If false, it is `default_prompt`."""
    default_prompt: str = ""
    """The prompt of rows without task text, or of all rows if `prompt_from_task` is false."""
    prompt_column: str | None = Field(default=None, min_length=1)
    """The column with the prompt: integers that index the dataset's tasks, as GR00T's `annotation.*`, or texts, as
    `language_instruction`. Left out: `task_index`. `tasks` and `validation_tasks` name texts of this column, too."""
    episodes: tuple[int | EpisodeRange, ...] = ()
    """Episodes to use, numbers and ranges: `[7, "10-99"]` is 7 and 10 to 99. Empty: all."""
    exclude_episodes: tuple[int | EpisodeRange, ...] = ()
    """Episodes to leave out, in the same form."""
    tasks: tuple[int | str, ...] = ()
    """Use only episodes of these tasks: texts, or the dataset's numbers (`task_index`, or `prompt_column`). An
    episode's task is that of its first frame."""
    min_episode_length: int = Field(default=0, ge=0)
    """Leave out episodes with fewer frames."""
    max_episode_length: int = Field(default=0, ge=0)
    """Leave out episodes with more frames; 0: no limit."""
    quality_column: str = ""
    """A number or boolean per episode (a column of `meta/episodes`), or per frame, of which the mean over the episode
    is used."""
    min_quality: float = 1.0
    """Leave out episodes with a lower value in `quality_column`. Booleans count as 0 and 1."""
    decoder: Literal["auto", "torchcodec", "pyav"] = "auto"
    """Video decoder. `auto`: torchcodec if it loads, otherwise PyAV, which is slower; a run reports which one."""
    match_frames: Literal["time", "number", "time_unchecked"] = "time"
    """How a row finds its frame in a video. `time`: the frame nearest to its time; a run refuses to start if counts of
    frames and rows show that this could be another row's. `number`: the frame with the row's number, for files with one
    frame per row whose times are wrong. `time_unchecked`: by time, without comparing counts."""
    cache: Literal["", "raw", "jpeg"] = ""
    """Read images from a cache written by `rlinf cache` instead of decoding the dataset's: `raw`, identical to the bit,
    or `jpeg`, smaller and lossy. Empty: decode."""
    cache_quality: int = Field(default=95, ge=1, le=100)
    """For `cache = "jpeg"`: the `--quality` of the cache. Changing it changes the samples of a run."""
    download_limit_gb: float = Field(default=DOWNLOAD_LIMIT, gt=0.0)
    """For datasets in object storage: most gigabytes of downloaded files on a machine, of all such datasets together.
    The least recently used ones are removed to make room."""
    cache_dir: str = ""
    """Folder of caches; empty: `frames` in `RLINF_CACHE`, by default `~/.cache/rlinf_core`."""
    validation_tasks: tuple[int | str, ...] = ()
    """Hold out all episodes of these tasks, instead of a fraction: measures the policy on unseen tasks."""

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
        """All mistakes that involve several fields; subclasses may add to them.

        Called when a config is validated, so that all are reported at once.
        """
        return [
            *_twice("images", self.images.values()),
            *_twice("state", self.state),
            *_twice("actions", self.actions),
            *(f"{name!r} is named in state and in actions" for name in self.state if name in self.actions),
            *(
                f"crops names {name}, which is not in images: {', '.join(self.images) or 'there are none'}"
                for name in self.crops
                if name not in self.images
            ),
            *(
                ["prompt_from_task = false needs default_prompt, the prompt of every row"]
                if not self.prompt_from_task and not self.default_prompt
                else []
            ),
            *(
                ["prompt_column has no effect with prompt_from_task = false: leave one out"]
                if self.prompt_column and not self.prompt_from_task
                else []
            ),
            *(
                ['stream_of = "files" is for reading the dataset\'s own files: leave it out, or cache']
                if self.cache and self.stream_of == "files"
                else []
            ),
            *(
                ['cache_quality is for cache = "jpeg": set both']
                if self.cache_quality != 95 and self.cache != "jpeg"
                else []
            ),
            *(
                ['download_limit_gb is for datasets in object storage (repo_id = "s3://..."): leave it out']
                if self.download_limit_gb != DOWNLOAD_LIMIT and "://" not in self.repo_id
                else []
            ),
            *self._wrong_subset(),
        ]

    def _wrong_subset(self) -> Iterator[str]:
        """What is wrong with the choice of episodes."""
        if self.validation_tasks and super().has_validation:
            yield "set one of validation_tasks, validation_fraction and validation_episodes"
        if self.min_quality != 1.0 and not self.quality_column:
            yield "min_quality needs quality_column, the column to compare it with"
        if self.max_episode_length and self.max_episode_length < self.min_episode_length:
            yield f"max_episode_length {self.max_episode_length} is less than min_episode_length"

    @classmethod
    def facts(cls) -> dict[str, Any]:
        """The columns that its defaults name."""
        return {key: cls.model_fields[name].get_default() for key, name in _COLUMN_FACTS.items()}

    def observation_columns(self) -> Sequence[str]:
        """Cameras, state, and the task unless there is a default prompt."""
        return (*self.images.values(), *self.state, *(() if self.default_prompt else ("task",)))

    def repack(self) -> Transform:
        """Rename the dataset's columns to a sample's keys and crop the images."""
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
    """What is wrong with a list of columns on its own."""
    counts = Counter(columns)
    wrong = [f"{key} names {column!r} {count} times" for column, count in counts.items() if count > 1]
    return wrong + [f"{key} holds an empty column name"] * ("" in counts)


MOST_EPISODES = 2**20
"""The largest range of episodes that is written out as numbers."""


def _expanded(episode: Any) -> Iterable[Any]:
    """The numbers of a range such as `"10-99"`; anything else as it is."""
    found = re.fullmatch(r"(\d{1,12})-(\d{1,12})", episode) if isinstance(episode, str) else None
    if not found:
        return (episode,)
    first, last = map(int, found.groups())
    if not 0 <= last - first < MOST_EPISODES:
        raise ValueError(f"{episode!r} is not a range of episodes: the first comes first, {MOST_EPISODES} at most")
    return range(first, last + 1)
