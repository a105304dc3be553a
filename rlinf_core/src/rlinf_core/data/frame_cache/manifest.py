"""Frame caches on disk: their folders and manifests, and which cache contains the frames of a run. Imports no torch.

A cache is a folder of decoded frames of one dataset, in one format, at one size, for one set of episodes. So a command
for other episodes, another quality or changed files never touches what another run reads, and a run can use any cache
that contains all of its frames. Each column has a manifest, `<column>.json`, which is written last and lists the parts
with their sizes and hashes.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rlinf_core.cache import cache_folder, reads_first
from rlinf_core.contract.datasets import LeRobotDatasetConfig
from rlinf_core.contract.policy import PolicyConfig
from rlinf_core.data.images.decoders import Frame as Frame
from rlinf_core.data.images.evidence import evidence_of_files
from rlinf_core.data.lerobot.columns import image_size
from rlinf_core.data.lerobot.metadata import Metadata
from rlinf_core.data.lerobot.source import LeRobotSource
from rlinf_core.data.transforms import Transform
from rlinf_core.errors import UserError

Format = Literal["raw", "jpeg"]
POSITIONS = "positions.npy"
LOOKED_AT = 256
"""Parts of a column, chosen at random, of which a run that starts reads some kilobytes."""
DECODING = 2
"""Part of each cache's key; raised when the same files decode to other frames. 2: upright, in the tagged colours."""


@dataclass(frozen=True)
class CachePart:
    """One file of a cache, with the frames of consecutive positions."""

    file: str
    frames: int
    bytes: int
    hash: str
    """BLAKE2 of the whole file."""
    evidence: str = ""
    """See `data.images.evidence`; empty in caches of early versions."""


@dataclass(frozen=True)
class Manifest:
    """The content of a cache for one column."""

    column: str
    size: tuple[int, int]
    """Height and width of the frames; for `jpeg` at the dataset's size, of the first frame."""
    positions: str
    """Hash of the positions."""
    files: dict[str, int]
    """Source files of the frames, relative to the dataset's folder -> size in bytes."""
    quality: int
    """JPEG quality; 0 for raw."""
    largest_loss: int
    """Largest absolute error of a sample of frames, in levels of 0 to 255."""
    mean_loss: float
    """Mean absolute error of the same frames."""
    parts: tuple[CachePart, ...]
    evidence: dict[str, str] = field(default_factory=dict)
    """The same files -> their size and a digest of some parts; empty in caches of early versions."""

    def write(self) -> str:
        """The manifest as JSON."""
        return json.dumps(asdict(self), indent=1)


