"""The parts of a frame cache: which frames each contains, writing one, and verifying it. Imports no torch.

A part is written to a temporary file, fsynced and renamed; then a JSON file beside it records its hash and provenance.
"""

from __future__ import annotations

import hashlib
import io
import json
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rlinf_core.cache import replacing
from rlinf_core.data.frame_cache.manifest import (
    Cache,
    CachePart,
    Caches,
    Frame,
    hash_of,
    image_evidence,
    image_files,
    plain,
    resized,
)
from rlinf_core.data.images.evidence import evidence_of
from rlinf_core.data.images.pictures import decode
from rlinf_core.data.lerobot.source import LeRobotSource
from rlinf_core.data.loading.encoding import read_rows
from rlinf_core.errors import UserError
from rlinf_core.files import write_text, writing

PART_BYTES = 2**27
"""Size of a raw part: a few seconds of work, which an interruption loses."""
SAMPLED = 64
"""Frames from which sizes and losses are estimated."""
READ_AT_ONCE = 32
WAY_OUT = "Name another folder with --output"


@dataclass(frozen=True)
class Conversion:
    """The conversion of a dataset's images to a cache."""

    caches: Caches
    """The caches of this kind of frames."""
    splits: tuple[LeRobotSource, ...]
    """The splits that the run uses."""
    part_bytes: int = PART_BYTES
    sampled: dict[str, Sampled] = field(init=False)
    """Column -> measurements on a few of its frames."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sampled", {column: self._sample(column) for column in self.columns})

    @cached_property
    def cache(self) -> Cache:
        """The cache to write."""
        return self.caches.cache_of(self.positions, self.evidence)

    @property
    def columns(self) -> tuple[str, ...]:
        """The image columns."""
        return self.splits[0].images

    @cached_property
    def positions(self) -> NDArray[np.int64]:
        """[N], ascending positions of the frames among all frames of the dataset."""
        return np.sort(np.concatenate([split.positions for split in self.splits]))

    @property
    def part_frames(self) -> int:
        """Frames per part."""
        return max(1, self.part_bytes // max(sampled.raw_bytes for sampled in self.sampled.values()))

    @property
    def parts(self) -> list[slice]:
        """The frames of each part."""
        return [slice(i, i + self.part_frames) for i in range(0, len(self.positions), self.part_frames)]

    def bytes_needed(self) -> int:
        """Disk space of the whole cache; for JPEG, 10 % above an estimate from a sample."""
        raw, sampled = self.caches.format == "raw", self.sampled.values()
        each = sum(one.raw_bytes if raw else one.jpeg_bytes * 1.1 for one in sampled)
        return round(len(self.positions) * (each + 8)) + 4096

    def _sample(self, column: str) -> Sampled:
        chosen = np.unique(np.linspace(0, len(self.positions) - 1, SAMPLED).astype(np.int64))
        frames = [row[column] for row in self.rows(self.positions[chosen])]
        sizes = [(frame.shape[0], frame.shape[1]) for frame in frames]
        losses, total = [np.zeros(1)], 0
        for frame in frames if self.caches.format == "jpeg" else ():
            data = jpeg(frame, self.caches.quality)
            total += len(data)
            losses.append(np.abs(decode(data, column).astype(int) - frame).ravel())
        loss = np.concatenate(losses)
        return Sampled(sizes[0], frames[0].nbytes, total / len(frames), int(loss.max()), float(loss.mean()))

    def rows(self, positions: NDArray[np.int64]) -> list[dict[str, Frame]]:
        """The frames at some positions as the cache stores them, by column."""
        found: dict[int, dict[str, Frame]] = {}
        for split in self.splits:
            indices = np.minimum(np.searchsorted(split.positions, positions), len(split) - 1)
            places = np.flatnonzero(split.positions[indices] == positions).tolist()
            rows = read_rows(split, indices[places].tolist()) if places else []
            for place, row in zip(places, rows, strict=True):
                found[place] = {name: resized(self.caches.resize, row[name]) for name in self.columns}
        return [found[place] for place in range(len(positions))]

    def provenance(self, column: str, part: slice) -> str:
        """A hash of everything that a part depends on."""
        of = self.evidence[column], self.caches.quality, self.sampled[column].size
        text = json.dumps([*of, hash_of(self.positions[part])])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @cached_property
    def files(self) -> dict[str, dict[str, int]]:
        """Column -> the source files of its images."""
        return {column: image_files(self.splits, column) for column in self.columns}

    @cached_property
    def evidence(self) -> dict[str, dict[str, str]]:
        """Column -> the same files, with the evidence for their content."""
        return {column: image_evidence(self.splits, column) for column in self.columns}

    def file(self, column: str, number: int) -> Path:
        """The path of a part."""
        return self.cache.folder / f"{plain(column)}-{number:06d}.{self.cache.format}"

    def write(self, number: int, columns: Sequence[str]) -> int:
        """Write a part of some columns; returns its number."""
        part = self.parts[number]
        positions = self.positions[part]
        data: dict[str, list[bytes | Frame]] = {column: [] for column in columns}
        for start in range(0, len(positions), READ_AT_ONCE):
            for row in self.rows(positions[start : start + READ_AT_ONCE]):
                for column in columns:
                    data[column].append(self._kept(column, row[column]))
        for column, frames in data.items():
            self._put(column, number, part, frames)
        return number

    def _kept(self, column: str, frame: Frame) -> bytes | Frame:
        if self.cache.format == "jpeg":
            return jpeg(frame, self.caches.quality)
        if frame.shape != (*self.sampled[column].size, 3):
            raise UserError(
                f"the images of {column!r} have several sizes, {list(frame.shape[:2])} and "
                f"{list(self.sampled[column].size)}: raw frames must have one size; use --format jpeg"
            )
        return np.ascontiguousarray(frame)

    def _put(self, column: str, number: int, part: slice, frames: Sequence[bytes | Frame]) -> None:
        path = self.file(column, number)
        digest = hashlib.blake2b(digest_size=16)
        with writing(path, WAY_OUT), replacing(path) as aside, aside.open("wb") as file:
            pieces: list[bytes | Frame] = list(frames)
            if self.cache.format == "jpeg":
                lengths = [8 * (len(frames) + 1), *map(len, frames)]
                pieces.insert(0, np.cumsum(lengths, dtype="<i8").tobytes())
            for piece in pieces:
                file.write(piece)
                digest.update(piece)
            size = file.tell()
        note = asdict(CachePart(path.name, len(frames), size, digest.hexdigest(), evidence_of(path)))
        text = json.dumps(note | {"of": self.provenance(column, part)})
        write_text(path.with_suffix(".json"), text, writer=secrets.token_hex(4))

    def written(self, column: str, number: int) -> CachePart | None:
        """A part that exists and matches its hash and provenance; None otherwise."""
        path = self.file(column, number)
        note = path.with_suffix(".json")
        if not path.is_file() or not note.is_file():
            return None
        try:
            table = json.loads(note.read_text(encoding="utf-8"))
            of, part = table.pop("of"), CachePart(**table)
        except (ValueError, TypeError, KeyError, AttributeError):
            return None  # A truncated JSON file: the part is written again.
        if of != self.provenance(column, self.parts[number]) or path.stat().st_size != part.bytes:
            return None
        return part if matches_hash(path, part) else None


@dataclass(frozen=True)
class Sampled:
    """Measurements on a few frames of a column."""

    size: tuple[int, int]
    raw_bytes: int
    """Size of the first frame."""
    jpeg_bytes: float
    """Mean size as JPEG."""
    largest_loss: int
    mean_loss: float


def jpeg(frame: Frame, quality: int) -> bytes:
    """Encode a frame as JPEG without chroma subsampling: grippers and markers are small."""
    out = io.BytesIO()
    Image.fromarray(frame).save(out, "JPEG", quality=quality, subsampling=0)
    return out.getvalue()


def matches_hash(path: Path, part: CachePart) -> bool:
    """Whether a file has the recorded hash."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest() == part.hash
