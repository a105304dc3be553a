"""Find a LeRobot dataset and read its files.

A dataset is a local folder, a snapshot on the hub, or a folder in object storage. From there, only the files that are
used are downloaded, metadata first.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from rlinf_core.contract.datasets import DOWNLOAD_LIMIT
from rlinf_core.data.remote.address import is_address
from rlinf_core.data.remote.dataset import RemoteDataset, open_remote
from rlinf_core.errors import UserError
from rlinf_core.hub import NotInRepositoryError, Snapshot, local_path, open_snapshot, parse_hub_id
from rlinf_core.untrusted.parquet import open_parquet, read_table
from rlinf_core.untrusted.text import NotAFileError, check_file, parse_json, read_text
from rlinf_core.untrusted.text import read_json as read_any_json

SETTING = "data.repo_id"
INFO = "meta/info.json"


@dataclass(frozen=True)
class DatasetFolder:
    """The folder of a dataset, which may be filled from elsewhere on demand."""

    root: Path
    snapshot: Snapshot | RemoteDataset | None = None
    """Where its files are downloaded from, on the hub or in object storage; None for a local folder."""

    @property
    def remote(self) -> RemoteDataset | None:
        """The dataset in object storage, whose files stay in `root` only as long as there is room."""
        return self.snapshot if isinstance(self.snapshot, RemoteDataset) else None

    def fetch(self, paths: Iterable[Path]) -> None:
        """Download files of the dataset that `root` lacks; files that do not exist there stay absent.

        Raises:
            UserError: The download fails.
        """
        if self.snapshot is not None:
            self.snapshot.fetch(self.names(paths))

    def names(self, paths: Iterable[Path]) -> list[str]:
        """The names of files within the dataset."""
        return [path.relative_to(self.root).as_posix() for path in paths]


def find_dataset(
    repo_id: str, revision: str = "", setting: str = SETTING, *, limit_gb: float = DOWNLOAD_LIMIT
) -> DatasetFolder:
    """Find a dataset; for one on the hub or in object storage, the metadata are downloaded unless they are cached.

    Args:
        repo_id: A folder, a hub id `owner/name` with an optional `@revision`, or an address such as
            `s3://bucket/folder`. A dataset that lerobot recorded under a hub id (in `HF_LEROBOT_HOME`) takes precedence
            over the hub.
        revision: Branch, tag or commit on the hub, instead of one in the id; empty: the hub's default.
        setting: The setting that names the dataset, for messages.
        limit_gb: `data.download_limit_gb`: most gigabytes that are kept of datasets in object storage.

    Raises:
        UserError: `repo_id` is empty or names no folder, or the hub is unreachable, lacks the dataset or denies access.
    """
    if not repo_id:
        raise UserError(f"{setting} is not set: name a local folder or the id of a dataset on the hub")
    if is_address(repo_id):
        if revision:
            raise UserError(
                f"data.revision = {revision!r} applies to hub ids, but {setting} = {repo_id!r} is an address"
            )
        remote = open_remote(repo_id, setting, round(limit_gb * 1e9))
        if INFO not in remote.files:
            raise UserError(
                f"{setting}: {repo_id} has no {INFO}: it is not a dataset in LeRobot's format{_below(remote)}"
            )
        remote.fetch(remote.names("meta"))
        return DatasetFolder(remote.folder, remote)
    path = local_path(repo_id, setting)
    if path is not None:
        if revision:
            raise UserError(f"data.revision = {revision!r} applies to hub ids, but {setting} = {repo_id!r} is a folder")
        return DatasetFolder(path)
    name, own_revision = parse_hub_id(repo_id)
    if own_revision and revision:
        raise UserError(f"{setting} = {repo_id!r} names a revision, and data.revision = {revision!r} another: set one")
    recorded = _recorded(name)
    if recorded is not None and not (own_revision or revision):
        return DatasetFolder(recorded)
    try:
        snapshot = open_snapshot(name, own_revision or revision or None, "dataset", setting, INFO)
    except NotInRepositoryError as error:
        raise UserError(
            f"{setting}: the dataset {repo_id} on the hub has no {INFO}: it is not in LeRobot's format"
        ) from error
    snapshot.fetch(snapshot.names("meta"))
    return DatasetFolder(snapshot.folder, snapshot)


def _below(remote: RemoteDataset) -> str:
    """Datasets below an address, for a message."""
    found = [name.removesuffix(f"/{INFO}") for name in remote.files if name.endswith(f"/{INFO}")]
    return f". Below it are {', '.join(found[:4])}{', ...' * (len(found) > 4)}" if found else ""


def find_root(repo_id: str, revision: str = "") -> Path:
    """The local folder with at least the metadata of a dataset; see `find_dataset`."""
    return find_dataset(repo_id, revision).root


def _recorded(name: str) -> Path | None:
    """The folder of a dataset that lerobot recorded under this id on this machine."""
    from huggingface_hub import constants

    home = os.environ.get("HF_LEROBOT_HOME") or Path(constants.HF_HOME) / "lerobot"
    root = Path(home).expanduser() / name
    # Older versions of lerobot also downloaded parts of datasets to this folder, and left this marker.
    downloaded = (root / ".cache" / "huggingface" / "download").exists()
    return root if (root / INFO).is_file() and not downloaded else None


def is_there(path: Path) -> bool:
    """Whether a file of a dataset exists; raises `UserError` if it is a folder, pipe, socket or device instead."""
    try:
        check_file(path)
    except NotAFileError as error:
        raise UserError(f"{path} cannot be read: {error}. Download or write the dataset again") from error
    except OSError:
        return False
    return True


def read_json(path: Path) -> Any:
    """Read a JSON file; raises `FileNotFoundError` if it is missing, `UserError` if it cannot be read."""
    try:
        return read_any_json(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. Download or write the dataset again") from error


def read_json_lines(path: Path, keys: Iterable[str]) -> list[dict[str, Any]]:
    """Read a JSON Lines file; raises `UserError` with file and line for an object that lacks a key."""
    found = []
    try:
        lines = read_text(path).split("\n")  # `splitlines` also splits at characters that texts may contain.
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. Download or write the dataset again") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            described = parse_json(line)
            found.append({key: described[key] for key in keys})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}, line {number}, is not a JSON object with {', '.join(keys)}: the file is damaged; download or "
                "write the dataset again"
            ) from error
    return found


def data_files_below(folder: Path) -> list[Path]:
    """The parquet files below a folder, sorted; hidden ones (`._file.parquet` of macOS, say) are not data."""
    paths = folder.rglob("*.parquet")
    return sorted(p for p in paths if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def read_parquet(path: Path, columns: list[str] | None = None, optional: Collection[str] = ()) -> pa.Table:
    """Read columns of a parquet file.

    Args:
        path: The file.
        columns: The columns to read; None: all.
        optional: Those of them that may be missing.

    Raises:
        UserError: The file is missing or damaged, takes too much memory (`untrusted.parquet`), or lacks a column that
            is not optional.
    """
    try:
        with open_parquet(path) as file:
            there = file.schema_arrow.names
            missing = [name for name in columns or () if name not in there and name not in optional]
            twice = [name for name in columns or there if there.count(name) > 1]
            if not missing and not twice:
                wanted = None if columns is None else [name for name in columns if name in there]
                return read_table(file, path, wanted)
    except (OSError, pa.ArrowException) as e:
        raise UserError(f"{path} cannot be read: {str(e).rstrip('.')}. Download or write the dataset again") from e
    what = f"lacks the columns {', '.join(missing)}" if missing else f"has the column {twice[0]!r} more than once"
    raise UserError(f"{path} {what}: download, write or convert the dataset again")