def read_manifest(path: Path) -> Manifest | None:
    """Read a manifest; None if it does not exist."""
    if not path.is_file():
        return None
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        parts = tuple(CachePart(**part) for part in table["parts"])
        return Manifest(**table | {"parts": parts, "size": tuple(table["size"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}): remove {path.parent} and run `rlinf cache` again") from error


@dataclass(frozen=True)
class Caches:
    """All caches of a dataset with the same kind of frames, for different episodes; there may be none."""

    above: Path
    """The folder that contains the caches."""
    name: str
    """Dataset name, for display; not part of the cache key."""
    format: Format
    quality: int
    """JPEG quality, 1 to 100; 0 for raw."""
    resize: Transform | None
    """The transform that was applied to the frames; None: the dataset's size."""
    key: str
    """Hash of the dataset's metadata, `resize` and `DECODING`."""

    @property
    def kind(self) -> str:
        """Format and quality."""
        return f"{self.format}{self.quality or ''}"

    def folders(self) -> list[Path]:
        """The existing caches, complete or not."""
        return sorted(self.above.glob(f"*-{self.kind}-{self.key}-*"))

    def other_kinds(self) -> list[str]:
        """Formats and qualities of the dataset's other caches."""
        found = (re.search(rf"-([a-z]+\d*)-{self.key}-", path.name) for path in self.above.glob(f"*-{self.key}-*"))
        return sorted({match[1] for match in found if match} - {self.kind})

    def cache_of(self, positions: NDArray[np.int64], files: Mapping[str, Mapping[str, str]]) -> Cache:
        """The cache for a set of frames, which may not exist yet.

        Args:
            positions: [N], ascending positions of the frames among all frames of the dataset.
            files: Column -> source files, with the evidence for their content.
        """
        content = _short_hash([hash_of(positions), files])
        return Cache(self.above / f"{plain(self.name)}-{self.kind}-{self.key}-{content}", self.format)


@dataclass(frozen=True)
class Cache:
    """A cache: one folder, which may not exist yet."""

    folder: Path
    format: Format

    def manifest(self, column: str) -> Path:
        """The manifest of a column."""
        return self.folder / f"{plain(column)}.json"

    @cached_property
    def positions(self) -> NDArray[np.int64]:
        """[N], ascending positions of the frames among all frames of the dataset."""
        path = self.folder / POSITIONS
        try:
            found: NDArray[np.int64] = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path} is damaged ({error}): remove {self.folder} and run `rlinf cache` again") from error
        return found


def plain(name: str) -> str:
    """A name as part of a file name. Names that differ stay different: `cam left` and `cam-left`."""
    allowed = re.sub(r"[^A-Za-z0-9._-]", "-", name)
    return allowed if allowed == name else f"{allowed}-{_short_hash(name)[:8]}"


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
        metadata: The dataset's metadata. Its folder is not part of the key: a copy has the same caches.
        dataset: Names the columns, `cache_dir` and `cache_quality`.
        policy: Its first transform may resize.
        format: Format of the frames.
        quality: JPEG quality; 0: `data.cache_quality`.
        above: Folder that contains the caches; empty: `data.cache_dir`, or `frames` in the cache folder.
    """
    resize = resizing_to_keep(metadata, dataset, policy)
    known = [
        metadata.fps,
        metadata.features,
        metadata.episodes.tolist(),
        metadata.lengths.tolist(),
        repr(resize),
        DECODING,
    ]
    return Caches(
        above=Path(above or dataset.cache_dir or cache_folder() / "frames").expanduser(),
        name=Path(metadata.name).name,
        format=format,
        quality=(quality or dataset.cache_quality) if format == "jpeg" else 0,
        resize=resize,
        key=_short_hash(known),
    )


def find_cache(
    caches: Caches, splits: Sequence[LeRobotSource], *, damaged: bool = False
) -> tuple[Cache | None, list[str]]:
    """The first cache that contains all frames of some splits, if any, and why earlier ones do not.

    Args:
        caches: Where to look.
        splits: The splits.
        damaged: Whether it may be damaged, for who compares all hashes.
    """
    reasons: list[str] = []
    for folder in caches.folders():
        cache = Cache(folder, caches.format)
        columns = [(split, column) for split in splits for column in split.images]
        why = next((why for one in columns if (why := _lacks(cache, *one))), "")
        if not why and not damaged and reads_first():
            why = next((why for one in columns if (why := _damaged_part(cache, *one))), "")
        if not why:
            return cache, reasons
        reasons.append(f"{why} ({folder})")
    return None, reasons


def _lacks(cache: Cache, source: LeRobotSource, column: str) -> str:
    """The reason why a cache cannot be used for the rows of a source; empty if it can."""
    manifest = read_manifest(cache.manifest(column))
    what = f"the cache of {column!r} of {source.metadata.name}"
    if manifest is None or not (cache.folder / POSITIONS).is_file():
        return f"{what} is not complete"
    for name, size in image_files([source], column).items():
        if manifest.files.get(name) != size:
            was = f"had {manifest.files[name]} bytes and now has {size}" if name in manifest.files else "is not in it"
            return f"{what} is of other data: {name} {was}"
    compared = manifest.evidence and reads_first()
    for name, found in image_evidence([source], column).items() if compared else ():
        if manifest.evidence[name] != found:
            return f"{what} is of other data: {name} had the same size, but other content"
    if hash_of(cache.positions) != manifest.positions or not np.isin(source.positions, cache.positions).all():
        return f"{what} is of other episodes"
    for part in manifest.parts:
        path = cache.folder / part.file
        if not path.is_file() or path.stat().st_size != part.bytes:
            return f"{what} lacks {part.file}, or a part of it"
    return ""


def _damaged_part(cache: Cache, source: LeRobotSource, column: str) -> str:
    """What a look at some places of some parts finds; `rlinf cache` compares the hashes of whole files."""
    manifest = read_manifest(cache.manifest(column))
    assert manifest is not None
    known = {part.file: part.evidence for part in manifest.parts if part.evidence}
    chosen = random.SystemRandom().sample(sorted(known), min(LOOKED_AT, len(known)))
    found = evidence_of_files({name: cache.folder / name for name in chosen})
    wrong = next((name for name in chosen if found[name] != known[name]), "")
    if not wrong:
        return ""
    return f"the cache of {column!r} of {source.metadata.name} is damaged: {wrong} has changed since it was written"


def resizing_to_keep(metadata: Metadata, dataset: LeRobotDatasetConfig, policy: PolicyConfig) -> Transform | None:
    """The policy's resizing if a cache may store resized frames; None if it must store the original ones.

    Tested on noise, at the data's size and at the resized size, because third-party transforms may do anything.
    """
    first = next(iter(policy.transforms()), None)
    if first is None or not first.resizes or dataset.crops or dataset.stats_need_images:
        return None
    generator, steps = np.random.default_rng(0), (dataset.repack(), *dataset.transforms())
    for column in dict.fromkeys(dataset.images.values()):
        size = image_size(metadata.features[column])
        if size is None:
            return None
        noise = generator.integers(0, 256, (*size, 3), np.uint8)
        for image in (noise, resized(first, noise)):
            sample: Any = dict.fromkeys(dataset.images.values(), image) | {"task": "", **_zeros(metadata, dataset)}
            for step in steps:
                sample = step(sample)
            if not all(np.array_equal(sample["images"].get(name), image) for name in dataset.images):
                return None
    return first


def _zeros(metadata: Metadata, dataset: LeRobotDatasetConfig) -> dict[str, Any]:
    """A state of zeros."""
    return {column: np.zeros(metadata.features[column]["shape"], np.float32) for column in dataset.state}


def resized(resize: Transform | None, image: Frame) -> Frame:
    """An image as a cache stores it."""
    if resize is None:
        return image
    done: Frame = resize({"images": {"camera": image}})["images"]["camera"]
    return done


def image_files(splits: Iterable[LeRobotSource], column: str) -> dict[str, int]:
    """The files with the images of some splits of a dataset, relative to its folder -> size in bytes."""
    paths = {(path, split.metadata.root) for split in splits for path in split.image_files(column)}
    return {path.relative_to(root).as_posix(): path.stat().st_size for path, root in sorted(paths)}


def image_evidence(splits: Iterable[LeRobotSource], column: str) -> dict[str, str]:
    """The same files -> the evidence for their content, `data.images.evidence`."""
    paths = {(path, split.metadata.root) for split in splits for path in split.image_files(column)}
    return evidence_of_files({path.relative_to(root).as_posix(): path for path, root in sorted(paths)})


def hash_of(data: NDArray[Any]) -> str:
    """A hash of an array's bytes."""
    return hashlib.blake2b(np.ascontiguousarray(data).data, digest_size=16).hexdigest()


def _short_hash(values: Any) -> str:
    """A hash for the name of a folder."""
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=8).hexdigest()
