"""Frames that `rlinf cache` has decoded once, read in place of videos and compressed pictures.

A cache is a folder for each dataset, format and size of frames. Each column has `<column>.json`, its manifest, which is
written last and lists the parts with their sizes and hashes; a part holds the frames of neighbouring positions one
after the other. `raw` parts are mapped into memory and are the frames to the bit; a `jpeg` part begins with the offsets
of its pictures.

Where the policy begins by resizing, what is kept is resized: fewer bytes, and nothing left to compute. That is exact if
resizing leaves what has its size alone (`Transform.resizes`) and nothing before it touches images (`resizing_to_keep`).
Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rlinf_core.data.lerobot import LeRobotSource
from rlinf_core.data.lerobot_columns import picture_size
from rlinf_core.data.lerobot_metadata import Metadata
from rlinf_core.data.parquet_images import cache_folder
from rlinf_core.data.pictures import decode
from rlinf_core.data.sample import Row
from rlinf_core.data.transforms import Transform
from rlinf_core.datasets import LeRobotDatasetConfig
from rlinf_core.errors import UserError
from rlinf_core.policy import PolicyConfig

Format = Literal["raw", "jpeg"]
Frame = NDArray[np.uint8]
POSITIONS = "positions.npy"


@dataclass(frozen=True)
class Part:
    """A file of a cache."""

    file: str
    frames: int
    bytes: int
    hash: str


@dataclass(frozen=True)
class Manifest:
    """What a cache holds of one column."""

    column: str
    size: tuple[int, int]
    """Height and width of the frames; of `jpeg` that keeps the dataset's size, of its first frame."""
    positions: str
    """Hash of the positions."""
    files: dict[str, int]
    """The dataset's files that the frames are from, relative to its folder -> size in bytes."""
    quality: int
    """Of JPEG, 0 for raw."""
    largest_loss: int
    """Levels of 0 to 255 by which a sample of frames is off, at most."""
    mean_loss: float
    """And on average."""
    parts: tuple[Part, ...]

    def write(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), indent=1)


