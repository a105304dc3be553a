"""The metadata of a LeRobot dataset: columns, tasks, episodes, and the files that contain them.

`Metadata` is the same for formats v2.0, v2.1 and v3.0. In v3.0 (`meta/tasks.parquet`, `meta/episodes/**.parquet`) many
episodes share a data file and a video file, and the metadata list each episode's file and its start time in the video.
In v2.x (`meta/tasks.jsonl`, `meta/episodes.jsonl`) each episode has its own files, named by its number. `Info` is the
content of `meta/info.json`: format, columns and the patterns of file names. All of it is untrusted input.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, compress, pairwise
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, TypeGuard

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, Field, ValidationError

from rlinf_core.data.lerobot.files import INFO, read_json, read_json_lines, read_parquet
from rlinf_core.errors import UserError
from rlinf_core.untrusted import path_inside

VERSIONS = ("v2.0", "v2.1", "v3.0")
"""The supported formats."""
NUMBERS = ("float", "int", "uint", "bool")
"""Prefixes of the dtypes of numeric columns."""
MOST = 2**40
"""Upper bound on frames and on episodes."""
LARGEST = 2**20
"""Upper bound on the size of a column along one axis."""
_DIGITS = re.compile(r"0?\d?\d?d?")
"""The allowed format of a number in a path."""
AGAIN = "the dataset is incomplete; download or write it again"


@dataclass(frozen=True, eq=False)
class Metadata:
    """The metadata of a dataset in a local folder. Arrays are [episodes] unless noted otherwise."""

    name: str
    """The name that the user gave: `data.repo_id`."""
    root: Path
    version: str
    """The format, one of `VERSIONS`."""
    fps: float
    features: dict[str, dict[str, Any]]
    """Column -> `dtype` (`"video"`, `"image"` or a numeric dtype) and `shape`."""
    total_episodes: int
    """Number of episodes according to `meta/info.json`."""
    frames: int
    """Number of frames of all episodes according to `meta/info.json`."""
    task_texts: dict[int, str]
    """`task_index` -> instruction to the robot."""
    episodes: NDArray[np.int64]
    """Episode numbers, ascending."""
    starts: NDArray[np.int64]
    """Position of each episode's first frame among all frames."""
    stops: NDArray[np.int64]
    """Position after each episode's last frame."""
    data_files: tuple[Path, ...]
    """Parquet files in frame order; together they contain all frames."""
    data_file: NDArray[np.int64]
    """Index in `data_files` of each episode's file."""
    video_files: dict[str, tuple[Path, ...]]
    """Video column -> the file of each episode."""
    video_starts: dict[str, NDArray[np.float64]]
    """Video column -> start of each episode in its file, in seconds."""

    def feature(self, column: str, key: str) -> dict[str, Any]:
        """The feature of a column that the config's `key` names; raises `UserError` with similar names if missing."""
        if column in self.features:
            return self.features[column]
        raise UserError(
            f"{key} names {column!r}, which {self.name} does not have; its columns are "
            f"{nearest_first(column, self.features)}"
        )

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Frames of each episode."""
        lengths: NDArray[np.int64] = self.stops - self.starts
        return lengths

    def columns_of(self, dtype: str) -> list[str]:
        """Columns of dtype `"video"` or `"image"`."""
        return [name for name, feature in self.features.items() if feature["dtype"] == dtype]

    def videos(self, cameras: Iterable[str], episodes: Collection[int] | None = None) -> list[Path]:
        """The video files of some cameras, for some episodes or (None) all."""
        used = [episodes is None or episode in episodes for episode in self.episodes.tolist()]
        named = (compress(self.video_files.get(name, ()), used) for name in dict.fromkeys(cameras))
        return list(dict.fromkeys(chain.from_iterable(named)))

    def overlapping(self, camera: str, episodes: Collection[int] | None = None) -> list[tuple[int, int]]:
        """Pairs of indices of episodes whose frames overlap in a video, among some episodes or (None) all."""
        starts, files = self.video_starts[camera], dict[Path, list[int]]()
        for i in np.argsort(starts, kind="stable").tolist():
            if self.lengths[i] > 0 and (episodes is None or int(self.episodes[i]) in episodes):
                files.setdefault(self.video_files[camera][i], []).append(i)
        ends = starts + (self.lengths - 0.5) / self.fps
        pairs = chain.from_iterable(map(pairwise, files.values()))
        return [(before, after) for before, after in pairs if starts[after] < ends[before]]

    def files(self, cameras: Iterable[str]) -> list[Path]:
        """The data files, and the video files of some cameras."""
        return [*self.data_files, *self.videos(cameras)]


def nearest_first(name: str, candidates: Iterable[str]) -> str:
    """The candidates as a comma-separated list, those similar to `name` first."""
    names = list(candidates)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    return ", ".join([*near, *(other for other in names if other not in near)])


def load_metadata(name: str, root: Path) -> Metadata:
    """Read the metadata of the dataset in `root`; the listed episodes must match their number in `meta/info.json`.

    Args:
        name: The name that the user gave.
        root: Its folder.

    Raises:
        UserError: A file is missing or damaged, or the format is not one of `VERSIONS`.
    """
    metadata = read_metadata(name, root)
    rows, different = len(metadata.episodes), len(np.unique(metadata.episodes))
    if rows != metadata.total_episodes or rows != different:
        raise UserError(
            f"{root}: {INFO} counts {metadata.total_episodes} episodes, meta/episodes lists {different}"
            + f" in {rows} rows" * (rows != different)
            + f": {AGAIN}"
        )
    return metadata


def read_metadata(name: str, root: Path) -> Metadata:
    """Like `load_metadata`, but also for an incomplete dataset."""
    info = load_info(name, root)
    if info.codebase_version == "v3.0":
        episodes, tasks = _episodes_v3(root, info), _tasks_v3(root)
    else:
        episodes, tasks = _episodes_v2(root, info), _tasks_v2(root)
    if not len(episodes["episodes"]):
        raise UserError(f"{root}: meta/ lists no episodes: {AGAIN}")
    return Metadata(
        name=name,
        root=root,
        version=info.codebase_version,
        fps=info.fps,
        features=info.features,
        total_episodes=info.total_episodes,
        frames=info.total_frames,
        task_texts=tasks,
        **episodes,
    )


def _episodes_v3(root: Path, info: Info) -> dict[str, Any]:
    """Fields of `Metadata`. Statistics columns in the same files are many times larger and are not read."""
    wanted = ["episode_index", "dataset_from_index", "dataset_to_index", "data/chunk_index", "data/file_index"]
    for key in info.videos:
        wanted += [f"videos/{key}/{part}" for part in ("chunk_index", "file_index", "from_timestamp")]
    paths = sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    if not paths:
        raise UserError(f"{root} has no meta/episodes/*/*.parquet: {AGAIN}")
    table = pa.concat_tables([read_parquet(path, wanted) for path in paths]).sort_by("episode_index")
    column = {key: _numbers(root, table, key) for key in table.column_names}
    places = np.stack([column["data/chunk_index"], column["data/file_index"]], axis=1)
    files, data_file = np.unique(places, axis=0, return_inverse=True)

    def videos(key: str) -> tuple[Path, ...]:
        places = zip(column[f"videos/{key}/chunk_index"], column[f"videos/{key}/file_index"], strict=True)
        return tuple(
            info.file(root, info.video_path, video_key=key, chunk_index=chunk, file_index=file)
            for chunk, file in places
        )

    return {
        "episodes": column["episode_index"],
        "starts": column["dataset_from_index"],
        "stops": column["dataset_to_index"],
        "data_files": tuple(
            info.file(root, info.data_path, chunk_index=chunk, file_index=file) for chunk, file in files
        ),
        "data_file": data_file.reshape(-1),
        "video_files": {key: videos(key) for key in info.videos},
        "video_starts": {key: column[f"videos/{key}/from_timestamp"] for key in info.videos},
    }


def _numbers(root: Path, table: pa.Table, key: str) -> NDArray[Any]:
    kind = pa.float64() if key.endswith("timestamp") else pa.int64()
    try:
        numbers: NDArray[Any] = table[key].cast(kind).to_numpy()
    except pa.ArrowException as error:
        raise UserError(f"{root}/meta/episodes: {key!r} is not a numeric column ({error}): {AGAIN}") from error
    if table[key].null_count:
        raise UserError(f"{root}/meta/episodes: {key!r} has no value for an episode: {AGAIN}")
    if not ((numbers >= 0) & (numbers <= MOST)).all():
        raise UserError(f"{root}/meta/episodes: {key!r} is not between 0 and {MOST} for an episode: {AGAIN}")
    return numbers


def _tasks_v3(root: Path) -> dict[int, str]:
    """Task texts by number. lerobot writes a pandas frame whose index is the text; the index may have any name."""
    table = read_parquet(root / "meta" / "tasks.parquet")
    text = next((name for name in table.column_names if name != "task_index"), None)
    if text is None or "task_index" not in table.column_names:
        raise UserError(f"{root}/meta/tasks.parquet has no column of texts with a task_index: {AGAIN}")
    path = root / "meta" / "tasks.parquet"
    try:
        return _texts(path, table["task_index"].to_pylist(), table[text].to_pylist())
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: a text is not UTF-8 ({error}): {AGAIN}") from error


def _episodes_v2(root: Path, info: Info) -> dict[str, Any]:
    """Fields of `Metadata`: an episode's number determines its files, the lengths before it its position."""
    path = root / "meta" / "episodes.jsonl"
    listed = [(one["episode_index"], one["length"]) for one in read_json_lines(path, ("episode_index", "length"))]
    if not all(_is_count(number) for episode in listed for number in episode):
        raise UserError(f"{path}: an episode_index or a length is not an integer from 0 to {MOST}: {AGAIN}")
    listed.sort()
    numbers = [episode for episode, _ in listed]
    stops = np.cumsum([length for _, length in listed], dtype=np.int64)

    def files(pattern: str | None, key: str = "") -> tuple[Path, ...]:
        return tuple(
            info.file(root, pattern, episode_chunk=number // info.chunks_size, episode_index=number, video_key=key)
            for number in numbers
        )

    return {
        "episodes": np.array(numbers, np.int64),
        "starts": np.concatenate([np.zeros(1, np.int64), stops])[:-1],
        "stops": stops,
        "data_files": files(info.data_path),
        "data_file": np.arange(len(numbers)),
        "video_files": {key: files(info.video_path, key) for key in info.videos},
        "video_starts": {key: np.zeros(len(numbers)) for key in info.videos},
    }


def _tasks_v2(root: Path) -> dict[int, str]:
    path = root / "meta" / "tasks.jsonl"
    tasks = read_json_lines(path, ("task_index", "task"))
    return _texts(path, [task["task_index"] for task in tasks], [task["task"] for task in tasks])


def _texts(path: Path, numbers: Iterable[Any], texts: Iterable[Any]) -> dict[int, str]:
    """Tasks by number; a missing text becomes the empty string, which `data.default_prompt` replaces."""
    tasks: dict[int, str] = {}
    for number, said in zip(numbers, texts, strict=True):
        text = "" if said is None else said
        if not _is_count(number) or not isinstance(text, str):
            raise UserError(f"{path}: the task {number!r}: {said!r} is not an integer with a text: {AGAIN}")
        tasks[number] = text
    return tasks


def _is_count(number: object) -> TypeGuard[int]:
    """Whether this is a valid number of frames, episode number or task number."""
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number <= MOST


def _described(feature: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(feature.get("dtype"), str):
        raise ValueError("has no dtype")
    shape = feature.get("shape")
    known = isinstance(shape, list) and all(isinstance(n, int) and 0 <= n <= LARGEST for n in shape)
    if feature["dtype"].startswith(NUMBERS) and not known:
        raise ValueError("has no shape, which must be a list of integers")
    return feature


class Info(BaseModel):
    """The part of `meta/info.json` that is read."""

    codebase_version: str
    fps: float = Field(ge=1e-3, le=1e6)
    features: dict[str, Annotated[dict[str, Any], AfterValidator(_described)]]
    total_episodes: int = Field(ge=0, le=2**40)
    total_frames: int = Field(ge=0, le=2**40)
    data_path: str
    video_path: str | None = None
    chunks_size: int = Field(default=1000, gt=0)

    @property
    def videos(self) -> list[str]:
        """The video columns."""
        return [name for name, feature in self.features.items() if feature["dtype"] == "video"]

    def file(self, root: Path, pattern: str | None, **numbers: Any) -> Path:
        """The path that the pattern `data_path` or `video_path` gives for some numbers."""
        try:
            name = _filled(str(pattern), numbers)
        except (LookupError, ValueError) as error:
            raise UserError(
                f"{root / INFO}: the path {pattern!r} uses fields other than {', '.join(numbers)}"
            ) from error
        try:
            return path_inside(root, name)
        except ValueError as error:
            raise UserError(f"{root / INFO}: the path {pattern!r} is outside the dataset's folder: {error}") from error


def _filled(pattern: str, values: Mapping[str, Any]) -> str:
    """A restricted `str.format`: names and digits only, no attribute access and no unbounded padding.

    Raises:
        LookupError: The pattern uses another name.
        ValueError: The pattern is invalid.
    """
    text = ""
    for literal, field, width, conversion in Formatter().parse(pattern):
        if conversion or (width and not _DIGITS.fullmatch(width)):
            raise ValueError("a field may only have a width, as in {episode_index:06d}")
        text += literal + ("" if field is None else format(values[field], width or ""))
    return text


def load_info(name: str, root: Path) -> Info:
    """Read `meta/info.json`.

    Args:
        name: The name that the user gave the dataset.
        root: Its folder.

    Raises:
        UserError: The file is missing or damaged, or the format is not one of `VERSIONS`.
    """
    path = root / INFO
    try:
        content = read_json(path)
    except FileNotFoundError as e:
        raise UserError(f"{root} is not a LeRobot dataset: it has no {INFO} (data.repo_id = {name!r})") from e
    version = content.get("codebase_version") if isinstance(content, dict) else None
    if version is not None and version not in VERSIONS:
        raise UserError(_wrong_version(name, root, str(version)))
    try:
        info = Info.model_validate(content)
    except ValidationError as e:
        wrong = "; ".join(f"{'.'.join(map(str, one['loc'])) or 'the whole file'}: {one['msg']}" for one in e.errors())
        raise UserError(f"{path} is damaged: {wrong}. Download or write the dataset again") from e
    if info.videos and not info.video_path:
        raise UserError(f"{path} has video columns but no video_path: download or write the dataset again")
    return info


def _wrong_version(name: str, root: Path, version: str) -> str:
    if version.startswith("v1"):
        way_out = (
            "lerobot 0.3.3 converts it from the hub: python -m lerobot.datasets.v2.convert_dataset_v1_to_v2 "
            f"--repo-id {name}"
        )
    else:
        way_out = "a newer rlinf-core may read it; or convert it to one of these formats with lerobot"
    return f"{name} ({root}) has LeRobot format {version}; supported are {', '.join(VERSIONS)}. {way_out}"
