"""What a run checks of its dataset before step 1: columns, video files, tasks and numbers of the rows that it uses."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlinf_core.contract.datasets import FILES_MIXED, Crop, DatasetConfig, LeRobotDatasetConfig
from rlinf_core.data.images.video_header import read_video_header
from rlinf_core.data.lerobot.columns import INDEX_COLUMNS, image_size, not_rgb
from rlinf_core.data.lerobot.files import is_there
from rlinf_core.data.lerobot.frame_match import FrameMatch
from rlinf_core.data.lerobot.metadata import NUMBERS, Metadata
from rlinf_core.data.lerobot.prompts import PROMPT, TEXTS, check_prompt_column
from rlinf_core.data.lerobot.rows import SEGMENTS, Rows
from rlinf_core.data.remote.dataset import RemoteDataset
from rlinf_core.data.remote.download_cache import FILLED
from rlinf_core.errors import UserError

RGB_ONLY = "Only RGB images are supported: name another column, or leave this camera out"


def check_columns(dataset: LeRobotDatasetConfig, metadata: Metadata) -> None:
    """Raise `UserError` with every column in the config that is missing or has the wrong dtype or shape."""
    wanted = [(f"data.images.{camera}", column, _check_images) for camera, column in dataset.images.items()]
    wanted += [("data.state", column, _check_vector) for column in dataset.state]
    wanted += [("data.actions", column, _check_vector) for column in dataset.actions]
    problems = []
    for key, column, check in wanted:
        try:
            check(key, column, metadata.feature(column, key))
        except UserError as error:
            problems.append(str(error))
    if dataset.prompt_column and dataset.prompt_column != "task_index":
        try:
            check_prompt_column(metadata, dataset.prompt_column)
        except UserError as error:
            problems.append(str(error))
    for camera, crop in dataset.crops.items():
        feature = metadata.features.get(dataset.images[camera], {})
        problems += _outside(camera, crop, feature)
    if problems:
        raise UserError("\n".join(problems))


def _check_images(key: str, column: str, feature: dict[str, Any]) -> None:
    if feature["dtype"] not in ("video", "image"):
        raise UserError(f"{key} names {column!r}, which contains {feature['dtype']}, not images")
    if described := not_rgb(feature):
        raise UserError(f"{key} names {column!r}, which contains {described}. {RGB_ONLY}")


def _outside(camera: str, crop: Crop, feature: dict[str, Any]) -> list[str]:
    """The problem with a crop that exceeds the images, if the metadata give their size."""
    size = image_size(feature)
    if size is None:
        return []
    height, width = size
    if crop.top + crop.height <= height and crop.left + crop.width <= width:
        return []
    return [
        f"data.crops.{camera} reaches row {crop.top + crop.height} and column {crop.left + crop.width}, but the "
        f"images have {height} rows and {width} columns"
    ]


def _check_vector(key: str, column: str, feature: dict[str, Any]) -> None:
    if not feature["dtype"].startswith(NUMBERS) or len(feature["shape"]) > 1:
        kind = f"{feature['dtype']} {list(feature['shape'])}"
        raise UserError(f"{key} names {column!r}, which contains {kind}; a vector of numbers is needed")


def check_videos(metadata: Metadata, videos: Sequence[Path]) -> None:
    """Raise `UserError` for missing video files, at the start instead of in the first epoch."""
    missing = [path for path in videos if not is_there(path)]
    if missing:
        named = ", ".join(str(path.relative_to(metadata.root)) for path in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise UserError(f"{metadata.root} lacks the video files {named}{more}: download or write the dataset again")


def check_formats(dataset: LeRobotDatasetConfig, metadata: Metadata, used: Collection[int]) -> None:
    """Raise `UserError` if a camera's videos contain other than RGB frames, such as depth maps."""
    for camera, column in dataset.images.items():
        for path in metadata.videos([column], used):
            if why := read_video_header(path).not_rgb:
                raise UserError(f"data.images.{camera} names {column!r}, but {path} contains {why}. {RGB_ONLY}")


def check_overlaps(metadata: Metadata, cameras: Iterable[str], used: Collection[int]) -> None:
    """Raise `UserError` if two episodes overlap in a video: one would get the other's frames."""
    for camera in metadata.video_files.keys() & set(cameras):
        for places in metadata.overlapping(camera, used):
            first, second = metadata.episodes[list(places)]
            raise UserError(
                f"{metadata.video_files[camera][places[1]]}: according to meta/episodes, episode {first} with "
                f"{metadata.lengths[places[0]]} frames and episode {second} overlap in it: write the dataset again, or "
                f"leave one out with data.exclude_episodes (`rlinf check-dataset {metadata.name}` reports more)"
            )


