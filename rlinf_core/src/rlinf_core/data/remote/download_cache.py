"""A folder of downloaded files of bounded size, which all processes of a machine share.

`remote` in the cache (`rlinf_core.cache`) has a folder per dataset: `files` in the dataset's own layout, `records` with
the size and version of each file, whose time of change is that of its last use, and `parts`, downloads that are not
complete. Only files with a record are ever removed: nothing that a user has put there.

A file gets its name once it is complete. Locks are the kernel's (`flock`), so those of a killed process are gone: on a
part while it is downloaded, so that each file is downloaded once; shared on a file while it is read, so that it is not
removed; on `lock` while room is made. If the files would exceed the limit, the least recently used ones are removed
down to `FILLED` of it. Metadata and numbers of a dataset that a process has open stay (`in_use`).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from rlinf_core.cache import cache_folder
from rlinf_core.errors import RunError
from rlinf_core.files import sync_folder, write_text
from rlinf_core.untrusted.text import path_inside

KIND = "remote"
"""Its folder in the cache."""
FILLED = 0.9
"""How much of the limit stays in use when room is made, so that room is made for many files at once."""
PATIENCE = 60.0
"""Seconds for which a download waits until files that fill the cache are no longer being read."""
REMOVED_ANY_TIME = "videos"
"""The folder of a dataset whose files may be removed while a process has the dataset open."""


@dataclass(frozen=True)
class RemoteFile:
    """A file in object storage, as it was listed."""

    name: str
    """Its path in the dataset."""
    size: int
    """Bytes."""
    version: str
    """What changes with its content: an ETag, a hash; the time of change where storage has nothing better."""


@dataclass(frozen=True)
class DownloadCache:
    """The downloaded files of one dataset; room is shared with those of all others."""

    folder: Path
    """The dataset's folder in the cache."""
    limit: int
    """Most bytes of the files of all datasets together."""

    @classmethod
    def of(cls, address: str, limit: int) -> DownloadCache:
        """The folder for what is downloaded from an address."""
        name = address.rpartition("/")[2][:40] or "dataset"
        digest = hashlib.blake2b(address.encode(), digest_size=8).hexdigest()
        return cls(cache_folder() / KIND / f"{name}-{digest}", limit)

    @property
    def files(self) -> Path:
        """The root of the dataset's own layout."""
        return self.folder / "files"

    def has(self, file: RemoteFile) -> bool:
        """Whether a file is there, complete and of its listed version; marks it as used now."""
        record = self._record(file.name)
        try:
            noted = json.loads(record.read_text(encoding="utf-8"))
            there = noted == [file.size, file.version] and self._path(file.name).stat().st_size == file.size
            if there:
                os.utime(record)
        except (OSError, ValueError):
            return False
        return there

    def place(self, file: RemoteFile, download: Callable[[Path], None], *, patience: float = PATIENCE) -> None:
        """Download a file unless it is there; if another process is downloading it, wait for that.

        Args:
            file: The file.
            download: Writes it to a path.
            patience: Seconds to wait for room.

        Raises:
            RunError: There is no room, or the disk is full.
            Exception: What `download` raises; nothing of the file is left.
        """
        if self.has(file):
            return
        with _writing(), self._locked_part(file.name) as part:
            if self.has(file):
                return
            self._record(file.name).unlink(missing_ok=True)  # Of another version.
            reserved = part.with_suffix(".size")
            try:
                self._reserve(file, reserved, patience)
                download(part)
                if (size := part.stat().st_size) != file.size:
                    raise RunError(f"{file.name}: {size} bytes were downloaded instead of {file.size}: start again")
                path = self._path(file.name)
                path.parent.mkdir(parents=True, exist_ok=True)
                _sync(part)
                part.replace(path)
                record = self._record(file.name)
                record.parent.mkdir(parents=True, exist_ok=True)
                write_text(record, json.dumps([file.size, file.version]))
                sync_folder(path.parent)
            finally:
                part.unlink(missing_ok=True)
                reserved.unlink(missing_ok=True)

    def hold(self, file: RemoteFile, keep: ExitStack) -> bool:
        """Keep a file from being removed until `keep` is closed; False if it is not there any more."""
        path = self._path(file.name)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            return False
        with ExitStack() as here:
            here.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if not _is_still(descriptor, path) or not self.has(file):
                return False
            keep.push(here.pop_all())
        return True

    def open_dataset(self) -> None:
        """Keep metadata and numbers of this dataset in the cache as long as this process lives."""
        if (os.getpid(), self.folder) in _open_datasets:
            return
        with _writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder / "in_use", os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        _open_datasets[os.getpid(), self.folder] = descriptor

    def _path(self, name: str) -> Path:
        return path_inside(self.files, name)

    def _record(self, name: str) -> Path:
        return path_inside(self.folder / "records", f"{name}.json")

    @contextmanager
    def _locked_part(self, name: str) -> Iterator[Path]:
        """The path to download a file to, locked."""
        part = self.folder / "parts" / hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
        part.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if _is_still(descriptor, part):  # Else its owner has given it its final name meanwhile.
                    yield part
                    return
            finally:
                os.close(descriptor)

    def _reserve(self, file: RemoteFile, reserved: Path, patience: float) -> None:
        """Make room for a file, and note that it is taken."""
        begin = time.monotonic()
        while not self._has_room(file.size, reserved):
            if time.monotonic() - begin >= patience:
                raise RunError(
                    f"{file.name} ({file.size / 1e9:.3g} GB) does not fit into {self.folder.parent}, which may have "
                    f"{self.limit / 1e9:.3g} GB: the other files in it are being read, or are the metadata and numbers "
                    "of open datasets. Raise data.download_limit_gb, or lower data.streams"
                )
            time.sleep(0.2)

    def _has_room(self, size: int, reserved: Path) -> bool:
        root = self.folder.parent
        descriptor = os.open(root / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            noted = os.pread(descriptor, 32, 0)
            used = int(noted) if noted.isdigit() else None
            if used is None or used + size > self.limit:
                used = _remove_oldest(root, int(FILLED * self.limit) - size, self.limit - size)
            if used + size > self.limit:
                return False
            reserved.write_text(str(size))
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, str(used + size).encode(), 0)
            return True
        finally:
            os.close(descriptor)


