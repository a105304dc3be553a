"""Models and datasets on the hub: which settings name one, and how its files get here.

A repository is read at one commit (`Snapshot`), so that files which are fetched later belong to the earlier ones though
its branch moves on; only what is asked for is fetched, into the cache that `hf download` uses as well. Whoever is
without a network hears of it at once: the hub's client would try again for half a minute. Importing this loads neither
torch nor the hub's client. Plugins may use it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from rlinf_core.errors import UserError

Kind = Literal["model", "dataset"]

_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>.+))?")
_AT_ONCE = 8
"""Files that are fetched at the same time."""
_PATIENCE = 10.0
"""Seconds to wait for the hub's answer."""


class NotInRepositoryError(Exception):
    """The repository is known, and has no such file."""


@contextmanager
def cache_only() -> Iterator[None]:
    """Ask nobody inside: what a hub id means is in the cache, or it cannot be had."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def local_path(text: str, setting: str) -> Path | None:
    """The path that a setting names; None if it is a hub id: `owner/name` with an optional `@revision`.

    Raises:
        UserError: It is neither; `setting` is named.
    """
    path = Path(text).expanduser()
    if path.exists():
        return path
    on_hub = None if text.startswith((".", "~", "/")) else _HUB_ID.fullmatch(text)
    # A folder that is there makes the rest a path with a slip in it, and no owner on the hub; a revision tells.
    in_a_folder = path.parent != Path() and path.parent.is_dir()
    if on_hub and (on_hub["revision"] or not in_a_folder):
        return None
    told = "and a hub id reads owner/name or owner/name@revision"
    if on_hub:
        told = f"though a folder {path.parent}; if the hub's is meant, name its revision: {text}@main"
    raise UserError(f"{setting}: there is no file or folder {text} (here: {Path.cwd()}), {told}")


def parse_hub_id(text: str) -> tuple[str, str | None]:
    """The repository `owner/name`, and its revision (a branch, a tag or a commit) if the id has one."""
    match = _HUB_ID.fullmatch(text)
    if not match:
        raise ValueError(f"{text!r} is no hub id")
    return match["id"], match["revision"]


def full_name(repository: str, revision: str | None) -> str:
    """A repository with its revision, for messages."""
    return f"{repository}@{revision}" if revision else f"{repository} (its default branch)"


def cached_file(repository: str, file: str, revision: str | None, kind: Kind = "model") -> Path | None:
    """A file of a repository in the local cache, without asking the hub; None if it is not there.

    Raises:
        NotInRepositoryError: The cache knows that the repository has no such file.
    """
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

    found = try_to_load_from_cache(repository, file, revision=revision, repo_type=kind)
    if found is _CACHED_NO_EXIST:
        raise NotInRepositoryError(file)
    return Path(found) if isinstance(found, str) else None


def download_file(repository: str, file: str, revision: str | None, setting: str, kind: Kind = "model") -> Path:
    """A file of a repository, downloaded unless the cache has it as it is on the hub.

    Several processes of a machine may ask at once: the hub's client locks each file.

    Raises:
        NotInRepositoryError: The repository has no such file.
        UserError: The hub does not have the repository, does not let one in or does not answer; `setting` is named.
    """
    return _download(repository, file, revision, setting, kind, _silence())


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit, as far as its files lie in the local cache."""

    repository: str
    revision: str | None
    kind: Kind
    setting: str
    """The setting that names the repository, for messages."""
    commit: str
    folder: Path
    """Where the files of this commit lie; it may not be there yet."""
    silence: Exception | None
    """Why the hub does not answer, so that the commit is the cache's; None: it does."""

    def names(self, under: str) -> list[str]:
        """Paths of the files in the repository's folder `under`; those in the cache where the hub does not answer.

        Raises:
            UserError: The hub stopped answering.
        """
        from httpx import HTTPError
        from huggingface_hub import HfApi
        from huggingface_hub.errors import EntryNotFoundError
        from huggingface_hub.hf_api import RepoFile

        if self.silence is not None:
            files = (path for path in (self.folder / under).rglob("*") if path.is_file())
            return sorted(path.relative_to(self.folder).as_posix() for path in files)
        try:
            tree = HfApi().list_repo_tree(
                self.repository, under, recursive=True, revision=self.commit, repo_type=self.kind
            )
            return sorted(entry.path for entry in tree if isinstance(entry, RepoFile))
        except EntryNotFoundError:
            return []
        except (OSError, HTTPError, ValueError) as error:
            raise self._unavailable(f"the list of files in {under}/", error) from error

    def fetch(self, files: Iterable[str]) -> None:
        """Have files in `folder`; those that the repository lacks stay absent.

        Raises:
            UserError: Files are missing in the cache, and the hub does not hand them over.
        """
        missing = [file for file in dict.fromkeys(files) if not (self.folder / file).exists()]
        if not missing:
            return
        if self.silence is not None:
            more = f" and {len(missing) - 1} more files" if len(missing) > 1 else ""
            raise self._unavailable(missing[0] + more, self.silence) from self.silence
        name = f"Downloading {self.repository}"
        with (
            ThreadPoolExecutor(_AT_ONCE) as pool,
            _progress_bar()(total=len(missing), desc=name, unit="file", disable=None) as bar,
        ):
            running = [pool.submit(self._fetch, file) for file in missing]
            try:
                for one in running:
                    one.result()
                    bar.update()
            finally:  # One that fails ends the others before they start.
                pool.shutdown(cancel_futures=True)

    def _fetch(self, file: str) -> None:
        from httpx import HTTPError
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        quiet = _no_progress_bar()
        try:
            hf_hub_download(self.repository, file, revision=self.commit, repo_type=self.kind, tqdm_class=quiet)
        except (OSError, HTTPError, ValueError, EntryNotFoundError) as error:
            if not isinstance(error, EntryNotFoundError) or isinstance(error, LocalEntryNotFoundError):
                raise self._unavailable(file, error) from error

    def _unavailable(self, what: str, error: Exception) -> UserError:
        return _unavailable(self.repository, what, self.revision, self.setting, self.kind, error)