def check_tasks(rows: Rows, used: NDArray[np.bool_]) -> None:
    """Raise `UserError` for a row whose task has no text.

    Args:
        rows: The rows that were read.
        used: [N], the rows to check.
    """
    unknown = used & ~np.isin(rows.prompts, list(rows.prompt_texts))
    for at in np.flatnonzero(unknown)[:1].tolist():
        file = "tasks.parquet" if rows.metadata.version == "v3.0" else "tasks.jsonl"
        raise UserError(
            f"{rows.describe(at)}, has the task {rows.prompts[at]}, which meta/{file} does not list: add "
            "its text there, leave the episode out (data.exclude_episodes), or set data.prompt_from_task = false and "
            "data.default_prompt"
        )


def check_finite(rows: Rows, used: NDArray[np.bool_]) -> None:
    """Raise `UserError` for NaN or infinity: a single one spoils the statistics of all rows.

    Args:
        rows: The rows that were read.
        used: [N], the rows to check; unused episodes may contain anything.
    """
    columns = rows.columns
    for name in columns.keys() - {*INDEX_COLUMNS, SEGMENTS, PROMPT, TEXTS}:
        wrong = np.flatnonzero(used & ~np.isfinite(columns[name]).all(axis=1))
        if not len(wrong):
            continue
        episodes = np.unique(columns["episode_index"][wrong]).tolist()
        named = ", ".join(map(str, episodes[:10])) + ", ..." * (len(episodes) > 10)
        raise UserError(
            f"{name!r} contains NaN or infinity in {len(wrong)} frames of {len(episodes)} episodes ({named}), first in "
            f"{rows.describe(int(wrong[0]))}: fix these frames, or leave the episodes out with "
            f"data.exclude_episodes; `rlinf check-dataset {rows.metadata.name}` lists them"
        )


def check_listed(remote: RemoteDataset, videos: Sequence[str]) -> None:
    """Raise `UserError` for video files that object storage does not have."""
    if missing := remote.missing(videos):
        more = f" and {len(missing) - LISTED} more" if len(missing) > LISTED else ""
        raise UserError(
            f"{remote.address} lacks the video files {', '.join(missing[:LISTED])}{more}: complete the upload, or "
            "leave their episodes out"
        )


def check_room(remote: RemoteDataset, dataset: DatasetConfig, cameras: Sequence[Sequence[str]], rows: int) -> None:
    """Raise `UserError` if the files that streams read at a time do not fit into the download cache of a machine.

    Otherwise each file would be downloaded again and again.

    Args:
        remote: The dataset.
        dataset: Its streams and buffers.
        cameras: The video files of each camera.
        rows: Rows of all episodes that are used.
    """
    streams = math.ceil(dataset.streams * _share_of_ranks())
    mixed = FILES_MIXED * dataset.shuffle_buffer // dataset.streams / rows
    at_once = sum(
        max(max(remote.bytes_of([name]) for name in names), int(mixed * remote.bytes_of(names)))
        for names in cameras
        if names
    )
    others = remote.bytes_of(name for name in remote.files if not name.startswith("videos/"))
    whole = remote.bytes_of(chain.from_iterable(cameras))
    needed = others + min(2 * streams * at_once, whole)
    if needed > remote.cache.limit * FILLED:
        raise UserError(
            f"data.download_limit_gb = {remote.cache.limit / 1e9:.3g} is too little for {remote.address}: {streams} "
            f"streams on this machine read {streams * at_once / 1e9:.3g} GB of videos at a time and as much ahead, and "
            f"its numbers and metadata have {others / 1e9:.3g} GB. Set it to "
            f"{math.ceil(needed / FILLED / 1e7) / 100:.2f} or more, or lower data.streams"
        )


def _share_of_ranks() -> float:
    """The share of the run's ranks that is on this machine."""
    ranks, here = (int(os.environ.get(name, "1") or 1) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    return min(here / ranks, 1.0) if ranks > 0 else 1.0


LISTED = 5
"""Problems with files that a message lists."""


def videos_among(metadata: Metadata, columns: Iterable[str]) -> list[str]:
    """The columns with videos."""
    return [name for name in dict.fromkeys(columns) if metadata.features[name]["dtype"] == "video"]


def check_frames(match: FrameMatch, used: NDArray[np.bool_]) -> None:
    """Raise `UserError` for video files whose frames cannot be shown to belong to the rows.

    Args:
        match: Which frame belongs to which row.
        used: [E of the rows], the episodes to check.
    """
    found = match.mismatches(used)
    if found:
        more = [f"and {len(found) - LISTED} more files"] if len(found) > LISTED else []
        raise UserError("\n".join([*(f"{one.path}: {one.message}" for one in found[:LISTED]), *more]))
