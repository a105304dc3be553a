"""Making a cache of frames (`rlinf cache`): decode each frame once, in order, part by part.

A part is written aside, synced and renamed, and then has a note beside it with its hash and what it was made of; the
manifest of a column comes last. So whatever ends the command, the next one goes on after the parts that are right, and
checks them: running it on a complete cache verifies it. Imports no torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rlinf_core.data.encoding import read_rows
from rlinf_core.data.frame_cache import POSITIONS, Frame, Manifest, Part, Place, hash_of, picture_files, plain, resized
from rlinf_core.data.lerobot import LeRobotSource
from rlinf_core.data.pictures import decode
from rlinf_core.errors import UserError
from rlinf_core.files import find_obstacle, write_text, writing

PART_BYTES = 2**27
"""Size of a raw part: seconds of work, which is what an interruption costs."""
SAMPLED = 64
"""Frames from which sizes and losses are told."""
READ_AT_ONCE = 32
WAY_OUT = "Name another folder with --output"


@dataclass(frozen=True)
class Conversion:
    """The pictures of a dataset on their way into a cache."""

    place: Place
    splits: tuple[LeRobotSource, ...]
    """All rows that the run uses."""
    quality: int
    """Of JPEG, 1 to 100."""
    part_bytes: int = PART_BYTES
    sampled: dict[str, Sampled] = field(init=False)
    """Column -> what a few of its frames tell."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sampled", {column: self._sample(column) for column in self.columns})

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of pictures."""
        return self.splits[0].images

    @cached_property
    def positions(self) -> NDArray[np.int64]:
        """[N], ascending: where the frames stand among all of the dataset."""
        return np.sort(np.concatenate([split.positions for split in self.splits]))

    @property
    def part_frames(self) -> int:
        """Frames of a part."""
        return max(1, self.part_bytes // max(sampled.raw_bytes for sampled in self.sampled.values()))

    @property
    def parts(self) -> list[slice]:
        """The frames of each part."""
        return [slice(i, i + self.part_frames) for i in range(0, len(self.positions), self.part_frames)]

    def bytes_needed(self) -> int:
        """Disk that the whole cache takes; of JPEG an estimate from a sample, a tenth above it."""
        raw, sampled = self.place.format == "raw", self.sampled.values()
        each = sum(one.raw_bytes if raw else one.jpeg_bytes * 1.1 for one in sampled)
        return round(len(self.positions) * (each + 8)) + 4096

    def _sample(self, column: str) -> Sampled:
        chosen = np.unique(np.linspace(0, len(self.positions) - 1, SAMPLED).astype(np.int64))
        frames = [row[column] for row in self.rows(self.positions[chosen])]
        sizes = [(frame.shape[0], frame.shape[1]) for frame in frames]
        losses, total = [np.zeros(1)], 0
        for frame in frames if self.place.format == "jpeg" else ():
            data = jpeg(frame, self.quality)
            total += len(data)
            losses.append(np.abs(decode(data, column).astype(int) - frame).ravel())
        loss = np.concatenate(losses)
        return Sampled(sizes[0], frames[0].nbytes, total / len(frames), int(loss.max()), float(loss.mean()))

    def rows(self, positions: NDArray[np.int64]) -> list[dict[str, Frame]]:
        """The frames at positions as the cache keeps them, by column."""
        found: dict[int, dict[str, Frame]] = {}
        for split in self.splits:
            indices = np.minimum(np.searchsorted(split.positions, positions), len(split) - 1)
            places = np.flatnonzero(split.positions[indices] == positions).tolist()
            rows = read_rows(split, indices[places].tolist()) if places else []
            for place, row in zip(places, rows, strict=True):
                found[place] = {name: resized(self.place.resize, row[name]) for name in self.columns}
        return [found[place] for place in range(len(positions))]

    def made_of(self, column: str, part: slice) -> str:
        """What a part depends on, as a hash."""
        of = self.files[column], self.quality if self.place.format == "jpeg" else 0, self.sampled[column].size
        text = json.dumps([*of, hash_of(self.positions[part])])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @cached_property
    def files(self) -> dict[str, dict[str, int]]:
        """Column -> the files that its pictures are from."""
        episodes = np.unique(np.concatenate([np.unique(split.episodes) for split in self.splits]))
        return {column: picture_files(self.splits[0].metadata, column, episodes) for column in self.columns}

    def file(self, column: str, number: int) -> Path:
        """A part's file."""
        return self.place.folder / f"{plain(column)}-{number:06d}.{self.place.format}"

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
        if self.place.format == "jpeg":
            return jpeg(frame, self.quality)
        if frame.shape != (*self.sampled[column].size, 3):
            raise UserError(
                f"the pictures of {column!r} are of several sizes, {list(frame.shape[:2])} and "
                f"{list(self.sampled[column].size)}: raw frames must be of one; use --format jpeg"
            )
        return np.ascontiguousarray(frame)

    def _put(self, column: str, number: int, part: slice, frames: Sequence[bytes | Frame]) -> None:
        path = self.file(column, number)
        aside, digest = path.with_name(f".{path.name}.tmp"), hashlib.blake2b(digest_size=16)
        with writing(path, WAY_OUT), aside.open("wb") as file:
            pieces: list[bytes | Frame] = list(frames)
            if self.place.format == "jpeg":
                lengths = [8 * (len(frames) + 1), *map(len, frames)]
                pieces.insert(0, np.cumsum(lengths, dtype="<i8").tobytes())
            for piece in pieces:
                file.write(piece)
                digest.update(piece)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        aside.replace(path)
        note = asdict(Part(path.name, len(frames), size, digest.hexdigest())) | {"of": self.made_of(column, part)}
        write_text(path.with_suffix(".json"), json.dumps(note))

    def written(self, column: str, number: int) -> Part | None:
        """A part that is there and right, to its hash; None otherwise."""
        path = self.file(column, number)
        note = path.with_suffix(".json")
        if not path.is_file() or not note.is_file():
            return None
        try:
            table = json.loads(note.read_text(encoding="utf-8"))
            of, part = table.pop("of"), Part(**table)
        except (ValueError, TypeError, KeyError, AttributeError):
            return None  # Half a note: the part is written again.
        if of != self.made_of(column, self.parts[number]) or path.stat().st_size != part.bytes:
            return None
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
        return part if digest.hexdigest() == part.hash else None