def open_snapshot(repository: str, revision: str | None, kind: Kind, setting: str, file: str) -> Snapshot:
    """A repository at the commit that a revision means now, asked once a process; the cache's without a network.

    Args:
        repository: `owner/name`.
        revision: A branch, a tag or a commit; None: the default branch.
        kind: What the repository holds.
        setting: The setting that names it, for messages.
        file: A file that every such repository has; it is fetched, and tells the commit.

    Raises:
        NotInRepositoryError: It has no such file.
        UserError: The hub does not have the repository or the revision, does not let one in or does not answer, and
            nothing is cached.
    """
    from huggingface_hub import constants

    return _open_snapshot(repository, revision, kind, setting, file, constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE)


@functools.cache
def _open_snapshot(
    repository: str, revision: str | None, kind: Kind, setting: str, file: str, cache: str, offline: bool
) -> Snapshot:
    silence = _silence()
    path = _download(repository, file, revision, setting, kind, silence)  # The cache notes the commit of the revision.
    folder = Path(cache) / f"{kind}s--{repository.replace('/', '--')}" / "snapshots"
    commit = path.relative_to(folder).parts[0]
    return Snapshot(repository, revision, kind, setting, commit, folder / commit, silence)


def _download(
    repository: str, file: str, revision: str | None, setting: str, kind: Kind, silence: Exception | None
) -> Path:
    """A file; the cache's where the hub is silent."""
    from httpx import HTTPError
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    cached_only = silence is not None
    try:
        return Path(hf_hub_download(repository, file, revision=revision, repo_type=kind, local_files_only=cached_only))
    except (OSError, HTTPError, ValueError, EntryNotFoundError) as error:  # All that the client raises on its own.
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise NotInRepositoryError(file) from error
        raise _unavailable(repository, file, revision, setting, kind, silence or error) from error


def _silence() -> Exception | None:
    """Why the hub does not answer; None if it does. One short question: a client that downloads would ask six times."""
    from httpx import TransportError
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
    except (TransportError, OfflineModeIsEnabled) as error:
        return error
    return None


def _progress_bar() -> Any:
    """The bar of the hub's client, which HF_HUB_DISABLE_PROGRESS_BARS switches off."""
    return import_module("huggingface_hub.utils.tqdm").tqdm


@functools.cache
def _no_progress_bar() -> type[Any]:
    """For single files: there may be thousands."""

    def __init__(self: Any, *arguments: Any, **options: Any) -> None:  # noqa: N807
        bar.__init__(self, *arguments, **(options | {"disable": True}))

    bar = _progress_bar()
    return type("NoProgressBar", (bar,), {"__init__": __init__})


def _unavailable(
    repository: str, what: str, revision: str | None, setting: str, kind: Kind, error: Exception
) -> UserError:
    from huggingface_hub import constants

    options = " --repo-type dataset" * (kind == "dataset") + (f" --revision {revision}" if revision else "")
    return UserError(
        f"{setting}: {repository!r} is no file or folder (here: {Path.cwd()}), and {what} of the {kind} "
        f"{full_name(repository, revision)} could not be had from the hub, nor from the cache "
        f"{constants.HF_HUB_CACHE}: {_reason(error)}. Check the id and the connection (a private or gated {kind} needs "
        "`hf auth login` or HF_TOKEN, and HF_HUB_OFFLINE must not be set), or run "
        f"`hf download {repository}{options} --local-dir FOLDER` where there is a network and name that folder"
    )


def _reason(error: Exception) -> str:
    """What went wrong, in a few words. Messages of the hub's client hold no token, but pages of advice."""
    from httpx import TransportError
    from huggingface_hub import errors

    known = {
        errors.GatedRepoError: "it is gated, and its owner has not let this account in",
        errors.RepositoryNotFoundError: "the hub has no such repository, or this account may not see it",
        errors.RevisionNotFoundError: "the repository has no such revision",
        errors.OfflineModeIsEnabled: "HF_HUB_OFFLINE is set",
    }
    told = next((text for kind, text in known.items() if isinstance(error, kind)), None)
    if told is None:
        told = "the hub does not answer" if isinstance(error, TransportError) else "the hub's client failed"
        told += f" ({type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]})"
    return told
