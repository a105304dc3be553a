"""What `policy.weights` means: a file, a folder, or the id of a model on the hub with its files in the local cache.

Only the weights are fetched, not a repository's other files. Importing this loads neither torch nor the hub's client.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from rlinf_core import UserError
from rlinf_plugins_openpi.weights.files import INDEX, SINGLE, shard_names

HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>.+))?")


def find_weights(text: str) -> Path:
    """The local file or folder that `policy.weights` names; a hub id is downloaded unless it is in the cache.

    Several processes of a machine may ask at once: the hub's client locks each file.

    Args:
        text: A path, or `owner/name` with an optional `@revision`: a branch, a tag or a commit.

    Raises:
        UserError: Nothing there, or the hub does not have it, does not let one in or does not answer.
    """
    found = _local(text)
    return _files_of(text, _download) if found is None else found


def find_cached_weights(text: str) -> Path | None:
    """Like `find_weights`, but asks no hub: None for a hub id whose weights are not (all) in the local cache."""
    found = _local(text)
    if found is not None:
        return found
    try:
        return _files_of(text, _cached)
    except (FileNotFoundError, _NotInRepositoryError):
        return None


def _local(text: str) -> Path | None:
    """The path that a text names; None if it is a hub id."""
    path = Path(text).expanduser()
    if path.exists():
        return path
    # A folder that is there makes the rest a path with a slip in it, and no owner on the hub.
    in_a_folder = path.parent != Path() and path.parent.is_dir()
    if text.startswith((".", "~", "/")) or in_a_folder or not HUB_ID.fullmatch(text):
        raise UserError(
            f"policy.weights: there is no file or folder {text} (here: {Path.cwd()}), and a hub id reads owner/name or "
            "owner/name@revision"
        )
    return None


def _files_of(text: str, get: Callable[[str, str, str | None], Path]) -> Path:
    """The folder with the weights of a hub id, each file had from `get`(id, file name, revision)."""
    match = HUB_ID.fullmatch(text)
    assert match
    repository, revision = match["id"], match["revision"]
    try:
        return get(repository, SINGLE, revision).parent
    except _NotInRepositoryError:
        index = get(repository, INDEX, revision)
    # The folder of a file in the cache is named by its commit: all shards are of the index's, though a branch moves on.
    for shard in shard_names(index):
        get(repository, shard, index.parent.name)
    return index.parent


class _NotInRepositoryError(Exception):
    """The repository is known, and has no such file."""


def _cached(repository: str, file: str, revision: str | None) -> Path:
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

    found = try_to_load_from_cache(repository, file, revision=revision)
    if isinstance(found, str):
        return Path(found)
    if found is _CACHED_NO_EXIST or file == SINGLE:
        raise _NotInRepositoryError
    raise FileNotFoundError(file)


def _download(repository: str, file: str, revision: str | None) -> Path:
    from httpx import HTTPError
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, file, revision=revision))
    except (OSError, HTTPError, ValueError, EntryNotFoundError) as error:  # All that the client raises on its own.
        offline = isinstance(error, LocalEntryNotFoundError)
        gone = isinstance(error, EntryNotFoundError) and not offline
        if file == SINGLE and (gone or (offline and _index_is_cached(repository, revision))):
            raise _NotInRepositoryError from error
        name = f"{repository}@{revision}" if revision else f"{repository} (its default branch)"
        if gone:
            raise UserError(f"policy.weights: the model {name} on the hub holds neither {SINGLE} nor {file}") from error
        reason = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
        revised = f" --revision {revision}" if revision else ""
        raise UserError(
            f"policy.weights: {repository!r} is no file or folder (here: {Path.cwd()}), and {file} of the model {name} "
            f"could not be had from the hub, nor from the cache {constants.HF_HUB_CACHE} ({reason}). Check the id and "
            "the connection (a private or gated model needs `hf auth login`, and HF_HUB_OFFLINE must not be set), or "
            f"run `hf download {repository}{revised} --local-dir FOLDER` where there is a network and name that folder"
        ) from error


def _index_is_cached(repository: str, revision: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repository, INDEX, revision=revision), str)
