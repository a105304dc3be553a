"""Where a LeRobot dataset lies and what its metadata say: version, columns, tasks and episodes.

Format v3.0: `meta/info.json`, `meta/tasks.parquet` and `meta/episodes/**.parquet`; many episodes share a data file
and a video file, so an episode knows its file and the time in it at which it starts. lerobot itself (seconds to
import) is only needed to download from the hub.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rlinf_core.errors import UserError

VERSION = "v3.0"


@dataclass(frozen=True, eq=False)
class Metadata:
    """The metadata of a dataset that lies in a local folder. Arrays are [episodes] unless said otherwise."""

    name: str
    """What the user calls it: `data.repo_id`."""
    root: Path
    fps: float
    features: dict[str, dict[str, Any]]
    """Column -> `dtype` (`"video"`, `"image"` or a number's) and `shape`."""
    frames: int
    """Number of frames of all episodes."""
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


def nearest_first(name: str, candidates: Iterable[str]) -> str:
    """The candidates as one readable list, those that look like `name` in front."""
    names = list(candidates)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    return ", ".join([*near, *(other for other in names if other not in near)])


def find_root(repo_id: str, revision: str) -> Path:
    """The local folder of a dataset; a hub id is downloaded into lerobot's cache unless it lies there.

    Raises:
        UserError: No `repo_id`, no such folder, or the hub does not answer or does not have it.
    """
    if not repo_id:
        raise UserError("data.repo_id is not set: name a local folder or the id of a dataset on the hub")
    path = Path(repo_id).expanduser()
    if path.is_dir():
        if revision:
            raise UserError(f"data.revision = {revision!r} is for hub ids, but data.repo_id = {repo_id!r} is a folder")
        return path
    if path.is_absolute() or repo_id.startswith((".", "~")) or repo_id.count("/") != 1:
        raise UserError(
            f"data.repo_id = {repo_id!r} is neither a folder (here: {Path.cwd()}) nor a hub id like 'user/name'"
        )
    return _download(repo_id, revision)


def _download(repo_id: str, revision: str) -> Path:
    from httpx import HTTPError
    from huggingface_hub import snapshot_download
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
    from lerobot.datasets.utils import BackwardCompatibilityError
    from lerobot.utils.constants import HF_LEROBOT_HUB_CACHE

    try:
        metadata = LeRobotDatasetMetadata(repo_id, revision=revision or None)
        if not metadata.root.is_relative_to(HF_LEROBOT_HUB_CACHE):
            return Path(metadata.root)
        root = snapshot_download(
            repo_id, repo_type="dataset", revision=metadata.revision, cache_dir=HF_LEROBOT_HUB_CACHE
        )
    except BackwardCompatibilityError as e:
        raise UserError(_wrong_version(repo_id, None, "v2.1")) from e
    except (OSError, HTTPError, RuntimeError, ValueError) as e:  # The hub's own errors are OSErrors and HTTPErrors.
        raise UserError(
            f"data.repo_id = {repo_id!r} is no local folder and could not be had from the hub "
            f"({type(e).__name__}: {str(e).strip().splitlines()[0] if str(e) else 'no reason given'}). "
            "Check the id and the connection (HF_HUB_OFFLINE must not be set), or copy the dataset and name its folder"
        ) from e
    return Path(root)


def _wrong_version(name: str, root: Path | None, version: str) -> str:
    folder = f" --root={root}" if root else ""
    return (
        f"{name} has LeRobot format {version}, and {VERSION} is needed. lerobot converts v2.1: "
        f"python -m lerobot.scripts.convert_dataset_v21_to_v30 --repo-id={name}{folder} --push-to-hub=false"
    )


def load_metadata(name: str, root: Path) -> Metadata:
    """Read the metadata of the dataset in `root`.

    Raises:
        UserError: A file is missing or damaged, or the format is another than v3.0.
    """
    info = _load_info(name, root)
    table = _read_episodes(root, [key for key, feature in info["features"].items() if feature["dtype"] == "video"])
    column = {key: table[key].to_numpy() for key in table.column_names}
    if len(table) != info["total_episodes"]:
        raise UserError(
            f"{root}: meta/info.json counts {info['total_episodes']} episodes, meta/episodes lists {len(table)}: "
            "the dataset is incomplete; download or write it again"
        )
    pattern = info["data_path"]
    files = sorted(set(zip(column["data/chunk_index"].tolist(), column["data/file_index"].tolist(), strict=True)))
    videos = {key: feature for key, feature in info["features"].items() if feature["dtype"] == "video"}
    return Metadata(
        name=name,
        root=root,
        fps=float(info["fps"]),
        features=info["features"],
        frames=int(info["total_frames"]),
        task_texts=_read_tasks(root),
        episodes=column["episode_index"],
        starts=column["dataset_from_index"],
        stops=column["dataset_to_index"],
        data_files=tuple(root / pattern.format(chunk_index=chunk, file_index=file) for chunk, file in files),
        video_files={key: _video_files(root, info["video_path"], key, column) for key in videos},
        video_starts={key: column[f"videos/{key}/from_timestamp"].astype(np.float64) for key in videos},
    )


def _load_info(name: str, root: Path) -> dict[str, Any]:
    path = root / "meta" / "info.json"
    try:
        info: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise UserError(f"{root} is not a LeRobot dataset: it has no meta/info.json (data.repo_id = {name!r})") from e
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read: {e}") from e
    version = info.get("codebase_version", "unknown")
    if version != VERSION:
        raise UserError(_wrong_version(name, root, version))
    needed = {"fps", "features", "total_episodes", "total_frames", "data_path"}
    if any(feature["dtype"] == "video" for feature in info.get("features", {}).values()):
        needed.add("video_path")
    missing = needed - info.keys()
    if missing:
        raise UserError(
            f"{path} lacks {', '.join(sorted(missing))}: it is damaged; download or write the dataset again"
        )
    return info


def _read_tasks(root: Path) -> dict[int, str]:
    """The tasks' texts by number. lerobot writes a pandas frame whose index is the text, under whatever name."""
    table = read_parquet(root / "meta" / "tasks.parquet")
    text = next(name for name in table.column_names if name != "task_index")
    return dict(zip(table["task_index"].to_pylist(), table[text].to_pylist(), strict=True))


def _read_episodes(root: Path, video_columns: list[str]) -> pa.Table:
    """One row an episode, ascending. The statistics that lie beside them are many times larger and stay unread."""
    wanted = ["episode_index", "dataset_from_index", "dataset_to_index", "data/chunk_index", "data/file_index"]
    for key in video_columns:
        wanted += [f"videos/{key}/{part}" for part in ("chunk_index", "file_index", "from_timestamp")]
    paths = sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    if not paths:
        raise UserError(
            f"{root} has no meta/episodes/*/*.parquet: the dataset is incomplete; download or write it again"
        )
    return pa.concat_tables([read_parquet(path, wanted) for path in paths]).sort_by("episode_index")


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Some columns of one parquet file; `UserError` naming it if it is missing, damaged, or lacks one of them."""
    try:
        with pq.ParquetFile(path) as file:
            missing = [name for name in columns or () if name not in file.schema_arrow.names]
            if not missing:
                return file.read(columns=columns)
    except (OSError, pa.ArrowInvalid) as e:
        raise UserError(f"{path} cannot be read: {e}. Download or write the dataset again") from e
    raise UserError(f"{path} lacks the columns {', '.join(missing)}: download, write or convert the dataset again")


def _video_files(root: Path, pattern: str, key: str, column: dict[str, NDArray[Any]]) -> tuple[Path, ...]:
    places = zip(column[f"videos/{key}/chunk_index"], column[f"videos/{key}/file_index"], strict=True)
    return tuple(root / pattern.format(video_key=key, chunk_index=chunk, file_index=file) for chunk, file in places)
