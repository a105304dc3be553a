"""Where a LeRobot dataset lies, and how its files are read: a folder, or a snapshot of the hub of which only the files
that are used get fetched, metadata first.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlinf_core.errors import UserError
from rlinf_core.hub import NotInRepositoryError, Snapshot, local_path, open_snapshot, parse_hub_id
from rlinf_core.untrusted import parse_json
from rlinf_core.untrusted import read_json as read_any_json

SETTING = "data.repo_id"
INFO = "meta/info.json"


@dataclass(frozen=True)
class Place:
    """Where a dataset lies."""

    root: Path
    snapshot: Snapshot | None = None
    """The dataset on the hub whose files come to lie in `root`; None: a local folder."""

    def fetch(self, paths: Iterable[Path]) -> None:
        """Have files of the dataset in `root`; those that there are nowhere stay absent.

        Raises:
            UserError: The hub does not hand them over.
        """
        if self.snapshot is not None:
            self.snapshot.fetch(path.relative_to(self.root).as_posix() for path in paths)


def find_dataset(repo_id: str, revision: str = "", setting: str = SETTING) -> Place:
    """Find a dataset; the metadata of one on the hub are downloaded unless the cache has them.

    Args:
        repo_id: A folder, or an id on the hub, `owner/name` with an optional `@revision`. What lerobot has recorded
            under an id (in `HF_LEROBOT_HOME`) is taken before the hub's.
        revision: Branch, tag or commit on the hub, instead of one in the id; empty: the hub's default.
        setting: What names the dataset, for messages.

    Raises:
        UserError: No `repo_id`, no such folder, or the hub does not answer, does not have it or does not let one in.
    """
    if not repo_id:
        raise UserError(f"{setting} is not set: name a local folder or the id of a dataset on the hub")
    path = local_path(repo_id, setting)
    if path is not None:
        if revision:
            raise UserError(f"data.revision = {revision!r} is for hub ids, but {setting} = {repo_id!r} is a folder")
        return Place(path)
    name, own_revision = parse_hub_id(repo_id)
    if own_revision and revision:
        raise UserError(f"{setting} = {repo_id!r} names a revision, and data.revision = {revision!r} another: set one")
    recorded = _recorded(name)
    if recorded is not None and not (own_revision or revision):
        return Place(recorded)
    try:
        snapshot = open_snapshot(name, own_revision or revision or None, "dataset", setting, INFO)
    except NotInRepositoryError as error:
        raise UserError(
            f"{setting}: the dataset {repo_id} on the hub has no {INFO}: it is not in LeRobot's format"
        ) from error
    snapshot.fetch(snapshot.names("meta"))
    return Place(snapshot.folder, snapshot)


def find_root(repo_id: str, revision: str = "") -> Path:
    """The local folder with (at least) the metadata of a dataset; see `find_dataset`."""
    return find_dataset(repo_id, revision).root


def _recorded(name: str) -> Path | None:
    """What lerobot recorded under an id on this machine."""
    from huggingface_hub import constants

    home = os.environ.get("HF_LEROBOT_HOME") or Path(constants.HF_HOME) / "lerobot"
    root = Path(home).expanduser() / name
    # Older versions of lerobot downloaded to the same place, in parts, and left this folder.
    downloaded = (root / ".cache" / "huggingface" / "download").exists()
    return root if (root / INFO).is_file() and not downloaded else None


def read_json(path: Path) -> Any:
    """A JSON file; `FileNotFoundError` if there is none, `UserError` naming it if it cannot be read."""
    try:
        return read_any_json(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. Download or write the dataset again") from error


def read_json_lines(path: Path, keys: Iterable[str]) -> list[dict[str, Any]]:
    """The objects in a file of one JSON object a line; `UserError` naming file and line if one lacks a key."""
    found = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # Texts may hold what else `splitlines` breaks at.
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
                f"{path}, line {number}, is no JSON object with {', '.join(keys)}: the file is damaged; download or "
                "write the dataset again"
            ) from error
    return found


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Some columns of one parquet file; `UserError` naming it if it is missing, damaged, or lacks one of them."""
    try:
        with pq.ParquetFile(path) as file:
            there = file.schema_arrow.names
            missing = [name for name in columns or () if name not in there]
            twice = [name for name in columns or there if there.count(name) > 1]
            if not missing and not twice:
                return file.read(columns=columns, use_threads=False)
    except (OSError, pa.ArrowException) as e:
        raise UserError(f"{path} cannot be read: {str(e).rstrip('.')}. Download or write the dataset again") from e
    what = f"lacks the columns {', '.join(missing)}" if missing else f"has the column {twice[0]!r} more than once"
    raise UserError(f"{path} {what}: download, write or convert the dataset again")
