"""What the metadata of a LeRobot dataset say: columns, tasks, episodes, and which files hold them.

One `Metadata` serves formats v2.0, v2.1 and v3.0. In v3.0 (`meta/tasks.parquet`, `meta/episodes/**.parquet`) many
episodes share a data file and a video file, so that an episode knows its file and the time in it at which it starts; in
v2.x (`meta/tasks.jsonl`, `meta/episodes.jsonl`) each has files of its own, named by its number.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rlinf_core.data.lerobot_files import INFO, read_json, read_json_lines, read_parquet
from rlinf_core.errors import UserError

VERSIONS = ("v2.0", "v2.1", "v3.0")
"""The formats that are read."""
AGAIN = "the dataset is incomplete; download or write it again"


@dataclass(frozen=True, eq=False)
class Metadata:
    """The metadata of a dataset that lies in a local folder. Arrays are [episodes] unless said otherwise."""

    name: str
    """What the user calls it: `data.repo_id`."""
    root: Path
    version: str
    """The format: one of `VERSIONS`."""
    fps: float
    features: dict[str, dict[str, Any]]
    """Column -> `dtype` (`"video"`, `"image"` or a number's) and `shape`."""
    total_episodes: int
    """Number of episodes, as `meta/info.json` has it."""
    frames: int
    """Number of frames of all episodes, as `meta/info.json` has it."""
    task_texts: dict[int, str]
    """`task_index` -> what the robot is told to do."""
    episodes: NDArray[np.int64]
    """Episode numbers, ascending."""
    starts: NDArray[np.int64]
    """Position of the first frame among all frames."""
    stops: NDArray[np.int64]
    """Position after the last frame."""
    data_files: tuple[Path, ...]
    """Parquet files in the order of their frames; together they hold all frames."""
    data_file: NDArray[np.int64]
    """Which of `data_files` holds the episode."""
    video_files: dict[str, tuple[Path, ...]]
    """Video column -> the file of each episode."""
    video_starts: dict[str, NDArray[np.float64]]
    """Video column -> seconds into its file at which each episode starts."""

    def feature(self, column: str, key: str) -> dict[str, Any]:
        """The feature `column`, which the config's `key` names; `UserError` listing near names if it is missing."""
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
        """Columns of a kind: `"video"` or `"image"`."""
        return [name for name, feature in self.features.items() if feature["dtype"] == dtype]

    def files(self, cameras: Iterable[str]) -> list[Path]:
        """The data files, and the video files of some cameras."""
        videos = (path for name in dict.fromkeys(cameras) for path in self.video_files.get(name, ()))
        return [*self.data_files, *dict.fromkeys(videos)]


def nearest_first(name: str, candidates: Iterable[str]) -> str:
    """The candidates as one readable list, those that look like `name` in front."""
    names = list(candidates)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    return ", ".join([*near, *(other for other in names if other not in near)])


def load_metadata(name: str, root: Path) -> Metadata:
    """Read the metadata of the dataset in `root`, and refuse such as list other episodes than they count.

    Args:
        name: What the user calls it.
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
    """Like `load_metadata`, for a dataset that may be incomplete."""
    info = _load_info(name, root)
    if info["codebase_version"] == "v3.0":
        episodes, tasks = _episodes_v3(root, info), _tasks_v3(root)
    else:
        episodes, tasks = _episodes_v2(root, info), _tasks_v2(root)
    return Metadata(
        name=name,
        root=root,
        version=info["codebase_version"],
        fps=float(info["fps"]),
        features=info["features"],
        total_episodes=int(info["total_episodes"]),
        frames=int(info["total_frames"]),
        task_texts=tasks,
        **episodes,
    )


def _load_info(name: str, root: Path) -> dict[str, Any]:
    path = root / INFO
    try:
        info: dict[str, Any] = read_json(path)
    except FileNotFoundError as e:
        raise UserError(f"{root} is not a LeRobot dataset: it has no {INFO} (data.repo_id = {name!r})") from e
    needed = {"codebase_version", "fps", "features", "total_episodes", "total_frames", "data_path"}
    if any(feature["dtype"] == "video" for feature in info.get("features", {}).values()):
        needed.add("video_path")
    if str(info.get("codebase_version", "v3.0")) not in VERSIONS:
        raise UserError(_wrong_version(name, root, str(info["codebase_version"])))
    missing = {key for key in needed if info.get(key) is None}
    if missing:
        raise UserError(
            f"{path} lacks {', '.join(sorted(missing))}: it is damaged; download or write the dataset again"
        )
    return info


def _wrong_version(name: str, root: Path, version: str) -> str:
    if version.startswith("v1"):
        way_out = (
            "lerobot 0.3.3 converts it, from the hub: python -m lerobot.datasets.v2.convert_dataset_v1_to_v2 "
            f"--repo-id {name}"
        )
    else:
        way_out = "a newer rlinf-core may read it; or write it with lerobot's converter for one of these formats"
    return f"{name} ({root}) has LeRobot format {version}; {', '.join(VERSIONS)} are read. {way_out}"


def _episodes_v3(root: Path, info: dict[str, Any]) -> dict[str, Any]:
    """Fields of `Metadata`. The statistics that lie beside them are many times larger and stay unread."""
    videos = [name for name, feature in info["features"].items() if feature["dtype"] == "video"]
    wanted = ["episode_index", "dataset_from_index", "dataset_to_index", "data/chunk_index", "data/file_index"]
    for key in videos:
        wanted += [f"videos/{key}/{part}" for part in ("chunk_index", "file_index", "from_timestamp")]
    paths = sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    if not paths:
        raise UserError(f"{root} has no meta/episodes/*/*.parquet: {AGAIN}")
    table = pa.concat_tables([read_parquet(path, wanted) for path in paths]).sort_by("episode_index")
    column: dict[str, NDArray[Any]] = {key: table[key].to_numpy() for key in table.column_names}
    places = np.stack([column["data/chunk_index"], column["data/file_index"]], axis=1)
    files, data_file = np.unique(places, axis=0, return_inverse=True)
    pattern = info["data_path"]
    return {
        "episodes": column["episode_index"],
        "starts": column["dataset_from_index"],
        "stops": column["dataset_to_index"],
        "data_files": tuple(root / pattern.format(chunk_index=chunk, file_index=file) for chunk, file in files),
        "data_file": data_file.reshape(-1),
        "video_files": {key: _videos_v3(root, info["video_path"], key, column) for key in videos},
        "video_starts": {key: column[f"videos/{key}/from_timestamp"].astype(np.float64) for key in videos},
    }


def _videos_v3(root: Path, pattern: str, key: str, column: dict[str, NDArray[Any]]) -> tuple[Path, ...]:
    places = zip(column[f"videos/{key}/chunk_index"], column[f"videos/{key}/file_index"], strict=True)
    return tuple(root / pattern.format(video_key=key, chunk_index=chunk, file_index=file) for chunk, file in places)


def _tasks_v3(root: Path) -> dict[int, str]:
    """The tasks' texts by number. lerobot writes a pandas frame whose index is the text, under whatever name."""
    table = read_parquet(root / "meta" / "tasks.parquet")
    text = next((name for name in table.column_names if name != "task_index"), None)
    if text is None or "task_index" not in table.column_names:
        raise UserError(f"{root}/meta/tasks.parquet lists no texts by task_index: {AGAIN}")
    return dict(zip(table["task_index"].to_pylist(), table[text].to_pylist(), strict=True))


def _episodes_v2(root: Path, info: dict[str, Any]) -> dict[str, Any]:
    """Fields of `Metadata`: an episode's files follow from its number, its frames from the lengths before it."""
    listed = read_json_lines(root / "meta" / "episodes.jsonl", ("episode_index", "length"))
    listed.sort(key=lambda episode: episode["episode_index"])
    numbers = [episode["episode_index"] for episode in listed]
    stops = np.cumsum([episode["length"] for episode in listed], dtype=np.int64)
    size = int(info.get("chunks_size") or 1000)
    videos = [name for name, feature in info["features"].items() if feature["dtype"] == "video"]

    def files(pattern: str, key: str = "") -> tuple[Path, ...]:
        return tuple(
            root / pattern.format(episode_chunk=number // size, episode_index=number, video_key=key)
            for number in numbers
        )

    return {
        "episodes": np.array(numbers, np.int64),
        "starts": np.concatenate([np.zeros(1, np.int64), stops])[:-1],
        "stops": stops,
        "data_files": files(info["data_path"]),
        "data_file": np.arange(len(numbers)),
        "video_files": {key: files(info["video_path"], key) for key in videos},
        "video_starts": {key: np.zeros(len(numbers)) for key in videos},
    }


def _tasks_v2(root: Path) -> dict[int, str]:
    tasks = read_json_lines(root / "meta" / "tasks.jsonl", ("task_index", "task"))
    return {task["task_index"]: task["task"] for task in tasks}
