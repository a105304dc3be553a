"""The metadata of a LeRobot dataset: columns, tasks, episodes, and the files that contain them.

`Metadata` is the same for formats v2.0, v2.1 and v3.0. In v3.0 (`meta/tasks.parquet`, `meta/episodes/**.parquet`) many
episodes share a data file and a video file, and the metadata list each episode's file and its start time in the video.
In v2.x (`meta/tasks.jsonl`, `meta/episodes.jsonl`) each episode has its own files, named by its number. `Info` is the
content of `meta/info.json`: format, columns and the patterns of file names. All of it is untrusted input.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, compress, pairwise
from pathlib import Path, PurePosixPath
from string import Formatter
from typing import Annotated, Any, TypeGuard

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, Field, ValidationError

from rlinf_core.data.lerobot.files import INFO, data_files_below, read_json, read_json_lines, read_parquet
from rlinf_core.errors import UserError
from rlinf_core.untrusted.text import path_inside

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
AGAIN = "download that file again, or write or convert the dataset again"


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
    splits: Mapping[str, range] = field(default_factory=dict)
    """Name -> episode numbers, as `meta/info.json` says; they may not exist."""

    def feature(self, column: str, key: str) -> dict[str, Any]:
        """The feature of a column that the config's `key` names; raises `UserError` with similar names if missing."""
        if column in self.features:
            return self.features[column]
        raise UserError(
            f"{key} names {column!r}, which {self.name} does not have; its columns are "
            f"{nearest_first(column, self.features)}"
        )

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Frames of each episode."""
        lengths: NDArray[np.int64] = self.stops - self.starts
        return lengths

    @cached_property
    def firsts(self) -> NDArray[np.int64]:
        """Position of each episode's first frame among all frames, by the lengths of the episodes before it."""
        firsts: NDArray[np.int64] = np.cumsum(self.lengths) - self.lengths
        return firsts

    def only(self, chosen: NDArray[np.bool_]) -> Metadata:
        """The metadata of some episodes, and of their files alone; `total_episodes` and `frames` stay.

        Args:
            chosen: [episodes], which to keep.
        """
        used, data_file = np.unique(self.data_file[chosen], return_inverse=True)
        return replace(
            self,
            episodes=self.episodes[chosen],
            starts=self.starts[chosen],
            stops=self.stops[chosen],
            data_files=tuple(self.data_files[file] for file in used.tolist()),
            data_file=data_file.reshape(-1),
            video_files={name: tuple(compress(files, chosen)) for name, files in self.video_files.items()},
            video_starts={name: starts[chosen] for name, starts in self.video_starts.items()},
        )

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

    def with_videos_found(self) -> Metadata:
        """Replace the path of a missing video by that of the only file of its name below `videos/` for its camera.

        Forks and tools exist whose path template in `meta/info.json` fits another numbering of folders.
        """
        found = {name: tuple(self._found(name, path) for path in files) for name, files in self.video_files.items()}
        return replace(self, video_files=found)

    def _found(self, camera: str, path: Path) -> Path:
        if path.is_file():
            return path
        parts = PurePosixPath(camera).parts
        others = [
            other
            for other in self._videos_by_name.get(path.name, ())
            if any(other.parts[i : i + len(parts)] == parts for i in range(len(other.parts)))
        ]
        return others[0] if len(others) == 1 else path

    @cached_property
    def _videos_by_name(self) -> dict[str, list[Path]]:
        by_name: dict[str, list[Path]] = {}
        for path in (self.root / "videos").rglob("*.mp4"):
            by_name.setdefault(path.name, []).append(path)
        return by_name

    def files(self, cameras: Iterable[str]) -> list[Path]:
        """The data files, and the video files of some cameras."""
        return [*self.data_files, *self.videos(cameras)]


def nearest_first(name: str, candidates: Iterable[str]) -> str:
    """The candidates as a comma-separated list, those similar to `name` first."""
    names = list(candidates)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    return ", ".join([*near, *(other for other in names if other not in near)])