_open_datasets: dict[tuple[int, Path], int] = {}
"""Descriptors of the locks of the datasets that this process has open."""


def _remove_oldest(root: Path, target: int, most: int) -> int:
    """Remove the least recently used files until at most `target` bytes are left, if more than `most` are there.

    Returns:
        Bytes that are left.
    """
    found: list[tuple[int, int, Path, Path]] = []
    used = 0
    for dataset in (path for path in root.iterdir() if path.is_dir()):
        used += sum(map(_reserved_bytes, _files_below(dataset / "parts")))
        for record in _files_below(dataset / "records"):
            name = record.relative_to(dataset / "records").as_posix().removesuffix(".json")
            path = dataset / "files" / name
            with suppress(OSError):  # It is being replaced.
                found.append((record.stat().st_mtime_ns, path.stat().st_size, path, record))
    used += sum(size for _, size, _, _ in found)
    if used <= most:
        return used
    for _, size, path, record in sorted(found):
        if used <= target:
            break
        if _removed(path, record, root):
            used -= size
    return used


def _removed(path: Path, record: Path, root: Path) -> bool:
    """Remove a file unless it is being read, or belongs to the part of an open dataset that stays."""
    dataset, _, top = path.relative_to(root).parts[:3]
    with ExitStack() as locks:
        try:
            if top != REMOVED_ANY_TIME:
                (root / dataset / "in_use").touch()
            for one in [path] if top == REMOVED_ANY_TIME else [path, root / dataset / "in_use"]:
                descriptor = os.open(one, os.O_RDWR)  # On NFS, an exclusive lock needs the right to write.
                locks.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            record.unlink()
            path.unlink()
        except OSError:
            return False
    return True


def _reserved_bytes(note: Path) -> int:
    """The bytes of a download that is running; the remains of one whose process is gone are removed."""
    if note.suffix != ".size":
        return 0
    part = note.with_suffix("")
    try:
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink(missing_ok=True)
            note.unlink(missing_ok=True)
        except BlockingIOError:
            return int(note.read_text() or 0)
        finally:
            os.close(descriptor)
    except (OSError, ValueError):
        return 0
    return 0


def _files_below(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in names)


def _is_still(descriptor: int, path: Path) -> bool:
    """Whether a path still names the file that a descriptor has open."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def _writing() -> Iterator[None]:
    """Name the cache in errors of its disk; those of downloads have been put into words before."""
    try:
        yield
    except OSError as error:
        if not isinstance(error, StorageError):
            raise RunError(
                f"downloads cannot be written to {cache_folder() / KIND}: {error.strerror or error}. Make room there, "
                "or set RLINF_CACHE to a folder on a local disk (it needs file locks)"
            ) from None
        raise


class StorageError(OSError):
    """Object storage does not answer; the message says which file and why."""

    def __str__(self) -> str:
        return str(self.strerror)
