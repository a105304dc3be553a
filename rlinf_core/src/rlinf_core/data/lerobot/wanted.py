"""Whether a LeRobot dataset has what a config names: columns of the right kind, video files, frames of their own."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from rlinf_core.contract.datasets import Crop, LeRobotDatasetConfig
from rlinf_core.data.lerobot.columns import picture_size
from rlinf_core.data.lerobot.info import NUMBERS
from rlinf_core.data.lerobot.metadata import Metadata
from rlinf_core.errors import UserError


def check_columns(dataset: LeRobotDatasetConfig, metadata: Metadata) -> None:
    """Raise `UserError` naming every column in the config that is missing or of the wrong kind."""
    wanted = [(f"data.images.{camera}", column, _check_pictures) for camera, column in dataset.images.items()]
    wanted += [("data.state", column, _check_vector) for column in dataset.state]
    wanted += [("data.actions", column, _check_vector) for column in dataset.actions]
    problems = []
    for key, column, check in wanted:
        try:
            check(key, column, metadata.feature(column, key))
        except UserError as error:
            problems.append(str(error))
    for camera, crop in dataset.crops.items():
        feature = metadata.features.get(dataset.images[camera], {})
        problems += _outside(camera, crop, feature)
    if problems:
        raise UserError("\n".join(problems))


def _check_pictures(key: str, column: str, feature: dict[str, Any]) -> None:
    if feature["dtype"] not in ("video", "image"):
        raise UserError(f"{key} names {column!r}, which holds {feature['dtype']}, not pictures")
    described = feature.get("info") or {}
    if described.get("is_depth_map") or described.get("video.is_depth_map"):
        raise UserError(f"{key} names {column!r}, which holds depth maps; only RGB pictures are read")


def _outside(camera: str, crop: Crop, feature: dict[str, Any]) -> list[str]:
    """What is wrong with a crop, as far as the metadata tell the size of the pictures."""
    size = picture_size(feature)
    if size is None:
        return []
    height, width = size
    if crop.top + crop.height <= height and crop.left + crop.width <= width:
        return []
    return [
        f"data.crops.{camera} reaches row {crop.top + crop.height} and column {crop.left + crop.width}, but the "
        f"pictures have {height} rows and {width} columns"
    ]


def _check_vector(key: str, column: str, feature: dict[str, Any]) -> None:
    if not feature["dtype"].startswith(NUMBERS) or len(feature["shape"]) > 1:
        kind = f"{feature['dtype']} {list(feature['shape'])}"
        raise UserError(f"{key} names {column!r}, which holds {kind}; a vector of numbers is needed")


def check_videos(metadata: Metadata, videos: Sequence[Path]) -> None:
    """Raise `UserError` for video files that are not there: better now than in the middle of the first epoch."""
    missing = [path for path in videos if not path.is_file()]
    if missing:
        named = ", ".join(str(path.relative_to(metadata.root)) for path in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise UserError(f"{metadata.root} lacks the video files {named}{more}: download or write the dataset again")


def check_overlaps(metadata: Metadata, cameras: Iterable[str], used: Collection[int]) -> None:
    """Raise `UserError` where two episodes claim the same frames of a video: one would be shown the other's."""
    for camera in metadata.video_files.keys() & set(cameras):
        for places in metadata.overlapping(camera, used):
            first, second = metadata.episodes[list(places)]
            raise UserError(
                f"{metadata.video_files[camera][places[1]]}: by meta/episodes, episode {first} with "
                f"{metadata.lengths[places[0]]} frames and episode {second} overlap in it: write the dataset again, or "
                f"leave one out with data.exclude_episodes (`rlinf check-dataset {metadata.name}` tells more)"
            )
