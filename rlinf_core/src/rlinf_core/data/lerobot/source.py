"""Read rows of a LeRobot dataset.

`open_lerobot` first checks that the dataset has what the config names: columns, video files, finite numbers.
`LeRobotSource` then keeps the state and action columns of all frames as contiguous arrays, so that an action chunk is a
slice. Images are decoded for the requested rows only: video frames grouped by file, images in parquet one by one.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rlinf_core.contract.datasets import Crop, LeRobotDatasetConfig, Split
from rlinf_core.data.images.decoders import Frame
from rlinf_core.data.images.parquet import ParquetImages
from rlinf_core.data.images.video import VideoReader
from rlinf_core.data.images.video_header import read_video_header
from rlinf_core.data.lerobot.columns import (
    INDEX_COLUMNS,
    check_finite,
    episode_quality,
    image_size,
    names_of,
    not_rgb,
    read_columns,
)
from rlinf_core.data.lerobot.episodes import EpisodeTable, split_episodes
from rlinf_core.data.lerobot.files import find_dataset
from rlinf_core.data.lerobot.metadata import NUMBERS, Metadata, load_metadata
from rlinf_core.data.lerobot.shared_memory import Runs
from rlinf_core.data.sample import Row
from rlinf_core.errors import UserError

_NO_FRAME: Frame = np.empty((0, 0, 3), np.uint8)
RGB_ONLY = "Only RGB images are supported: name another column, or leave this camera out"
OPEN_FILES = 128  # Memory-mapped image files per process; the usual limit on open files is 1024.


def open_lerobot(dataset: LeRobotDatasetConfig, chunk_length: int, split: Split) -> LeRobotSource:
    """Open one split of a dataset; for one on the hub, the files that the config needs are downloaded first.

    Args:
        dataset: Names the folder or hub id, the columns, and the held-out episodes.
        chunk_length: Actions in a row's chunk, starting at its frame, `dataset.stride` frames apart; 0: no actions.
        split: `"train"`, or `"validation"` for the held-out episodes.

    Raises:
        UserError: The dataset is unavailable, damaged or in another format, lacks a column, or holds no episode out.
    """
    folder = find_dataset(dataset.repo_id, dataset.revision)
    metadata = load_metadata(dataset.repo_id, folder.root)
    actions = dataset.actions if chunk_length else ()
    check_columns(dataset, metadata)
    folder.fetch(metadata.data_files)
    columns, file_stops = read_columns(metadata, [*INDEX_COLUMNS, *dict.fromkeys((*dataset.state, *actions))])
    training, held_out = split_episodes(dataset, _episode_table(dataset, metadata, columns))
    if split == "validation" and not held_out:
        raise UserError(
            "no episode is held out: set data.validation_fraction, data.validation_episodes or data.validation_tasks"
        )
    videos = metadata.videos(dataset.images.values(), training | held_out)
    folder.fetch(videos)
    check_videos(metadata, videos)
    check_formats(dataset, metadata, training | held_out)
    check_overlaps(metadata, dataset.images.values(), training | held_out)
    in_split = np.isin(columns["episode_index"], sorted(training if split == "train" else held_out))
    check_finite(metadata, columns, in_split)
    return LeRobotSource(
        metadata,
        columns,
        np.flatnonzero(in_split),
        file_stops,
        RowLayout(
            images=tuple(dict.fromkeys(dataset.images.values())),
            state=tuple(dict.fromkeys(dataset.state)),
            actions=tuple(dict.fromkeys(actions)),
            chunk_length=chunk_length,
            stride=dataset.stride,
        ),
        decoder=dataset.decoder,
    )


@dataclass(frozen=True)
class RowLayout:
    """What a row contains."""

    images: tuple[str, ...]
    """Image columns to decode."""
    state: tuple[str, ...]
    """Columns that a row contains as vectors."""
    actions: tuple[str, ...]
    """Columns that a row contains as chunks."""
    chunk_length: int
    """Steps of a chunk."""
    stride: int = 1
    """Frames from one step to the next."""


class LeRobotSource:
    """The rows of one split; implements `ColumnSource`. Copies in other processes open their own files."""

    def __init__(
        self,
        metadata: Metadata,
        columns: dict[str, NDArray[Any]],
        rows: NDArray[np.int64],
        file_stops: NDArray[np.int64],
        layout: RowLayout,
        *,
        decoder: Literal["auto", "torchcodec", "pyav"] = "auto",
    ) -> None:
        """Create a source; `open_lerobot` does so from a config.

        Args:
            metadata: The dataset's metadata.
            columns: Numeric columns of all frames: vectors [N, D], index columns [N].
            rows: [n], positions of this split's rows among all frames.
            file_stops: [data files], position after the last frame of each.
            layout: What a row contains.
            decoder: Video decoder; `"auto"`: torchcodec if it loads, else PyAV.
        """
        self._metadata = metadata
        self._columns = columns
        self._rows = Runs.of(rows)
        self._state, self._actions = layout.state, layout.actions
        self._chunk_length, self._stride = layout.chunk_length, layout.stride
        self._video_columns = tuple(name for name in layout.images if metadata.features[name]["dtype"] == "video")
        self._image_columns = tuple(name for name in layout.images if metadata.features[name]["dtype"] == "image")
        self._file_stops = file_stops
        self._decoder = decoder
        self._videos = VideoReader(decoder=None if decoder == "auto" else decoder)
        self._images: dict[int, ParquetImages] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        """Rows with their images: uint8 [height, width, 3] RGB under the names of the image columns."""
        rows = self.without_images(indices)
        at = self.positions_of(indices)
        for column, frames in self._video_frames(at).items() if self._video_columns else ():
            for row, frame in zip(rows, frames, strict=True):
                row[column] = frame
        for row, position in zip(rows, at.tolist(), strict=True):
            for column in self._image_columns:
                row[column] = self._image(column, position)
        return rows

    def without_images(self, indices: Sequence[int]) -> list[Row]:
        """Rows without images: state vectors [D], action chunks [H, D] and `<column>_is_pad` [H]."""
        gathered = self.columns(indices)
        gathered |= {name: gathered[name].tolist() for name in INDEX_COLUMNS}
        return [dict(zip(gathered, values, strict=True)) for values in zip(*gathered.values(), strict=True)]

    def columns(self, indices: Sequence[int]) -> Row:
        """The values of `without_images`, stacked along a first axis of rows; `task` is a list of texts."""
        at = self.positions_of(indices)
        steps = at[:, np.newaxis] + np.arange(self._chunk_length) * self._stride
        stops = self._metadata.stops[self._episode_of(at)][:, np.newaxis]
        is_pad, steps = steps >= stops, np.minimum(steps, stops - 1)
        gathered: Row = {name: self._columns[name][at] for name in (*INDEX_COLUMNS, *self._state)}
        gathered |= {name: self._columns[name][steps] for name in self._actions}
        gathered |= {f"{name}_is_pad": is_pad for name in self._actions}
        texts = self._metadata.task_texts
        return gathered | {"task": [texts[task] for task in gathered["task_index"].tolist()]}

    @property
    def episodes(self) -> NDArray[np.int64]:
        """[n], the dataset's episode number of each row."""
        episodes: NDArray[np.int64] = self._columns["episode_index"][self.positions]
        return episodes

    @property
    def metadata(self) -> Metadata:
        """The metadata of the whole dataset."""
        return self._metadata

    @property
    def images(self) -> tuple[str, ...]:
        """The image columns."""
        return (*self._video_columns, *self._image_columns)

    @property
    def positions(self) -> NDArray[np.int64]:
        """[n], the position of each row among all frames of the dataset."""
        return self._rows.all()

    def positions_of(self, indices: Sequence[int]) -> NDArray[np.int64]:
        """The positions of some rows among all frames of the dataset."""
        return self._rows[np.asarray(indices, np.int64)]

    def names_of(self, columns: Sequence[str]) -> tuple[str, ...]:
        """What the metadata name the numbers of these columns; empty if they do not name all of them."""
        names = [names_of(self._metadata.features.get(column, {})) for column in columns]
        return tuple(chain.from_iterable(names)) if all(names) else ()

    def describe(self, index: int) -> str:
        """The origin of a row, for messages: dataset, data file, episode and frame."""
        row = int(self._rows[np.array(index)])
        path = self._metadata.data_files[self._file_of(row)].relative_to(self._metadata.root)
        episode, frame = (int(self._columns[name][row]) for name in ("episode_index", "frame_index"))
        return f"{self._metadata.name}, {path}, episode {episode}, frame {frame}"

    def fingerprint(self) -> str:
        """A hash of the columns, of this split's rows, of the tasks and of the frame rate."""
        meta = self._metadata
        chunks = self._chunk_length, self._stride
        described = (meta.fps, sorted(meta.task_texts.items()), self._state, self._actions, *chunks)
        digest = hashlib.blake2b(repr(described).encode(), digest_size=16)
        for name in sorted(self._columns):
            digest.update(f"{name} {self._columns[name].dtype} {self._columns[name].shape}".encode())
            digest.update(np.ascontiguousarray(self._columns[name]).data)
        digest.update(self.positions.data)
        return digest.hexdigest()

    def check_decoder(self) -> str:
        """The decoder that `data.decoder` names, without loading it; empty without videos, or if none is named.

        Raises:
            UserError: It is torchcodec, which is not installed.
        """
        if not self._video_columns or self._decoder != "torchcodec":
            return ""
        if find_spec("torchcodec") is None:
            raise UserError('data.decoder = "torchcodec", but torchcodec is not installed: install it, or set "auto"')
        return "torchcodec; not checked here: whether it loads"

    def try_decoder(self, most: int = 16) -> str:
        """The video decoder and its speed, measured on a few evenly spread rows; empty without videos."""
        if not self._video_columns:
            return ""
        at = self._rows[np.linspace(0, len(self) - 1, min(most, len(self))).astype(np.int64)]
        self._video_frames(at[:1])  # Opens files and loads libraries.
        begin = time.perf_counter()
        frames = len(at) * len(self._video_frames(at))
        speed = frames / (time.perf_counter() - begin)
        return f"{self._videos.decoder}, {speed:.0f} frames/s in this process"

    def close(self) -> None:
        """Close videos and image files; they are opened again when rows are read."""
        self._videos.close()
        self._images.clear()

    def _video_frames(self, at: NDArray[np.int64]) -> dict[str, list[Frame]]:
        """Column -> one frame per position; the frames of a file are requested together."""
        meta, frames = self._metadata, {column: [_NO_FRAME] * len(at) for column in self._video_columns}
        episodes = self._episode_of(at)
        wanted: dict[tuple[str, Path], list[int]] = {}
        times = {}
        for column in self._video_columns:
            times[column] = meta.video_starts[column][episodes] + self._columns["timestamp"][at]
            for i, episode in enumerate(episodes.tolist()):
                wanted.setdefault((column, meta.video_files[column][episode]), []).append(i)
        requests = [(path, times[column][places].tolist()) for (column, path), places in wanted.items()]
        found = self._videos.frames_of_files(requests, tolerance=0.5 / meta.fps)
        for ((column, _), places), some in zip(wanted.items(), found, strict=True):
            for place, frame in zip(places, some, strict=True):
                frames[column][place] = frame
        return frames

    def _image(self, column: str, row: int) -> NDArray[np.uint8]:
        file = self._file_of(row)
        if file not in self._images:
            if len(self._images) >= OPEN_FILES:
                self._images.pop(next(iter(self._images)))
            self._images[file] = ParquetImages(
                self._metadata.data_files[file], self._image_columns, self._metadata.root
            )
        start = int(self._file_stops[file - 1]) if file else 0
        return self._images[file].image(column, row - start)

    def _episode_of(self, at: NDArray[np.int64]) -> NDArray[np.int64]:
        """The indices in the metadata's arrays of the episodes at some positions."""
        return np.searchsorted(self._metadata.stops, at, side="right")

    def _file_of(self, row: int) -> int:
        return int(np.searchsorted(self._file_stops, row, side="right"))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_images": {}}


def _episode_table(dataset: LeRobotDatasetConfig, metadata: Metadata, columns: dict[str, NDArray[Any]]) -> EpisodeTable:
    """The table that episodes are selected from; empty episodes are left out."""
    filled = metadata.lengths > 0
    quality = episode_quality(metadata, dataset.quality_column)[filled] if dataset.quality_column else None
    return EpisodeTable(
        numbers=metadata.episodes[filled],
        lengths=metadata.lengths[filled],
        tasks=columns["task_index"][metadata.starts[filled]],
        task_texts=metadata.task_texts,
        quality=quality,
    )


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
    missing = [path for path in videos if not path.is_file()]
    if missing:
        named = ", ".join(str(path.relative_to(metadata.root)) for path in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise UserError(f"{metadata.root} lacks the video files {named}{more}: download or write the dataset again")


def check_formats(dataset: LeRobotDatasetConfig, metadata: Metadata, used: Collection[int]) -> None:
    """Raise `UserError` if the first video of a camera contains other than RGB frames, such as depth maps.

    The other files are checked when they are opened.
    """
    for camera, column in dataset.images.items():
        for path in metadata.videos([column], used)[:1]:
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