@dataclass(frozen=True)
class Sampled:
    """What a few frames of a column tell."""

    size: tuple[int, int]
    raw_bytes: int
    """Of the first of them."""
    jpeg_bytes: float
    """On average."""
    largest_loss: int
    mean_loss: float


def jpeg(frame: Frame, quality: int) -> bytes:
    """A frame as JPEG with colours at full resolution: robots' grippers and marks are small."""
    out = io.BytesIO()
    Image.fromarray(frame).save(out, "JPEG", quality=quality, subsampling=0)
    return out.getvalue()


def find_missing(conversion: Conversion) -> dict[int, list[str]]:
    """The parts that are not there or not right: number -> columns."""
    missing: dict[int, list[str]] = {}
    for number in range(len(conversion.parts)):
        if columns := [column for column in conversion.columns if conversion.written(column, number) is None]:
            missing[number] = columns
    return missing


def check_room(conversion: Conversion, missing: dict[int, list[str]]) -> tuple[int, int]:
    """Bytes that are still to be written, and bytes that are free.

    Raises:
        UserError: They do not fit, or the folder cannot be written to.
    """
    folder = conversion.place.folder
    if why := find_obstacle(folder):
        raise UserError(f"{folder} cannot be written: {why}. {WAY_OUT}")
    share = sum(map(len, missing.values())) / max(len(conversion.parts) * len(conversion.columns), 1)
    needed = round(conversion.bytes_needed() * share)
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.is_dir())).free
    if needed > free:
        smaller = "" if conversion.place.format == "jpeg" else ", use --format jpeg"
        raise UserError(
            f"{folder}: the cache needs {needed / 1e9:.3g} GB more, and {free / 1e9:.3g} GB are free: make "
            f"room{smaller}, or name another folder with --output"
        )
    return needed, free


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep other processes from writing into a cache.

    Raises:
        UserError: Another one does.
    """
    with writing(folder, WAY_OUT):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder} is being written by another process: wait for it") from error
        yield


def convert(
    conversion: Conversion, missing: dict[int, list[str]], *, workers: int, progress: Callable[[int, int], object]
) -> None:
    """Write the missing parts, and then the manifests.

    Args:
        conversion: What to write.
        missing: From `find_missing`.
        workers: Processes that convert; 0: this one does.
        progress: Told finished parts and all.
    """
    folder = conversion.place.folder
    with writing(folder, WAY_OUT):
        folder.mkdir(parents=True, exist_ok=True)
    if missing:
        for column in conversion.columns:  # Runs must not use what is about to change.
            conversion.place.manifest(column).unlink(missing_ok=True)
    with writing(folder, WAY_OUT):
        aside = folder / ".positions.npy"
        np.save(aside, conversion.positions)
        aside.replace(folder / POSITIONS)
    for done, _ in enumerate(_written(conversion, missing, workers), start=1):
        progress(done, len(missing))
    for column in conversion.columns:
        manifest = _manifest(conversion, column)
        write_text(conversion.place.manifest(column), manifest.write())
        parts = {part.file for part in manifest.parts}
        for path in folder.glob(f"{plain(column)}-[0-9]*"):  # Those of an earlier, longer cache.
            if path.with_suffix(f".{conversion.place.format}").name not in parts:
                path.unlink()


def _written(conversion: Conversion, missing: dict[int, list[str]], workers: int) -> Iterator[int]:
    if workers < 2 or len(missing) < 2:
        yield from (conversion.write(number, columns) for number, columns in missing.items())
        return
    context = multiprocessing.get_context("forkserver")
    # Left early, by an error or Ctrl-C, the pool ends its processes at once: parts are whole or not there.
    with context.Pool(min(workers, len(missing)), _become_worker, (conversion,)) as pool:
        yield from pool.imap_unordered(_write_in_worker, missing.items())


_conversion: list[Conversion] = []
"""A worker's own."""


def _become_worker(conversion: Conversion) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The process that was started hears it.
    # The pool ends its workers by SIGTERM, which they do not hear from a server that a loader has started before.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    _conversion[:] = [conversion]


def _write_in_worker(part: tuple[int, list[str]]) -> int:
    return _conversion[0].write(*part)


def _manifest(conversion: Conversion, column: str) -> Manifest:
    sampled = conversion.sampled[column]
    paths = [conversion.file(column, number).with_suffix(".json") for number in range(len(conversion.parts))]
    notes = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return Manifest(
        column=column,
        size=sampled.size,
        positions=hash_of(conversion.positions),
        files=conversion.files[column],
        quality=conversion.quality if conversion.place.format == "jpeg" else 0,
        largest_loss=sampled.largest_loss,
        mean_loss=sampled.mean_loss,
        parts=tuple(Part(**{key: value for key, value in note.items() if key != "of"}) for note in notes),
    )
