"""Settings that name a path or a model on the hub: telling which, and getting one file of the model.

Importing this loads neither torch nor the hub's client.
"""

from __future__ import annotations

import re
from pathlib import Path

from rlinf_core import UserError

_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>.+))?")


class NotInRepositoryError(Exception):
    """The model is known, and has no such file."""


def local_path(text: str, setting: str) -> Path | None:
    """The path that a setting names; None if it is a hub id: `owner/name` with an optional `@revision`.

    Raises:
        UserError: It is neither; `setting` is named.
    """
    path = Path(text).expanduser()
    if path.exists():
        return path
    # A folder that is there makes the rest a path with a slip in it, and no owner on the hub.
    in_a_folder = path.parent != Path() and path.parent.is_dir()
    if text.startswith((".", "~", "/")) or in_a_folder or not _HUB_ID.fullmatch(text):
        raise UserError(
            f"{setting}: there is no file or folder {text} (here: {Path.cwd()}), and a hub id reads owner/name or "
            "owner/name@revision"
        )
    return None


def parse_hub_id(text: str) -> tuple[str, str | None]:
    """The model `owner/name`, and its revision (a branch, a tag or a commit) if the id has one."""
    match = _HUB_ID.fullmatch(text)
    assert match
    return match["id"], match["revision"]


def cached_file(model: str, file: str, revision: str | None) -> Path | None:
    """A file of a model in the local cache, without asking the hub; None if it is not there.

    Raises:
        NotInRepositoryError: The cache knows that the model has no such file.
    """
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

    found = try_to_load_from_cache(model, file, revision=revision)
    if found is _CACHED_NO_EXIST:
        raise NotInRepositoryError(file)
    return Path(found) if isinstance(found, str) else None


def download_file(model: str, file: str, revision: str | None, setting: str) -> Path:
    """A file of a model, downloaded unless the cache has it as it is on the hub.

    Several processes of a machine may ask at once: the hub's client locks each file.

    Raises:
        NotInRepositoryError: The model has no such file.
        UserError: The hub does not have the model, does not let one in or does not answer; `setting` is named.
    """
    from httpx import HTTPError
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(model, file, revision=revision))
    except (OSError, HTTPError, ValueError, EntryNotFoundError) as error:  # All that the client raises on its own.
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise NotInRepositoryError(file) from error
        reason = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
        revised = f" --revision {revision}" if revision else ""
        raise UserError(
            f"{setting}: {model!r} is no file or folder (here: {Path.cwd()}), and {file} of the model "
            f"{full_name(model, revision)} could not be had from the hub, nor from the cache {constants.HF_HUB_CACHE} "
            f"({reason}). Check the id and the connection (a private or gated model needs `hf auth login`, and "
            f"HF_HUB_OFFLINE must not be set), or run `hf download {model}{revised} --local-dir FOLDER` where there is "
            "a network and name that folder"
        ) from error


def full_name(model: str, revision: str | None) -> str:
    """A model with its revision, for messages."""
    return f"{model}@{revision}" if revision else f"{model} (its default branch)"
