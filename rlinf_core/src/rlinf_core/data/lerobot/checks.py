"""What a run checks of its dataset before step 1: columns, video files, tasks and numbers of the rows that it uses."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlinf_core.contract.datasets import Crop, LeRobotDatasetConfig
from rlinf_core.data.images.video_header import read_video_header
from rlinf_core.data.lerobot.columns import INDEX_COLUMNS, image_size, not_rgb
from rlinf_core.data.lerobot.files import is_there
from rlinf_core.data.lerobot.frame_match import FrameMatch
from rlinf_core.data.lerobot.metadata import NUMBERS, Metadata
from rlinf_core.data.lerobot.prompts import PROMPT, TEXTS, check_prompt_column
from rlinf_core.data.lerobot.rows import SEGMENTS, Rows
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
