"""Models and datasets on the hub: recognise hub ids in settings, and download files. Plugins may use this module.

A repository is read at one commit (`Snapshot`), so that files that are downloaded later match the earlier ones even if
its branch has moved. Only requested files are downloaded, to the cache that `hf download` also uses. A missing network
is reported at once, whereas the hub's client would retry for half a minute. Importing this module loads neither torch
nor the hub's client.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from rlinf_core.errors import UserError
from rlinf_core.terminal import print_progress
from rlinf_core.untrusted.text import without_secrets

Kind = Literal["model", "dataset"]

_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>.+))?")
_LIKE_A_PATH = re.compile(
    r"(checkpoints?|ckpts?|weights|models?|runs?|outputs?|exports?|exported|pretrained(_models?)?|logs|results|tmp)/.*"
    r"|.*/(\d+|step_?\d+|global_step_\d+|checkpoint-\d+|pretrained_model|params|last|latest|best)"
    r"|.*\.(safetensors|bin|pt|pth|ckpt|msgpack|gguf|npz|jsonl?|parquet|tar|zip)",
    re.IGNORECASE,
)
"""Names of the form of a hub id that are paths: usual folders of outputs, numbered steps, files."""
_AT_ONCE = 8
"""Files that are downloaded in parallel."""
_PATIENCE = 10.0
"""Timeout of the connection check, in seconds."""


class NotInRepositoryError(Exception):
    """The repository exists but has no such file."""


@contextmanager
def cache_only() -> Iterator[None]:
    """Use only the local cache in this context, without network requests."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def local_path(text: str, setting: str) -> Path | None:
    """The path that a setting names; None if it is a hub id: `owner/name` with an optional `@revision`.

    Raises:
        UserError: It is neither; the message names `setting`.
    """
    path = Path(text).expanduser()
    if path.exists():
        return path
    on_hub = None if text.startswith((".", "~", "/")) else _HUB_ID.fullmatch(text)
    # If the first part is an existing folder, this is a mistyped path rather than a hub id, unless it has a revision.
    in_a_folder = path.parent != Path() and path.parent.is_dir()
    like_a_path = bool(on_hub) and bool(_LIKE_A_PATH.fullmatch(text))
    if on_hub and (on_hub["revision"] or not (in_a_folder or like_a_path)):
        return None
    if "://" in text:
        raise UserError(
            f"{setting}: {without_secrets(text)} is an address, but this must be a folder, a file or a hub id: only "
            "data.repo_id of robot data may be in object storage"
        )
    hint = "and a hub id has the form owner/name or owner/name@revision"
    if on_hub and not in_a_folder:
        hint = f"and the name is a path's rather than a hub id's; for the repository on the hub, write {text}@main"
    elif on_hub:
        hint = f"but there is a folder {path.parent}; for the repository on the hub, add its revision: {text}@main"
    raise UserError(f"{setting}: there is no file or folder {text} (in {Path.cwd()}), {hint}")


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids all requests."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def parse_hub_id(text: str) -> tuple[str, str | None]:
    """The repository `owner/name`, and its revision (a branch, a tag or a commit) if the id has one."""
    match = _HUB_ID.fullmatch(text)
    if not match:
        raise ValueError(f"{text!r} is not a hub id")
    return match["id"], match["revision"]


def full_name(repository: str, revision: str | None) -> str:
    """A repository with its revision, for messages."""
    return f"{repository}@{revision}" if revision else f"{repository} (its default branch)"


def cached_file(repository: str, file: str, revision: str | None, kind: Kind = "model") -> Path | None:
    """A file of a repository in the local cache, without a network request; None if it is not cached.

    Raises:
        NotInRepositoryError: According to the cache, the repository has no such file.
    """
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

    found = try_to_load_from_cache(repository, file, revision=revision, repo_type=kind)
    if found is _CACHED_NO_EXIST:
        raise NotInRepositoryError(file)
    return Path(found) if isinstance(found, str) else None