def load_metadata(name: str, root: Path, *, prompts: bool = True) -> Metadata:
    """Read the metadata of the dataset in `root`; the listed episodes must match their number in `meta/info.json`.

    Args:
        name: The name that the user gave.
        root: Its folder.
        prompts: Whether the texts of tasks are needed; if not, the file with them may be missing.

    Raises:
        UserError: A file is missing or damaged, or the format is not one of `VERSIONS`.
    """
    metadata = read_metadata(name, root, prompts=prompts)
    rows, frames = len(metadata.episodes), int(metadata.lengths.sum())
    numbers, counts = np.unique(metadata.episodes, return_counts=True)
    listed = "meta/episodes" if metadata.version == "v3.0" else "meta/episodes.jsonl"
    if len(numbers) != rows:
        twice = ", ".join(map(str, numbers[counts > 1][:10].tolist()))
        raise UserError(
            f"{root}: {listed} lists {len(numbers)} episodes in {rows} rows: twice {twice}. Remove the rows that do "
            "not belong, or write the dataset again"
        )
    if rows != metadata.total_episodes or frames != metadata.frames:
        raise UserError(
            f"{root}: {INFO} counts {metadata.total_episodes} episodes and {metadata.frames} frames, {listed} lists "
            f"{rows} and {frames}. If episodes are missing, the recording, the download or a conversion stopped early: "
            f"repeat it. If what is listed is all there is, `rlinf check-dataset {name} --repair FOLDER` writes a copy "
            f"whose metadata count that (total_episodes = {rows}, total_frames = {frames})"
        )
    return metadata


def read_metadata(name: str, root: Path, *, prompts: bool = True) -> Metadata:
    """Like `load_metadata`, but also for an incomplete dataset."""
    info = load_info(name, root)
    v3 = info.codebase_version == "v3.0"
    episodes = _episodes_v3(root, info) if v3 else _episodes_v2(root, info)
    try:
        tasks = _tasks_v3(root) if v3 else _tasks_v2(root)
    except UserError:
        if prompts:
            raise
        tasks = {}
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
        splits=info.named_splits,
        **episodes,
    )


def _episodes_v3(root: Path, info: Info) -> dict[str, Any]:
    """Fields of `Metadata`. Statistics columns in the same files are many times larger and are not read."""
    paths = data_files_below(root / "meta" / "episodes")
    if not paths:
        raise UserError(f"{root} has no meta/episodes/*/*.parquet: {AGAIN}")
    column, cameras = _listed_episodes(paths, info.videos)
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
        "video_files": {key: videos(key) for key in cameras},
        "video_starts": {key: column[f"videos/{key}/from_timestamp"] for key in cameras},
    }


_PLACES = ("episode_index", "dataset_from_index", "dataset_to_index", "data/chunk_index", "data/file_index")
_IN_VIDEO = ("chunk_index", "file_index", "from_timestamp")


def _listed_episodes(paths: Sequence[Path], cameras: Sequence[str]) -> tuple[dict[str, NDArray[Any]], list[str]]:
    """The columns of `meta/episodes`, sorted by episode, and the cameras whose videos all of its files list."""
    places = {name: [f"videos/{name}/{part}" for part in _IN_VIDEO] for name in cameras}
    optional = [*chain.from_iterable(places.values())]
    tables = [read_parquet(path, [*_PLACES, *optional], optional) for path in paths]
    there = set[str].intersection(*(set(table.column_names) for table in tables))
    listed = [name for name in cameras if there.issuperset(places[name])]
    wanted = [*_PLACES, *chain.from_iterable(places[name] for name in listed)]
    # Files of merged datasets have integers of different widths: each is cast before they are joined.
    parts = [{key: _numbers(path, table, key) for key in wanted} for path, table in zip(paths, tables, strict=True)]
    columns = {key: np.concatenate([part[key] for part in parts]) for key in wanted}
    order = np.argsort(columns["episode_index"], kind="stable")
    return {key: values[order] for key, values in columns.items()}, listed


def _numbers(path: Path, table: pa.Table, key: str) -> NDArray[Any]:
    kind = pa.float64() if key.endswith("timestamp") else pa.int64()
    try:
        numbers: NDArray[Any] = table[key].cast(kind).to_numpy()
    except pa.ArrowException as error:
        raise UserError(f"{path}: {key!r} is not a numeric column ({error}): {AGAIN}") from error
    if table[key].null_count:
        raise UserError(f"{path}: {key!r} has no value for an episode: {AGAIN}")
    if not ((numbers >= 0) & (numbers <= MOST)).all():
        raise UserError(f"{path}: {key!r} is not between 0 and {MOST} for an episode: {AGAIN}")
    return numbers


