"""A dataset in object storage: its listing, and its files in the download cache.

The dataset is listed once when a process opens it. The listing pins the version of every file: one that has another
size, ETag or hash when it is downloaded later ends the run, which would otherwise train on a mixture of two versions.
Copies in loader workers read the listing from the cache, so that a worker costs no request and no memory per file until
it reads.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rlinf_core.cache import cache_folder
from rlinf_core.data.remote.address import Address, is_definite, open_filesystem, parse_address, reason
from rlinf_core.data.remote.download_cache import FILLED, DownloadCache, RemoteFile, StorageError
from rlinf_core.errors import RunError, UserError
from rlinf_core.files import write_text
from rlinf_core.terminal import print_progress
from rlinf_core.untrusted.text import path_inside

AT_ONCE = 8
"""Files that are downloaded in parallel when a dataset is opened."""
AHEAD = 4
"""Files that a loader worker downloads in parallel before they are needed."""
ATTEMPTS = 20
"""Downloads of one file before giving up."""
_VERSIONS = ("ETag", "etag", "md5Hash", "generation", "blob_id", "VersionId", "mtime", "LastModified", "last_modified")
"""Keys under which clients report what changes with an object, the most reliable first."""
_LISTING = 1
"""Version of the listing's layout."""


@dataclass(frozen=True)
class RemoteDataset:
    """A dataset at one state of its bucket, whose files are downloaded on demand."""

    address: Address
    setting: str
    """The setting that names the dataset, for messages."""
    cache: DownloadCache
    listing: Path
    """The listing, in the cache."""
    _running: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """Downloads ahead by name, and their threads."""
    _fetched: set[str] = field(default_factory=set, repr=False, compare=False)
    """What `fetch` has provided, and has to stay."""

    @property
    def folder(self) -> Path:
        """The dataset's root in the cache."""
        return self.cache.files

    @cached_property
    def files(self) -> Mapping[str, RemoteFile]:
        """The files as they were listed, by name."""
        try:
            listed = json.loads(self.listing.read_text(encoding="utf-8"))
            return {name: RemoteFile(name, size, version) for name, (size, version) in listed.items()}
        except (OSError, ValueError, TypeError) as error:
            raise RunError(
                f"{self.listing} was removed or damaged ({error}): start again, which lists again"
            ) from error

    def names(self, under: str) -> list[str]:
        """The names of the files in a folder of the dataset, sorted."""
        return sorted(name for name in self.files if name.startswith(f"{under}/"))

    def bytes_of(self, names: Iterable[str]) -> int:
        """The size of some files together; those that are not listed count nothing."""
        return sum(self.files[name].size for name in dict.fromkeys(names) if name in self.files)

    def evidence(self, names: Iterable[str]) -> dict[str, str]:
        """Size and version of some files, to compare with those of other machines and of a checkpoint."""
        return {name: f"{one.size} bytes, {one.version}" for name in names if (one := self.files.get(name))}

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of some files that the dataset does not have."""
        return [name for name in names if name not in self.files]

    def fetch(self, names: Iterable[str]) -> None:
        """Download files that the cache lacks; files that the dataset does not have stay absent.

        Raises:
            UserError: Together they exceed the cache's limit, or storage refuses one or does not answer.
        """
        wanted = [self.files[name] for name in dict.fromkeys(names) if name in self.files]
        self._fetched.update(file.name for file in wanted)
        if (needed := self.bytes_of(self._fetched)) > FILLED * self.cache.limit:
            raise UserError(
                f"{self.setting}: {len(self._fetched)} files of {self.address} have {needed / 1e9:.3g} GB and are "
                f"needed at once, but data.download_limit_gb = {self.cache.limit / 1e9:.3g}: raise it. To read videos "
                'while the run goes on, in any amount, set data.shuffle = "chunked" and data.stream_of = "files"'
            )
        missing = [file for file in wanted if not self.cache.has(file)]
        if not missing:
            return
        with ThreadPoolExecutor(AT_ONCE) as pool, print_progress(f"Downloading {self.address}", "files") as progress:
            running = [pool.submit(self._place, file) for file in missing]
            try:
                for done, one in enumerate(running, start=1):
                    one.result()
                    progress(done, len(running))
            except StorageError as error:
                raise UserError(f"{self.setting}: {error}") from None
            finally:
                pool.shutdown(cancel_futures=True)

    @contextmanager
    def holding(self, names: Sequence[str]) -> Iterator[None]:
        """Have files in the cache, and keep them there until the end of the context.

        Raises:
            UserError: The dataset does not have one.
            RunError: One has changed since the dataset was listed, or does not fit.
            StorageError: Storage does not answer.
        """
        with ExitStack() as keep:
            for name in dict.fromkeys(names):
                if name not in self.files:
                    raise UserError(f"{self.address} has no {name}: its upload may be incomplete")
                self._hold(self.files[name], keep)
            yield

    def _hold(self, file: RemoteFile, keep: ExitStack) -> None:
        for _ in range(ATTEMPTS):  # Another process may make room between download and lock.
            if self.cache.hold(file, keep):
                return
            self._place(file)
        raise RunError(
            f"{file.name} was removed from {self.cache.folder} {ATTEMPTS} times before it could be read: raise "
            "data.download_limit_gb, or lower data.streams"
        )

    def prefetch(self, names: Iterable[str]) -> None:
        """Start downloading files that will be needed soon. What fails is reported when they are needed."""
        running: dict[str, Any] = self._running
        for name in dict.fromkeys(names):
            if name not in self.files or name in running or self.cache.has(self.files[name]):
                continue
            if "" not in running:
                running[""] = ThreadPoolExecutor(AHEAD, "rlinf-download")
            running[name] = running[""].submit(self._place_ahead, self.files[name])
            running[name].add_done_callback(functools.partial(_forget, running, name))

    def _place_ahead(self, file: RemoteFile) -> None:
        with suppress(OSError, RunError, UserError):
            self._place(file, patience=0.0)

    def _place(self, file: RemoteFile, **options: float) -> None:
        self.cache.place(file, functools.partial(self._download, file), **options)

    def _download(self, file: RemoteFile, path: Path) -> None:
        """Download a file, and require that it is the one that was listed."""
        here, there = f"{self.address}/{file.name}", f"{self.address.path}/{file.name}"
        try:
            storage = open_filesystem(self.address, self.setting)
            storage.get_file(there, str(path))
            now = _described(file.name, storage.info(there))
        except UserError:
            raise
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise _unavailable(self.address, here, error) from None
        except Exception as error:  # Clients raise errors of their own libraries for networks and logins.
            raise _unavailable(self.address, here, error) from None
        if now != file:
            raise RunError(
                f"{here} has changed since the dataset was listed: {now.size} bytes, {now.version} instead of "
                f"{file.size} bytes, {file.version}. The run would train on a mixture of both: start again when the "
                "upload is complete, and write new versions to a new folder"
            )

    def __getstate__(self) -> dict[str, Any]:
        kept = {key: value for key, value in self.__dict__.items() if key != "files"}
        return kept | {"_running": {}, "_fetched": set()}


def open_remote(text: str, setting: str, limit: int) -> RemoteDataset:
    """List a dataset in object storage, once per process, and download nothing.

    Args:
        text: Its address, such as `s3://bucket/folder`.
        setting: The setting that names it, for messages.
        limit: Most bytes of downloaded files on this machine.

    Raises:
        UserError: It is not an address that is opened, its client is not installed, or storage refuses or does not
            answer, or has nothing there.
    """
    address = parse_address(text, setting)
    cache = DownloadCache.of(str(address), limit)
    cache.open_dataset()
    return RemoteDataset(address, setting, cache, _listed(address, setting, str(cache_folder()), cache.folder))


@functools.cache
def _listed(address: Address, setting: str, _cache: str, folder: Path) -> Path:
    """The listing of a dataset, written to the cache under its digest."""
    storage = open_filesystem(address, setting)
    try:
        found = storage.find(address.path, detail=True)
    except Exception as error:
        raise UserError(f"{setting}: {address} cannot be listed: {reason(address, error)}") from None
    root = storage._strip_protocol(str(address)).rstrip("/") + "/"
    listing: dict[str, tuple[int, str]] = {}
    for path, info in sorted(found.items()):
        name = path.removeprefix(root)
        if info.get("type") != "file" or path == name or not name or name.endswith("/"):
            continue  # Markers of folders.
        try:
            path_inside(folder, name)
        except ValueError as error:
            raise UserError(f"{setting}: {address} has an object outside the dataset's folder: {error}") from None
        described = _described(name, info)
        listing[name] = (described.size, described.version)
    if not listing:
        raise UserError(f"{setting}: there is nothing in {address}: check bucket and folder")
    text = json.dumps(listing)
    digest = hashlib.blake2b(f"{_LISTING} {text}".encode(), digest_size=16).hexdigest()
    target = folder / "listings" / f"{digest}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        write_text(target, text, writer=secrets.token_hex(8))
    return target


def _described(name: str, info: Mapping[str, Any]) -> RemoteFile:
    """A file by what its client reports of it."""
    digest = info["lfs"].get("sha256") if isinstance(info.get("lfs"), Mapping) else None
    versions = (info.get(key) for key in _VERSIONS)
    version = digest or next((one for one in versions if one not in (None, "")), "")
    return RemoteFile(name, int(info.get("size") or 0), str(version).strip('"'))


def _unavailable(address: Address, here: str, error: BaseException) -> Exception:
    """The error for a file that cannot be downloaded: definite, or one that may pass."""
    if is_definite(error):
        return UserError(f"{here} cannot be downloaded: {reason(address, error)}, but it was listed before")
    return StorageError(errno.EREMOTEIO, f"{here} cannot be downloaded: {reason(address, error)}")


def _forget(running: dict[str, Any], name: str, _done: object) -> None:
    running.pop(name, None)
