"""The cache: files that can be computed again. Plugins may use this module. Imports no NumPy.

An entry is a set of files under one key, which names everything that they were computed from. Its files are named by
a hash of their content, so that entries share equal ones, and a manifest, `<key>.json`, lists them with their sizes and
a checksum of each block. Everything is written under a random name, fsynced, and then renamed. So no lock is needed:
processes in containers, which may share process ids, and machines with one home folder write the same names with the
same content, and whoever has opened a file keeps what it read although the file is replaced or removed.

`find_entry` compares all checksums once per start, in the first process of each machine: at 1.9 GB/s per core, or
0.05 s for 200 MB on two cores. Other processes compare sizes. What is damaged is reported as the cache's, and computed
again. Checksums find accidents, not attacks: only you can write to your cache (docs/security.md).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rlinf_core.errors import UserError
from rlinf_core.files import sync_folder, write_text
from rlinf_core.terminal import warn

BLOCK = 2**22
"""Bytes under one checksum."""
PART = 16 * BLOCK
"""Bytes of a file that one thread reads at a time."""
THREADS = 8
"""Most threads that compare checksums; the functions of the standard library release the interpreter's lock."""
ABANDONED = 7 * 24 * 3600
"""Seconds after which a temporary file or folder in the cache is that of a process that was killed."""
_TEMPORARY = re.compile(r"\..*\.[0-9a-f]{16}\.tmp")

_swept: set[Path] = set()
"""Folders in which this process has looked for abandoned files; a folder of images may have many thousands of files."""
_checked: set[tuple[int, ...]] = set()
"""Files whose checksums this process has compared: device, inode, size and time of change."""


@dataclass(frozen=True)
class CachedFile:
    """A file of an entry."""

    stored: str
    """Its name in the folder of its kind: a hash of its content, and its suffix."""
    bytes: int
    checksums: tuple[int, ...]
    """CRC-32 of each `BLOCK`."""


@dataclass(frozen=True)
class CacheEntry:
    """Files in the cache that belong together. Copies in other processes open the same files."""

    manifest: Path
    stored: Mapping[str, CachedFile]
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the writer noted, as JSON."""

    def file(self, name: str) -> Path:
        """The path of a file by the name that its writer gave it."""
        return self.manifest.parent / self.stored[name].stored

    @property
    def damage(self) -> str:
        """What is wrong with the sizes of the files, and with which; empty if nothing is."""
        return next((why for name in self.stored if (why := self._wrong_size(name))), "")

    def _wrong_size(self, name: str) -> str:
        path, wanted = self.file(name), self.stored[name].bytes
        try:
            found = path.stat().st_size
        except OSError as error:
            return f"{path}: {error.strerror}"
        return "" if found == wanted else f"{path} has {found} bytes instead of {wanted}"


def cache_folder() -> Path:
    """The folder of everything that is cached: `RLINF_CACHE`, else `rlinf_core` in `XDG_CACHE_HOME` or `~/.cache`.

    Raises:
        UserError: The user has no home folder, as in some containers, and neither variable is set.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "rlinf_core"
    folder = Path(os.environ.get("RLINF_CACHE") or default)
    try:
        return folder.expanduser().absolute()
    except RuntimeError as error:
        raise UserError(
            f"{folder}: this user has no home folder ({error}): set RLINF_CACHE to the folder for what can be computed "
            "again"
        ) from error


