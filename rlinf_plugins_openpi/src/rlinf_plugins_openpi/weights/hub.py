"""Resolve `policy.weights`: a file, a folder, or the id of a model on the hub, with its files in the local cache.

Only the weights are downloaded, no other files of a repository. Importing this loads neither torch nor the hub client.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rlinf_core import UserError
from rlinf_core.hub import (
    NotInRepositoryError,
    cached_file,
    download_file,
    full_name,
    local_path,
    parse_hub_id,
)
from rlinf_plugins_openpi.weights.files import INDEX, SINGLE, shard_names

SETTING = "policy.weights"


def find_weights(text: str) -> Path:
    """The local file or folder that `policy.weights` names; a hub id is downloaded unless it is cached.

    Args:
        text: A path, or `owner/name` with an optional `@revision`: a branch, a tag or a commit.

    Raises:
        UserError: The path does not exist, or the hub does not have the model, denies access or does not answer.
    """
    found = local_path(text, SETTING)
    return _files_of(text, _download) if found is None else found


def find_cached_weights(text: str) -> Path | None:
    """Like `find_weights`, but offline: None for a hub id whose weights are not completely in the local cache."""
    found = local_path(text, SETTING)
    if found is not None:
        return found
    try:
        return _files_of(text, _cached)
    except (FileNotFoundError, NotInRepositoryError):
        return None


def _files_of(text: str, get: Callable[[str, str, str | None], Path]) -> Path:
    """The folder with the weights of a hub id; `get(id, file name, revision)` provides each file."""
    model, revision = parse_hub_id(text)
    try:
        return get(model, SINGLE, revision).parent
    except NotInRepositoryError:
        index = get(model, INDEX, revision)
    # A cached file's folder is named by its commit, so all shards are from the index's commit even if the branch moves.
    for shard in shard_names(index):
        get(model, shard, index.parent.name)
    return index.parent


def _cached(model: str, file: str, revision: str | None) -> Path:
    found = cached_file(model, file, revision)
    if found is None and file == SINGLE:  # Sharded weights have no such file; the cache may not know that.
        raise NotInRepositoryError(file)
    if found is None:
        raise FileNotFoundError(file)
    return found


def _download(model: str, file: str, revision: str | None) -> Path:
    try:
        return download_file(model, file, revision, SETTING)
    except NotInRepositoryError as error:
        if file == SINGLE:
            raise
        name = full_name(model, revision)
        raise UserError(f"{SETTING}: the model {name} on the hub holds neither {SINGLE} nor {file}") from error
    except UserError as error:
        if file == SINGLE and _index_is_cached(model, revision):  # Sharded weights may be complete in the cache.
            raise NotInRepositoryError(file) from error
        raise


def _index_is_cached(model: str, revision: str | None) -> bool:
    try:
        return cached_file(model, INDEX, revision) is not None
    except NotInRepositoryError:
        return False
