"""Write a frame cache (`rlinf cache`): decode each frame once, in order, part by part. Imports no torch.

The manifest of a column is written once all of its parts exist. So the command can be interrupted at any point: the
next one verifies the existing parts and writes the missing ones. On a complete cache it only verifies.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import secrets
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from rlinf_core.cache import remove_abandoned, replacing
from rlinf_core.data.frame_cache.manifest import POSITIONS, Cache, CachePart, Manifest, hash_of, plain, read_manifest
from rlinf_core.data.frame_cache.parts import WAY_OUT, Conversion, matches_hash
from rlinf_core.data.worker_sockets import place_sockets
from rlinf_core.errors import UserError
from rlinf_core.files import find_obstacle, lock_file, write_text, writing


def find_missing(conversion: Conversion) -> dict[int, list[str]]:
    """The parts that are missing or do not match their hash: number -> columns."""
    missing: dict[int, list[str]] = {}
    for number in range(len(conversion.parts)):
        if columns := [column for column in conversion.columns if conversion.written(column, number) is None]:
            missing[number] = columns
    return missing


def find_wrong(conversion: Conversion, missing: dict[int, list[str]]) -> list[str]:
    """File names of those missing parts that exist but do not match their hash or provenance."""
    paths = [conversion.file(column, number) for number, columns in missing.items() for column in columns]
    return [path.name for path in paths if path.is_file() and path.with_suffix(".json").is_file()]


def find_damaged(cache: Cache, columns: Sequence[str]) -> list[str]:
    """File names of the parts of a complete cache that do not match their hash."""
    parts = [part for column in columns if (known := read_manifest(cache.manifest(column))) for part in known.parts]
    return [part.file for part in parts if not matches_hash(cache.folder / part.file, part)]


def check_room(conversion: Conversion, missing: dict[int, list[str]]) -> tuple[int, int]:
    """Return the bytes still to write and the free bytes.

    Raises:
        UserError: The disk is too small, or the folder is not writable.
    """
    folder = conversion.cache.folder
    if why := find_obstacle(folder):
        raise UserError(f"{folder} cannot be written: {why}. {WAY_OUT}")
    share = sum(map(len, missing.values())) / max(len(conversion.parts) * len(conversion.columns), 1)
    needed = round(conversion.bytes_needed() * share)
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.is_dir())).free
    if needed > free:
        smaller = "" if conversion.cache.format == "jpeg" else ", use --format jpeg"
        raise UserError(
            f"{folder}: the cache needs {needed / 1e9:.3g} GB more, but {free / 1e9:.3g} GB are free: make "
            f"room{smaller}, or name another folder with --output"
        )
    return needed, free


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Lock a cache against other writers, if its file system has locks.

    Raises:
        UserError: Another process is writing to it.
    """
    with writing(folder, WAY_OUT):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    with file:
        try:
            lock_file(file, folder)
        except BlockingIOError as error:
            raise UserError(f"{folder} is being written by another process: wait for it") from error
        yield


def convert(
    conversion: Conversion, missing: dict[int, list[str]], *, workers: int, progress: Callable[[int, int], object]
) -> None:
    """Write the missing parts, then the manifests.

    Args:
        conversion: What to write.
        missing: From `find_missing`.
        workers: Number of worker processes; 0: convert in this process.
        progress: Called with the number of finished parts and the number of all missing ones.
    """
    folder = conversion.cache.folder
    with writing(folder, WAY_OUT):
        folder.mkdir(parents=True, exist_ok=True)
    if missing:
        for column in conversion.columns:  # Runs must not use the cache while it changes.
            conversion.cache.manifest(column).unlink(missing_ok=True)
    with writing(folder, WAY_OUT):
        remove_abandoned(folder)
        with replacing(folder / POSITIONS) as aside, aside.open("wb") as file:
            np.save(file, conversion.positions)
    progress(0, len(missing))
    for done, _ in enumerate(_written(conversion, missing, workers), start=1):
        progress(done, len(missing))
    for column in conversion.columns:
        manifest = _manifest(conversion, column)
        write_text(conversion.cache.manifest(column), manifest.write(), writer=secrets.token_hex(4))
        parts = {part.file for part in manifest.parts}
        for path in folder.glob(f"{plain(column)}-[0-9]*"):  # Parts of an earlier, longer cache.
            if path.with_suffix(f".{conversion.cache.format}").name not in parts:
                path.unlink()


def _written(conversion: Conversion, missing: dict[int, list[str]], workers: int) -> Iterator[int]:
    if workers < 2 or len(missing) < 2:
        yield from (conversion.write(number, columns) for number, columns in missing.items())
        return
    context = multiprocessing.get_context("forkserver")
    place_sockets("use --workers 1")
    # On an error or Ctrl-C the pool kills its processes at once: parts are complete or absent.
    with context.Pool(min(workers, len(missing)), _become_worker, (conversion,)) as pool:
        yield from pool.imap_unordered(_write_in_worker, missing.items())


_conversion: list[Conversion] = []
"""The conversion, in a worker process."""


def _become_worker(conversion: Conversion) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The main process handles it.
    # The pool ends its workers by SIGTERM, which a fork server that a loader started earlier has blocked.
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
        evidence=conversion.evidence[column],
        quality=conversion.caches.quality,
        largest_loss=sampled.largest_loss,
        mean_loss=sampled.mean_loss,
        parts=tuple(CachePart(**{key: value for key, value in note.items() if key != "of"}) for note in notes),
    )