def cache_key(*parts: object) -> str:
    """The key for everything that an entry is computed from; parts are compared by their `repr`."""
    return hashlib.blake2b(repr(parts).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def find_entry(kind: str, key: str) -> CacheEntry | None:
    """The undamaged entry with a key; None if there is none. Damage is reported on stderr.

    Args:
        kind: Name of the folder in the cache.
        key: See `cache_key`.
    """
    manifest = cache_folder() / kind / f"{key}.json"
    try:
        entry = read_entry(manifest)
        why = (entry.damage or _first_damage(entry)) if entry else ""
    except (OSError, UserError) as error:
        entry, why = None, str(error)
    if why:
        warn(f"the cache is damaged: {why}. It is written again; the dataset is not affected")
        return None
    return entry


def read_entry(manifest: Path) -> CacheEntry | None:
    """The entry of a manifest, without looking at its files; None if there is no manifest.

    Raises:
        OSError: It cannot be read.
        UserError: It is damaged.
    """
    try:
        text = manifest.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise UserError(f"{manifest} is not a manifest: {error}") from error
    try:
        table = json.loads(text)
        if table.pop("checksum") != _checksum_of(table):
            raise ValueError("it has changed since it was written")
        files = {name: CachedFile(**one | {"checksums": (*one["checksums"],)}) for name, one in table["files"].items()}
        return CacheEntry(manifest, files, table["facts"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{manifest} is not a manifest: {error}") from error


def store_entry(kind: str, key: str, write: Callable[[Path], Mapping[str, Any]]) -> CacheEntry:
    """Write an entry and return it. Another process may write the same one meanwhile.

    Args:
        kind: Name of the folder in the cache.
        key: See `cache_key`.
        write: Writes the files to the folder that it is given; returns `CacheEntry.facts`.

    Raises:
        OSError: The cache cannot be written; nothing of the entry is left behind.
    """
    folder = cache_folder() / kind
    folder.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder)
    aside = temporary(folder / key)
    aside.mkdir()
    try:
        facts = write(aside)
        paths = sorted(aside.iterdir())
        files = dict(zip((path.name for path in paths), _describe(paths), strict=True))
        for path in paths:
            path.replace(folder / files[path.name].stored)
        sync_folder(folder)
        entry = CacheEntry(folder / f"{key}.json", files, dict(facts))
        table = {"files": {name: asdict(one) for name, one in files.items()}, "facts": entry.facts}
        table = json.loads(json.dumps(table))
        write_text(entry.manifest, json.dumps(table | {"checksum": _checksum_of(table)}), writer=secrets.token_hex(8))
        sync_folder(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # NFS keeps the names of files that are open elsewhere.
    return entry


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a single file of the cache: yields a temporary path beside it, which is fsynced and renamed at the end.

    Raises:
        OSError: It cannot be written; nothing is left behind.
    """
    aside = temporary(path)
    try:
        yield aside
        _sync(aside)
        aside.replace(path)
        sync_folder(path.parent)
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def temporary(path: Path) -> Path:
    """A random name beside a path, which no other process has. `remove_abandoned` knows such names."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def remove_abandoned(folder: Path) -> None:
    """Remove temporary files and folders that were left by processes that were killed.

    Once per process and folder. Times are compared with that of a new file, because the clock of a file server may
    differ from this machine's.
    """
    if folder in _swept:
        return
    _swept.add(folder)
    found = [path for path in _children(folder) if _TEMPORARY.fullmatch(path.name)]
    if not found:
        return
    with suppress(OSError):
        clock = temporary(folder / "clock")
        clock.touch()
        now = clock.stat().st_mtime
        clock.unlink()
        for path in found:
            if now - max(one.lstat().st_mtime for one in (path, *_children(path))) > ABANDONED:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def reads_first() -> bool:
    """Whether this is the process of its machine that opens data before the others."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _first_damage(entry: CacheEntry) -> str:
    """The first file whose content differs from its checksums; empty if there is none."""
    if not reads_first():
        return ""
    wanted = {entry.file(name): one.checksums for name, one in entry.stored.items()}
    unchecked = [path for path in wanted if _identity(path) not in _checked]
    found = _checksums(unchecked)
    for path in unchecked:
        if found[path] != wanted[path]:
            return f"the content of {path} has changed since it was written"
        _checked.add(_identity(path))
    return ""


def _describe(paths: Sequence[Path]) -> list[CachedFile]:
    """The files as an entry lists them, after they have been fsynced."""
    digests, found = _in_threads(_synced_digest, paths), _checksums(paths)
    return [
        CachedFile(f"{digest}{path.suffix}", path.stat().st_size, found[path])
        for path, digest in zip(paths, digests, strict=True)
    ]


def _synced_digest(path: Path) -> str:
    _sync(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=16)).hexdigest()


def _checksums(paths: Iterable[Path]) -> dict[Path, tuple[int, ...]]:
    """CRC-32 of each block of some files; several threads share a large file."""
    parts = [(path, start) for path in paths for start in range(0, path.stat().st_size, PART)]
    found: dict[Path, tuple[int, ...]] = dict.fromkeys(paths, ())
    for (path, _), some in zip(parts, _in_threads(_checksums_of_part, parts), strict=True):
        found[path] += some
    return found


def _checksums_of_part(part: tuple[Path, int]) -> tuple[int, ...]:
    path, start = part
    found: list[int] = []
    block = memoryview(bytearray(BLOCK))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while len(found) * BLOCK < PART and (read := file.readinto(block)):
            found.append(zlib.crc32(block[:read]))
    return tuple(found)


def _identity(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _in_threads[S, T](function: Callable[[S], T], work: Iterable[S]) -> list[T]:
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, work))


def _children(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _checksum_of(table: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(table, sort_keys=True).encode(), digest_size=16).hexdigest()