def read_manifest(path: Path) -> Manifest | None:
    """A manifest; None if there is none."""
    if not path.is_file():
        return None
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        parts = tuple(Part(**part) for part in table["parts"])
        return Manifest(**table | {"parts": parts, "size": tuple(table["size"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}): remove {path.parent} and run `rlinf cache` again") from error


@dataclass(frozen=True)
class Place:
    """Where the cache of a dataset lies, and what its frames are."""

    folder: Path
    format: Format
    resize: Transform | None
    """What was done to the frames; None: they are the dataset's."""

    def manifest(self, column: str) -> Path:
        """The manifest of a column."""
        return self.folder / f"{plain(column)}.json"


def plain(name: str) -> str:
    """A name as part of a file's."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", name)


def place_of(
    metadata: Metadata, dataset: LeRobotDatasetConfig, policy: PolicyConfig, format: Format, base: str = ""
) -> Place:
    """Where the cache for a dataset and a policy lies, whether or not it has been made.

    Args:
        metadata: Of the dataset. Its folder does not count: a copy elsewhere has the same cache.
        dataset: Names the columns, and `cache_dir`.
        policy: May resize.
        format: Of the frames.
        base: Folder of caches; empty: `data.cache_dir`, or the one for all datasets.
    """
    resize = resizing_to_keep(metadata, dataset, policy)
    known = metadata.fps, metadata.features, metadata.episodes.tolist(), metadata.lengths.tolist()
    digest = hashlib.blake2b(json.dumps([*known, repr(resize)], sort_keys=True).encode(), digest_size=8).hexdigest()
    above = Path(base or dataset.cache_dir or cache_folder() / "frames").expanduser()
    return Place(above / f"{plain(Path(metadata.name).name)}-{format}-{digest}", format, resize)


def resizing_to_keep(metadata: Metadata, dataset: LeRobotDatasetConfig, policy: PolicyConfig) -> Transform | None:
    """The policy's resizing, if frames may be kept as it leaves them; None: they must be kept as they are.

    Tried on noise, at the size of the data and at the one after resizing, as nothing else shows what transforms of
    third parties do.
    """
    first = next(iter(policy.transforms()), None)
    if first is None or not first.resizes or dataset.crops or dataset.stats_need_images:
        return None
    random, steps = np.random.default_rng(0), (dataset.repack(), *dataset.transforms())
    for column in dict.fromkeys(dataset.images.values()):
        size = picture_size(metadata.features[column])
        if size is None:
            return None
        noise = random.integers(0, 256, (*size, 3), np.uint8)
        for image in (noise, resized(first, noise)):
            sample: Any = dict.fromkeys(dataset.images.values(), image) | {"task": "", **_zeros(metadata, dataset)}
            for step in steps:
                sample = step(sample)
            if not all(np.array_equal(sample["images"].get(name), image) for name in dataset.images):
                return None
    return first


def _zeros(metadata: Metadata, dataset: LeRobotDatasetConfig) -> dict[str, Any]:
    """The state of a row that stands still."""
    return {column: np.zeros(metadata.features[column]["shape"], np.float32) for column in dataset.state}


def resized(resize: Transform | None, image: Frame) -> Frame:
    """An image as a cache keeps it."""
    if resize is None:
        return image
    done: Frame = resize({"images": {"camera": image}})["images"]["camera"]
    return done


def picture_files(metadata: Metadata, column: str, episodes: NDArray[np.int64]) -> dict[str, int]:
    """The files that hold the pictures of some episodes, relative to the dataset's folder -> size in bytes."""
    places = np.searchsorted(metadata.episodes, np.unique(episodes)).tolist()
    videos = metadata.video_files.get(column)
    paths = {videos[place] if videos else metadata.data_files[metadata.data_file[place]] for place in places}
    return {path.relative_to(metadata.root).as_posix(): path.stat().st_size for path in sorted(paths)}


class CachedColumn:
    """The frames of a column; files are mapped on first use."""

    def __init__(self, place: Place, manifest: Manifest, positions: NDArray[np.int64]) -> None:
        self._place, self._manifest, self._positions = place, manifest, positions
        self._stops = np.cumsum([part.frames for part in manifest.parts])
        self._open: dict[int, Any] = {}

    def frames(self, positions: NDArray[np.int64]) -> list[Frame]:
        """The frames at positions of the dataset, uint8 [height, width, 3]; raw ones are read-only views of a file."""
        places = np.searchsorted(self._positions, positions)
        parts = np.searchsorted(self._stops, places, side="right")
        within = places - (self._stops - [part.frames for part in self._manifest.parts])[parts]
        read = self._raw if self._place.format == "raw" else self._jpeg
        return [read(part, frame) for part, frame in zip(parts.tolist(), within.tolist(), strict=True)]

    def _raw(self, part: int, frame: int) -> Frame:
        if part not in self._open:
            shape = (self._manifest.parts[part].frames, *self._manifest.size, 3)
            self._open[part] = np.asarray(np.memmap(self._file(part), np.uint8, "r", shape=shape))
        found: Frame = self._open[part][frame]
        return found

    def _jpeg(self, part: int, frame: int) -> Frame:
        if part not in self._open:
            data, frames = np.memmap(self._file(part), np.uint8, "r"), self._manifest.parts[part].frames
            self._open[part] = np.frombuffer(data, np.int64, frames + 1), memoryview(data)
        offsets, data = self._open[part]
        return decode(data[offsets[frame] : offsets[frame + 1]], f"{self._file(part)}: frame {frame}")

    def _file(self, part: int) -> Path:
        return self._place.folder / self._manifest.parts[part].file

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}


class CachedSource:
    """The rows of a `LeRobotSource` with pictures from a cache; follows `ColumnSource`."""

    def __init__(self, source: LeRobotSource, columns: dict[str, CachedColumn], format: Format) -> None:
        self.format = format
        self._source, self._columns = source, columns
        self.without_images, self.columns, self.describe = source.without_images, source.columns, source.describe
        self.fingerprint = source.fingerprint

    def __len__(self) -> int:
        return len(self._source)

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        """Rows with their pictures; raw ones are read-only."""
        rows = self._source.without_images(indices)
        positions = self._source.positions_of(indices)
        for name, column in self._columns.items():
            for row, frame in zip(rows, column.frames(positions), strict=True):
                row[name] = frame
        return rows

    @property
    def episodes(self) -> NDArray[np.int64]:
        """[n], the dataset's own episode number of each row."""
        return self._source.episodes


def open_cached(source: LeRobotSource, dataset: LeRobotDatasetConfig, policy: PolicyConfig) -> CachedSource:
    """The rows of a source with pictures from the cache that `data.cache` asks for.

    Raises:
        UserError: There is none, it is incomplete, or it is of other data; it names the command that makes it.
    """
    assert dataset.cache
    place = place_of(source.metadata, dataset, policy, dataset.cache)
    columns = {}
    for column in source.images:
        manifest = read_manifest(place.manifest(column))
        if (why := _not_usable(place, manifest, source, column)) or manifest is None:
            folder = f" --output {dataset.cache_dir}" if dataset.cache_dir else ""
            raise UserError(
                f'data.cache = "{dataset.cache}", but {why} (it belongs in {place.folder}): run `rlinf cache` with '
                f"this config and --format {dataset.cache}{folder}, or leave data.cache out"
            )
        columns[column] = CachedColumn(place, manifest, np.load(place.folder / POSITIONS, mmap_mode="r"))
    return CachedSource(source, columns, dataset.cache)


def _not_usable(place: Place, manifest: Manifest | None, source: LeRobotSource, column: str) -> str:
    """Why a cache cannot serve the rows of a source; empty if it can."""
    what = f"the cache of {column!r} of {source.metadata.name}"
    if manifest is None:
        begun = any(place.folder.glob(f"{plain(column)}-*"))
        return f"{what} is not complete" if begun else f"there is no cache of {column!r} of {source.metadata.name}"
    for name, size in picture_files(source.metadata, column, source.episodes).items():
        if manifest.files.get(name) != size:
            was = f"had {manifest.files[name]} bytes and has {size}" if name in manifest.files else "is not in it"
            return f"{what} is of other data: {name} {was}"
    positions = np.load(place.folder / POSITIONS, mmap_mode="r")
    if hash_of(positions) != manifest.positions or not np.isin(source.positions, positions).all():
        return f"{what} is of other episodes"
    for part in manifest.parts:
        path = place.folder / part.file
        if not path.is_file() or path.stat().st_size != part.bytes:
            return f"{what} lacks {part.file}, or a part of it"
    return ""


def hash_of(data: NDArray[Any]) -> str:
    """A hash of an array's bytes."""
    return hashlib.blake2b(np.ascontiguousarray(data).data, digest_size=16).hexdigest()