def _tasks_v3(root: Path) -> dict[int, str]:
    """Task texts by number."""
    path = root / "meta" / "tasks.parquet"
    table = read_parquet(path)
    if "task_index" not in table.column_names:
        raise UserError(f"{path} has no column task_index; it has {', '.join(table.column_names)}: {AGAIN}")
    text = _text_column(path, table)
    try:
        return _texts(path, table["task_index"].to_pylist(), table[text].to_pylist())
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: a text is not UTF-8 ({error}): {AGAIN}") from error


def _text_column(path: Path, table: pa.Table) -> str:
    """The column with the instructions: `task`, else the pandas index (lerobot's, of any name), else the only text."""
    if "task" in table.column_names:
        return "task"
    texts: list[str] = [field.name for field in table.schema if _is_text(field.type)]
    described: list[Any] = (table.schema.pandas_metadata or {}).get("index_columns", [])
    if index := [name for name in described if name in texts]:
        return str(index[0])
    if len(texts) == 1:
        return texts[0]
    raise UserError(
        f"{path} does not say which of its columns is the instruction: it has "
        f"{', '.join(texts) or 'no column of texts'}, and none is called task. Rename that column to task"
    )


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


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
    splits: Any = None

    @property
    def named_splits(self) -> dict[str, range]:
        """The splits that are ranges of episodes, `"train": "0:90"`; anything else is not used."""
        splits = self.splits.items() if isinstance(self.splits, dict) else ()
        found = {str(name): re.fullmatch(r"(\d{1,12}):(\d{1,12})", str(value)) for name, value in splits}
        return {name: range(*map(int, one.groups())) for name, one in found.items() if one}

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
    for literal, name, width, conversion in Formatter().parse(pattern):
        if conversion or (width and not _DIGITS.fullmatch(width)):
            raise ValueError("a field may only have a width, as in {episode_index:06d}")
        text += literal + ("" if name is None else format(values[name], width or ""))
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
        raise UserError(_no_dataset(name, root)) from e
    if isinstance(content, dict) and content.get("storage_format", "parquet") != "parquet":
        raise UserError(
            f"{name} ({root}) is stored as {content['storage_format']} ({INFO}: storage_format), which rlinf does not "
            "read: it reads Parquet files and videos. lerobot reads it: copy its episodes with LeRobotDataset into a "
            "dataset made by LeRobotDataset.create(), which writes Parquet and MP4"
        )
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


DEEPEST = 3
"""Levels of folders below which datasets are looked for, for a message."""
SHOWN = 4


def _no_dataset(name: str, root: Path) -> str:
    """The message for a folder without `meta/info.json`; names the datasets below it, if there are any."""
    what = f"{root} is not a LeRobot dataset: it has no {INFO} (data.repo_id = {name!r})"
    patterns = ("/".join(["*"] * depth + [INFO]) for depth in range(1, DEEPEST + 1))
    below = sorted(path.parent.parent for pattern in patterns for path in root.glob(pattern))
    if not below:
        return what
    if len(below) == 1:
        return f"{what}. The dataset is one level too deep: data.repo_id = {str(below[0])!r}"
    entries = [f'[[data.mixture]]\nconfig_name = "..."\nrepo_id = "{path}"' for path in below[:SHOWN]]
    more = f"\n(and {len(below) - SHOWN} more)" if len(below) > SHOWN else ""
    return f"{what}. {len(below)} datasets are below it; to train on them, mix them (docs/mixtures.md):\n" + (
        "\n".join(entries) + more
    )


def _wrong_version(name: str, root: Path, version: str) -> str:
    if version.startswith("v1"):
        way_out = (
            "lerobot 0.3.3 converts it from the hub: python -m lerobot.datasets.v2.convert_dataset_v1_to_v2 "
            f"--repo-id {name}"
        )
    else:
        way_out = "a newer rlinf-core may read it; or convert it to one of these formats with lerobot"
    return f"{name} ({root}) has LeRobot format {version}; supported are {', '.join(VERSIONS)}. {way_out}"
