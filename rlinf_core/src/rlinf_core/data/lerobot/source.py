"""Read rows of a LeRobot dataset.

`open_lerobot` first checks that the dataset has what the config names: columns, video files, finite numbers.
`LeRobotSource` then keeps the state and action columns of all frames as contiguous arrays, so that an action chunk is a
slice. Images are decoded for the requested rows only: video frames grouped by file, images in parquet one by one.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import batched, chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rlinf_core.contract.datasets import LeRobotDatasetConfig, Split
from rlinf_core.data.images.decoders import Frame
from rlinf_core.data.images.parquet import ParquetImages
from rlinf_core.data.images.still import describe_still
from rlinf_core.data.images.video import VideoReader
from rlinf_core.data.lerobot.checks import (
    check_columns,
    check_finite,
    check_formats,
    check_frames,
    check_listed,
    check_overlaps,
    check_room,
    check_tasks,
    check_videos,
    videos_among,
)
from rlinf_core.data.lerobot.columns import INDEX_COLUMNS, names_of
from rlinf_core.data.lerobot.episodes import UNREAD, EpisodeTable, chosen_by_number, split_episodes
from rlinf_core.data.lerobot.files import DatasetFolder, find_dataset
from rlinf_core.data.lerobot.frame_match import FrameMatch
from rlinf_core.data.lerobot.metadata import Metadata, load_metadata
from rlinf_core.data.lerobot.modality import with_part_names
from rlinf_core.data.lerobot.prompts import TEXTS, other_prompts
from rlinf_core.data.lerobot.quality import episode_quality
from rlinf_core.data.lerobot.rows import SEGMENTS, Rows, read_rows
from rlinf_core.data.lerobot.shared_memory import Runs
from rlinf_core.data.remote.dataset import RemoteDataset
from rlinf_core.data.sample import Row
from rlinf_core.errors import UserError

_NO_FRAME: Frame = np.empty((0, 0, 3), np.uint8)
AT_ONCE = 4
"""Files of a dataset in object storage that are kept on this machine for one read."""
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
    folder = find_dataset(dataset.repo_id, dataset.revision, limit_gb=dataset.download_limit_gb)
    prompt = "" if dataset.prompt_column == "task_index" else dataset.prompt_column or ""
    prompts = dataset.prompt_from_task or bool(dataset.tasks or dataset.validation_tasks)
    metadata = load_metadata(dataset.repo_id, folder.root, prompts=prompts and not prompt)
    if folder.snapshot is None:
        metadata = metadata.with_videos_found()
    actions = dataset.actions if chunk_length else ()
    check_columns(dataset, metadata)
    chosen = chosen_by_number(dataset, metadata.episodes, metadata.lengths)
    rows = read_rows(metadata, (*dataset.state, *actions), chosen, folder.fetch, prompt)
    training, held_out = split_episodes(dataset, _episode_table(dataset, rows, chosen, folder))
    if split == "validation" and not held_out:
        raise UserError(
            "no episode is held out: set data.validation_fraction, data.validation_episodes or data.validation_tasks"
        )
    in_run = _rows_of(rows, training | held_out)
    match = FrameMatch(rows, videos_among(metadata, dataset.images.values()), dataset.match_frames)
    if dataset.match_frames != "number":
        check_overlaps(metadata, dataset.images.values(), training | held_out)
    _provide_videos(dataset, folder, metadata, match, training | held_out)
    if dataset.prompt_from_task:
        check_tasks(rows, in_run)
    in_split = _rows_of(rows, training if split == "train" else held_out)
    check_finite(rows, in_split)
    return LeRobotSource(
        rows,
        np.flatnonzero(in_split),
        RowLayout(
            images=tuple(dict.fromkeys(dataset.images.values())),
            state=tuple(dict.fromkeys(dataset.state)),
            actions=tuple(dict.fromkeys(actions)),
            chunk_length=chunk_length,
            stride=dataset.stride,
            prompt=dataset.prompt_column or "",
        ),
        match,
        decoder=dataset.decoder,
        remote=folder.remote,
        on_demand=_on_demand(dataset, folder),
    )


def _rows_of(rows: Rows, episodes: AbstractSet[int]) -> NDArray[np.bool_]:
    """[N], which rows are of some episodes."""
    chosen = np.isin(rows.metadata.episodes[rows.places], sorted(episodes))
    return np.repeat(chosen, rows.metadata.lengths[rows.places])


def _on_demand(dataset: LeRobotDatasetConfig, folder: DatasetFolder) -> bool:
    """Whether videos are downloaded when they are read, file by file."""
    return folder.remote is not None and dataset.shuffle == "chunked" and dataset.stream_of == "files"


def _provide_videos(
    dataset: LeRobotDatasetConfig, folder: DatasetFolder, metadata: Metadata, match: FrameMatch, used: AbstractSet[int]
) -> None:
    """Download and check the videos of some episodes; those that are downloaded on demand are checked when they are."""
    videos = metadata.videos(dataset.images.values(), used)
    if folder.remote and _on_demand(dataset, folder):
        check_listed(folder.remote, folder.names(videos))
        if videos:
            cameras = [
                folder.names(metadata.videos([column], used)) for column in dict.fromkeys(dataset.images.values())
            ]
            check_room(folder.remote, dataset, cameras, int(metadata.lengths.sum()))
        return
    folder.fetch(videos)
    check_videos(metadata, videos)
    check_frames(match, np.isin(metadata.episodes[match.places], sorted(used)))
    check_formats(dataset, metadata, used)


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
    prompt: str = ""
    """`data.prompt_column`; empty: it is not set."""


class LeRobotSource:
    """The rows of one split; implements `ColumnSource`. Copies in other processes open their own files."""

    def __init__(
        self,
        rows: Rows,
        positions: NDArray[np.int64],
        layout: RowLayout,
        match: FrameMatch,
        *,
        decoder: Literal["auto", "torchcodec", "pyav"] = "auto",
        remote: RemoteDataset | None = None,
        on_demand: bool = False,
    ) -> None:
        """Create a source; `open_lerobot` does so from a config.

        Args:
            rows: The rows that were read, of all splits.
            positions: [n], positions among them of this split's rows.
            layout: What a row contains.
            match: Which frame belongs to which row.
            decoder: Video decoder; `"auto"`: torchcodec if it loads, else PyAV.
            remote: Where files are downloaded from that are not there; None: all are.
            on_demand: Whether videos are downloaded, and checked, when they are first read.
        """
        metadata = rows.metadata
        self._match = match
        self._held, self._metadata, self._columns = rows, metadata, rows.columns
        self._rows = Runs.of(positions)
        self._state, self._actions = layout.state, layout.actions
        self._chunk_length, self._stride = layout.chunk_length, layout.stride
        self._prompt = layout.prompt
        self._video_columns = tuple(name for name in layout.images if metadata.features[name]["dtype"] == "video")
        self._image_columns = tuple(name for name in layout.images if metadata.features[name]["dtype"] == "image")
        self._decoder = decoder
        self._videos = VideoReader(decoder=None if decoder == "auto" else decoder)
        self._images: dict[int, ParquetImages] = {}
        self._still: dict[str, str] = {}
        self._remote, self._on_demand = remote, on_demand
        self._checked: set[Path] = set()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        """Rows with their images: uint8 [height, width, 3] RGB under the names of the image columns."""
        rows = self.without_images(indices)
        at = self._at(indices)
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
        at = self._at(indices)
        steps = at[:, np.newaxis] + np.arange(self._chunk_length) * self._stride
        stops = self._held.stops[self._held.episode_of(at)][:, np.newaxis]
        is_pad, steps = steps >= stops, np.minimum(steps, stops - 1)
        gathered: Row = {name: self._columns[name][at] for name in (*INDEX_COLUMNS, *self._state)}
        gathered |= {name: self._columns[name][steps] for name in self._actions}
        gathered |= {f"{name}_is_pad": is_pad for name in self._actions}
        texts = self._held.prompt_texts
        return gathered | {"task": [texts.get(prompt, "") for prompt in self._held.prompts[at].tolist()]}

    def tasks(self) -> tuple[NDArray[np.int64], Mapping[int, str]]:
        """[n], the number of each row's prompt, and the prompts by number."""
        return self._held.prompts[self._rows.all()].astype(np.int64), self._held.prompt_texts

    def step_seconds(self) -> float:
        """Seconds between consecutive actions of a chunk."""
        return self._stride / self._metadata.fps

    def named_splits(self) -> Mapping[str, Sequence[int]]:
        """The episodes of each split in `meta/info.json`, of those that the dataset has."""
        episodes = self._metadata.episodes.tolist()
        return {name: [one for one in episodes if one in held] for name, held in self._metadata.splits.items()}

    def other_prompts(self) -> Mapping[str, str]:
        """Columns with instructions besides `task_index` -> the text of the first row; empty if one is chosen."""
        if self._prompt:
            return {}
        file, row = self._held.file_of(int(self._at([0])[0]))
        return other_prompts(self._metadata, self._held.files[file], row)

    @property
    def episodes(self) -> NDArray[np.int64]:
        """[n], the dataset's episode number of each row."""
        episodes: NDArray[np.int64] = self._columns["episode_index"][self._rows.all()]
        return episodes

    @property
    def metadata(self) -> Metadata:
        """The metadata of the whole dataset."""
        return self._metadata

    @property
    def images(self) -> tuple[str, ...]:
        """The image columns."""
        return (*self._video_columns, *self._image_columns)

    def image_files(self, column: str) -> list[Path]:
        """The files with the images of this split's rows, sorted: videos, or data files with the images themselves."""
        at = self._rows.all()
        if videos := self._metadata.video_files.get(column):
            used = np.unique(self._held.episode_of(at))
            return sorted({videos[place] for place in self._held.places[used].tolist()})
        segments = np.unique(np.searchsorted(self._held.segments[:, 0], at, side="right") - 1)
        return sorted({self._held.files[file] for file in self._held.segments[segments, 1].tolist()})

    def file_starts(self) -> NDArray[np.int64]:
        """See `contract.datasets.FileStreamSource`: by the files of the camera that has the fewest."""
        at, meta = self._rows.all(), self._metadata
        if self._video_columns:
            by_camera = (meta.video_files[column] for column in self._video_columns)
            files = min((np.unique([str(p) for p in paths], return_inverse=True)[1] for paths in by_camera), key=np.max)
            file = files[self._held.places[self._held.episode_of(at)]]
        else:
            segment = np.searchsorted(self._held.segments[:, 0], at, side="right") - 1
            file = self._held.segments[segment, 1]
        return np.flatnonzero(np.diff(file, prepend=-1))

    def row_files(self) -> dict[str, Path]:
        """The files in `meta` and the data files of the rows that were read, by their paths in the dataset."""
        root = self._metadata.root
        described = sorted(path for path in (root / "meta").rglob("*") if path.is_file())
        return {path.relative_to(root).as_posix(): path for path in (*described, *self._held.files)}

    def image_files_by_name(self) -> dict[str, Path]:
        """The files with the images of this split's rows, by their paths in the dataset."""
        paths = chain.from_iterable(map(self.image_files, self.images))
        return {path.relative_to(self._metadata.root).as_posix(): path for path in paths}

    def image_versions(self) -> dict[str, str]:
        """See `contract.datasets.VersionedSource`."""
        return self._remote.evidence(self.image_files_by_name()) if self._remote else {}

    def prefetch(self, indices: Sequence[int]) -> None:
        """Start downloading the videos of some rows, if they are downloaded on demand."""
        if self._remote and self._on_demand and len(indices):
            places = self._held.places[np.unique(self._held.episode_of(self._at(indices)))].tolist()
            videos = [self._metadata.video_files[column][place] for column in self._video_columns for place in places]
            self._remote.prefetch(self._names(videos))

    @property
    def positions(self) -> NDArray[np.int64]:
        """[n], the position of each row among all frames of the dataset."""
        return self._held.absolute(self._rows.all())

    def positions_of(self, indices: Sequence[int]) -> NDArray[np.int64]:
        """The positions of some rows among all frames of the dataset."""
        return self._held.absolute(self._at(indices))

    def _at(self, indices: Sequence[int]) -> NDArray[np.int64]:
        """The positions of some rows among those that were read."""
        return self._rows[np.asarray(indices, np.int64)]

    def names_of(self, columns: Sequence[str]) -> tuple[str, ...]:
        """What the metadata name the numbers of these columns; empty if they do not name all of them."""
        features = with_part_names(self._metadata.root, self._metadata.features)
        names = [names_of(features.get(column, {})) for column in columns]
        return tuple(chain.from_iterable(names)) if all(names) else ()

    def describe(self, index: int) -> str:
        """The origin of a row, for messages: dataset, data file, episode and frame."""
        row = int(self._rows[np.array(index)])
        path = self._held.files[self._held.file_of(row)[0]].relative_to(self._metadata.root)
        episode, frame = (int(self._columns[name][row]) for name in ("episode_index", "frame_index"))
        return f"{self._metadata.name}, {path}, episode {episode}, frame {frame}"

    def fingerprint(self) -> str:
        """A hash of the columns, of this split's rows, of the tasks and of the frame rate."""
        meta = self._metadata
        chunks = self._chunk_length, self._stride
        described = (meta.fps, sorted(meta.task_texts.items()), self._state, self._actions, *chunks)
        digest = hashlib.blake2b(repr(described).encode(), digest_size=16)
        for name in sorted(self._columns.keys() - {SEGMENTS}):
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
        last = int(self.file_starts()[1:2].min(initial=len(self))) if self._on_demand else len(self)
        at = self._rows[np.linspace(0, last - 1, min(most, last)).astype(np.int64)]
        self._video_frames(at[:1])  # Opens files and loads libraries.
        begin = time.perf_counter()
        decoded = self._video_frames(at)
        speed = len(at) * len(decoded) / (time.perf_counter() - begin)
        self._still = {name: text for name, frames in decoded.items() if (text := describe_still(frames))}
        return f"{self._videos.decoder}, {speed:.0f} frames/s in this process"

    def still_images(self) -> Mapping[str, str]:
        """The video columns that were the same in all rows of `try_decoder`; nothing is decoded for it otherwise."""
        return self._still

    def close(self) -> None:
        """Close videos and image files; they are opened again when rows are read."""
        self._videos.close()
        self._images.clear()

    def _video_frames(self, at: NDArray[np.int64]) -> dict[str, list[Frame]]:
        """Column -> one frame per position; the frames of a file are requested together."""
        meta, frames = self._metadata, {column: [_NO_FRAME] * len(at) for column in self._video_columns}
        episodes = self._held.places[self._held.episode_of(at)]
        wanted: dict[tuple[str, Path], list[int]] = {}
        for column in self._video_columns:
            for i, episode in enumerate(episodes.tolist()):
                wanted.setdefault((column, meta.video_files[column][episode]), []).append(i)
        found: list[list[Frame]] = []
        for some in batched(wanted.items(), AT_ONCE if self._remote else max(len(wanted), 1)):
            with self._holding([path for (_, path), _ in some]):
                self._check_arrived([file for file, _ in some])
                seconds = (self._match.seconds(column, path, at[places]) for (column, path), places in some)
                requests = [(path, times.tolist()) for ((_, path), _), times in zip(some, seconds, strict=True)]
                found += self._videos.frames_of_files(requests, tolerance=0.5 / meta.fps)
        for ((column, _), places), read in zip(wanted.items(), found, strict=True):
            for place, frame in zip(places, read, strict=True):
                frames[column][place] = frame
        return frames

    def _holding(self, paths: Sequence[Path]) -> AbstractContextManager[None]:
        """Have files on this machine for the time of a context."""
        if self._remote is None:
            return nullcontext()
        self._videos.close_removed()
        return self._remote.holding(self._names(paths))

    def _names(self, paths: Iterable[Path]) -> list[str]:
        return [path.relative_to(self._metadata.root).as_posix() for path in paths]

    def _check_arrived(self, files: Iterable[tuple[str, Path]]) -> None:
        """Check files that are downloaded on demand as others are before step 1, once in each process."""
        for column, path in files if self._on_demand else ():
            if path not in self._checked:
                if wrong := self._match.check_file(column, path):
                    raise UserError(f"{path}: {wrong.message}")
                self._checked.add(path)

    def _image(self, column: str, at: int) -> NDArray[np.uint8]:
        file, row = self._held.file_of(at)
        if file not in self._images:
            if len(self._images) >= OPEN_FILES:
                self._images.pop(next(iter(self._images)))
            path = self._held.files[file]
            with self._holding([path]):
                self._images[file] = ParquetImages(path, self._image_columns, self._metadata.root)
        return self._images[file].image(column, row)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_images": {}, "_checked": set()}


def _episode_table(
    dataset: LeRobotDatasetConfig, rows: Rows, chosen: NDArray[np.bool_], folder: DatasetFolder
) -> EpisodeTable:
    """The table that episodes are selected from; empty episodes are left out."""
    metadata, quality = rows.metadata, None
    filled = metadata.lengths > 0
    if dataset.quality_column:
        quality = episode_quality(metadata, dataset.quality_column, chosen, folder.fetch)[filled]
    tasks = np.full(len(metadata.episodes), UNREAD)
    tasks[rows.places] = rows.prompts[rows.starts]
    return EpisodeTable(
        numbers=metadata.episodes[filled],
        lengths=metadata.lengths[filled],
        tasks=tasks[filled],
        task_texts=dict(rows.prompt_texts),
        numbered=TEXTS not in rows.columns,
        quality=quality,
    )
