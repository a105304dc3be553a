"""Making a cache of frames (`rlinf cache`): decode each frame once, in order, part by part.

The manifest of a column comes when all of its parts are there (`frame_cache_parts`). So whatever ends the command, the
next one goes on after the parts that are right, and checks them: running it on a complete cache verifies it. Imports no
torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from rlinf_core.data.frame_cache.manifest import POSITIONS, Manifest, Part, Place, hash_of, plain, read_manifest
from rlinf_core.data.frame_cache.parts import WAY_OUT, Conversion, is_right
from rlinf_core.errors import UserError
from rlinf_core.files import find_obstacle, write_text, writing


def find_missing(conversion: Conversion) -> dict[int, list[str]]:
    """The parts that are not there or not right: number -> columns."""
    missing: dict[int, list[str]] = {}
    for number in range(len(conversion.parts)):
        if columns := [column for column in conversion.columns if conversion.written(column, number) is None]:
            missing[number] = columns
    return missing


def find_wrong(conversion: Conversion, missing: dict[int, list[str]]) -> list[str]:
    """Those of the missing parts that were complete once, and are not what was written."""
    paths = [conversion.file(column, number) for number, columns in missing.items() for column in columns]
    return [path.name for path in paths if path.is_file() and path.with_suffix(".json").is_file()]


def find_damaged(place: Place, columns: Sequence[str]) -> list[str]:
    """The parts of a complete cache that are not what was written."""
    parts = [part for column in columns if (known := read_manifest(place.manifest(column))) for part in known.parts]
    return [part.file for part in parts if not is_right(place.folder / part.file, part)]


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
        quality=conversion.caches.quality,
        largest_loss=sampled.largest_loss,
        mean_loss=sampled.mean_loss,
        parts=tuple(Part(**{key: value for key, value in note.items() if key != "of"}) for note in notes),
    )