def download_file(repository: str, file: str, revision: str | None, setting: str, kind: Kind = "model") -> Path:
    """Download a file of a repository, unless the cache has its current version.

    Several processes may call this at once; the hub's client locks each file.

    Raises:
        NotInRepositoryError: The repository has no such file.
        UserError: The hub lacks the repository, denies access or is unreachable; the message names `setting`.
    """
    return _download(repository, file, revision, setting, kind, _silence())


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit, whose files are downloaded on demand."""

    repository: str
    revision: str | None
    kind: Kind
    setting: str
    """The setting that names the repository, for messages."""
    commit: str
    folder: Path
    """The folder of this commit in the cache; it may not exist yet."""
    silence: Exception | None
    """Why the hub is unreachable, so that only the cache is used; None if it is reachable."""

    def names(self, under: str) -> list[str]:
        """Paths of the files in the repository's folder `under`; only cached ones if the hub is unreachable.

        Raises:
            UserError: The request failed.
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
        """Download files that `folder` lacks; files that the repository does not have stay absent.

        Raises:
            UserError: A file is not cached and cannot be downloaded.
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
            _progress(name) as progress,
        ):
            running = [pool.submit(self._fetch, file) for file in missing]
            try:
                progress(0, len(running))
                for done, one in enumerate(running, start=1):
                    one.result()
                    progress(done, len(running))
            finally:  # After a failure, do not start the remaining downloads.
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
    """Open a repository at a revision's current commit, requested once per process; offline, the cached commit.

    Args:
        repository: `owner/name`.
        revision: A branch, a tag or a commit; None: the default branch.
        kind: Type of the repository.
        setting: The setting that names it, for messages.
        file: A file that every such repository has; downloading it determines the commit.

    Raises:
        NotInRepositoryError: It has no such file.
        UserError: The hub lacks the repository or the revision, denies access or is unreachable, and nothing is cached.
    """
    from huggingface_hub import constants

    return _open_snapshot(repository, revision, kind, setting, file, constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE)


@functools.cache
def _open_snapshot(
    repository: str, revision: str | None, kind: Kind, setting: str, file: str, cache: str, offline: bool
) -> Snapshot:
    silence = _silence()
    path = _download(repository, file, revision, setting, kind, silence)  # The path in the cache contains the commit.
    folder = Path(cache) / f"{kind}s--{repository.replace('/', '--')}" / "snapshots"
    commit = path.relative_to(folder).parts[0]
    return Snapshot(repository, revision, kind, setting, commit, folder / commit, silence)


def _download(
    repository: str, file: str, revision: str | None, setting: str, kind: Kind, silence: Exception | None
) -> Path:
    """Download a file, or use the cached one if the hub is unreachable."""
    from httpx import HTTPError
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    cached_only = silence is not None
    try:
        return Path(hf_hub_download(repository, file, revision=revision, repo_type=kind, local_files_only=cached_only))
    except (OSError, HTTPError, ValueError, EntryNotFoundError) as error:  # All errors of the hub's client.
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise NotInRepositoryError(file) from error
        raise _unavailable(repository, file, revision, setting, kind, silence or error) from error


def _silence() -> Exception | None:
    """Why the hub is unreachable; None if it is reachable. One short request; a download would try six times."""
    from httpx import TransportError
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
    except (TransportError, OfflineModeIsEnabled) as error:
        return error
    return None


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], object]]:
    """Show how many files are there, unless HF_HUB_DISABLE_PROGRESS_BARS is set, as with the hub's own client."""
    if import_module("huggingface_hub.utils.tqdm").are_progress_bars_disabled():
        yield lambda done, all: None
        return
    with print_progress(what, "files") as progress:
        yield progress


@functools.cache
def _no_progress_bar() -> type[Any]:
    """A disabled bar for single files, of which there may be thousands."""

    def __init__(self: Any, *arguments: Any, **options: Any) -> None:  # noqa: N807
        bar.__init__(self, *arguments, **(options | {"disable": True}))

    bar = import_module("huggingface_hub.utils.tqdm").tqdm
    return type("NoProgressBar", (bar,), {"__init__": __init__})


def _unavailable(
    repository: str, what: str, revision: str | None, setting: str, kind: Kind, error: Exception
) -> UserError:
    from huggingface_hub import constants

    options = " --repo-type dataset" * (kind == "dataset") + (f" --revision {revision}" if revision else "")
    return UserError(
        f"{setting}: {repository!r} is not a file or folder (in {Path.cwd()}), and {what} of the {kind} "
        f"{full_name(repository, revision)} cannot be loaded from the hub or from the cache "
        f"{constants.HF_HUB_CACHE}: {_reason(error)}. Check the id and the connection (a private or gated {kind} needs "
        "`hf auth login` or HF_TOKEN, and HF_HUB_OFFLINE must not be set), or run "
        f"`hf download {repository}{options} --local-dir FOLDER` on a machine with a network and use that folder"
    )


def _reason(error: Exception) -> str:
    """The cause in a few words. Messages of the hub's client contain no token but many lines of advice."""
    from httpx import TransportError
    from huggingface_hub import errors

    known = {
        errors.GatedRepoError: "it is gated, and this account has no access",
        errors.RepositoryNotFoundError: "the hub has no such repository, or this account has no access to it",
        errors.RevisionNotFoundError: "the repository has no such revision",
        errors.OfflineModeIsEnabled: "HF_HUB_OFFLINE is set",
    }
    reason = next((text for kind, text in known.items() if isinstance(error, kind)), None)
    if reason is None:
        reason = "the hub is unreachable" if isinstance(error, TransportError) else "the hub's client failed"
        reason += f" ({type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]})"
    return reason
