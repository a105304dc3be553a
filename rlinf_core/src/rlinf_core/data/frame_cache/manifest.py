"""Where caches of frames lie, what they hold, and which of them has the frames of a run. Imports no torch.

A cache is a folder for certain frames: of a dataset, in a format, at a size, of certain episodes. So commands for other
episodes, another quality or changed files never touch what another run reads; and a run takes any cache that has all of
its frames. Each column has `<column>.json`, its manifest, which is written last and lists the parts with their sizes
and hashes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rlinf_core.contract.datasets import LeRobotDatasetConfig
from rlinf_core.contract.policy import PolicyConfig
from rlinf_core.data.images.parquet import cache_folder
from rlinf_core.data.lerobot.columns import picture_size
from rlinf_core.data.lerobot.metadata import Metadata
from rlinf_core.data.lerobot.source import LeRobotSource
from rlinf_core.data.transforms import Transform
from rlinf_core.errors import UserError

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
class Caches:
    """All caches of a dataset that hold the same kind of frames; they differ in episodes, and may be none."""

    above: Path
    """The folder of caches."""
    name: str
    """Of the dataset, for people: it is no part of what a cache is known by."""
    format: Format
    quality: int
    """Of JPEG, 1 to 100; 0 for raw."""
    resize: Transform | None
    """What was done to the frames; None: they are the dataset's."""
    key: str
    """Hash of the dataset's metadata and of `resize`."""

    @property
    def kind(self) -> str:
        """Format and quality."""
        return f"{self.format}{self.quality or ''}"

    def folders(self) -> list[Path]:
        """Those that are there, complete or not."""
        return sorted(self.above.glob(f"*-{self.kind}-{self.key}-*"))

    def other_kinds(self) -> list[str]:
        """Formats and qualities of other caches of the same dataset."""
        found = (re.search(rf"-([a-z]+\d*)-{self.key}-", path.name) for path in self.above.glob(f"*-{self.key}-*"))
        return sorted({match[1] for match in found if match} - {self.kind})

    def place(self, positions: NDArray[np.int64], files: Mapping[str, Mapping[str, int]]) -> Place:
        """Where the cache of certain frames lies, whether or not it has been made.

        Args:
            positions: [N], ascending, where the frames stand among all of the dataset.
            files: Column -> the files they are from, with sizes.
        """
        content = _short_hash([hash_of(positions), files])
        return Place(self.above / f"{plain(self.name)}-{self.kind}-{self.key}-{content}", self.format)


@dataclass(frozen=True)
class Place:
    """The folder of a cache."""

    folder: Path
    format: Format

    def manifest(self, column: str) -> Path:
        """The manifest of a column."""
        return self.folder / f"{plain(column)}.json"

    @cached_property
    def positions(self) -> NDArray[np.int64]:
        """[N], ascending: where the frames stand among all of the dataset."""
        found: NDArray[np.int64] = np.load(self.folder / POSITIONS, mmap_mode="r")
        return found


def plain(name: str) -> str:
    """A name as part of a file's."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", name)


def caches_of(
    metadata: Metadata,
    dataset: LeRobotDatasetConfig,
    policy: PolicyConfig,
    format: Format,
    *,
    quality: int = 0,
    above: str = "",
) -> Caches:
    """The caches for a dataset and a policy.

    Args:
        metadata: Of the dataset. Its folder does not count: a copy elsewhere has the same caches.
        dataset: Names the columns, `cache_dir` and `cache_quality`.
        policy: May resize.
        format: Of the frames.
        quality: Of JPEG; 0: `data.cache_quality`.
        above: Folder of caches; empty: `data.cache_dir`, or the one for all datasets.
    """
    resize = resizing_to_keep(metadata, dataset, policy)
    known = [metadata.fps, metadata.features, metadata.episodes.tolist(), metadata.lengths.tolist(), repr(resize)]
    return Caches(
        above=Path(above or dataset.cache_dir or cache_folder() / "frames").expanduser(),
        name=Path(metadata.name).name,
        format=format,
        quality=(quality or dataset.cache_quality) if format == "jpeg" else 0,
        resize=resize,
        key=_short_hash(known),
    )


def find_cache(caches: Caches, splits: Sequence[LeRobotSource]) -> tuple[Place | None, list[str]]:
    """The first cache that has all frames of some splits, if any, and why those before it have not."""
    reasons: list[str] = []
    for folder in caches.folders():
        place = Place(folder, caches.format)
        why = next((why for split in splits for column in split.images if (why := _lacks(place, split, column))), "")
        if not why:
            return place, reasons
        reasons.append(f"{why} ({folder})")
    return None, reasons


def _lacks(place: Place, source: LeRobotSource, column: str) -> str:
    """Why a cache cannot serve the rows of a source; empty if it can."""
    manifest = read_manifest(place.manifest(column))
    what = f"the cache of {column!r} of {source.metadata.name}"
    if manifest is None or not (place.folder / POSITIONS).is_file():
        return f"{what} is not complete"
    for name, size in picture_files(source.metadata, column, source.episodes).items():
        if manifest.files.get(name) != size:
            was = f"had {manifest.files[name]} bytes and has {size}" if name in manifest.files else "is not in it"
            return f"{what} is of other data: {name} {was}"
    if hash_of(place.positions) != manifest.positions or not np.isin(source.positions, place.positions).all():
        return f"{what} is of other episodes"
    for part in manifest.parts:
        path = place.folder / part.file
        if not path.is_file() or path.stat().st_size != part.bytes:
            return f"{what} lacks {part.file}, or a part of it"
    return ""


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


def hash_of(data: NDArray[Any]) -> str:
    """A hash of an array's bytes."""
    return hashlib.blake2b(np.ascontiguousarray(data).data, digest_size=16).hexdigest()


def _short_hash(values: Any) -> str:
    """For the name of a folder."""
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=8).hexdigest()
