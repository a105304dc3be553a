"""A repository on the hub before and after a push: what is there, what changes, and the upload as one commit.

One commit: nobody ever downloads half a policy. After a failure the same command goes on, as the hub keeps the large
files that arrived. The token is the one of the hub's own client, and is never printed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlinf_core.errors import UserError
from rlinf_core.publish.card import is_edited
from rlinf_core.publish.origins import README
from rlinf_core.untrusted.text import read_text

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from rlinf_core.publish.folder import Checked

OTHERS_KEPT = (".gitattributes",)
"""Files that the hub itself writes."""
LISTED = 8
"""Names in a message."""
LOGIN = "log in with `hf auth login`, or set HF_TOKEN, with a token that may write"


@dataclass(frozen=True)
class Repository:
    """A repository as it is."""

    name: str
    """`owner/name`."""
    revision: str
    """The branch; empty: the default one."""
    exists: bool
    branch_exists: bool
    private: bool | None
    """None if it does not exist."""
    commit: str
    """The branch's last commit; empty if there is none."""
    files: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Name -> SHA-256 (of a large file, else empty) and git's digest."""
    edited_card: bool = False
    """Whether its model card was written or changed by somebody."""


def open_repository(name: str, revision: str) -> Repository:
    """Ask the hub for a repository; changes nothing.

    Raises:
        UserError: The name is invalid, the hub cannot be reached, or denies access.
    """
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{name!r} is not a repository, owner/name: {error}") from error
    if name.count("/") != 1:
        raise UserError(f"{name!r} is not a repository, owner/name: put your user or organization before it")
    with _explained(name):
        api, branch_exists = _client(), True
        try:
            info = api.model_info(name, revision=revision or None, files_metadata=True)
        except RevisionNotFoundError:  # A new branch begins with what is in the main one.
            info, branch_exists = api.model_info(name, files_metadata=True), False
        except RepositoryNotFoundError:
            return Repository(name, revision, False, False, None, "")
        files = {
            one.rfilename: (str(one.lfs.sha256) if one.lfs else "", str(one.blob_id or ""))
            for one in info.siblings or ()
        }
        commit = str(info.sha or "")
        edited = README in files and _is_edited(api, name, commit)
    return Repository(name, revision, True, branch_exists, bool(info.private), commit, files, edited)


@dataclass(frozen=True)
class Changes:
    """What a push does to a repository."""

    new: Sequence[str]
    replaced: Sequence[str]
    same: Sequence[str]
    deleted: Sequence[str]
    """Other files of the repository, which `--replace` deletes in the same commit."""
    problems: Sequence[str]
    """Why the push is refused, one sentence each with its way out."""

    @property
    def uploaded(self) -> Sequence[str]:
        """Names of the files to send."""
        return [*self.new, *self.replaced]


def plan_changes(checked: Checked, there: Repository, *, public: bool, replace: bool, keep_card: bool) -> Changes:
    """Compare a folder with a repository.

    Args:
        checked: The folder.
        there: The repository.
        public: Whether everybody may see it.
        replace: Whether to delete other files, and to replace a model card that somebody wrote.
        keep_card: Whether to leave the repository's model card as it is.
    """
    new, replaced, same = list[str](), list[str](), list[str]()
    for name in checked.files:
        if name == README and keep_card and README in there.files:
            continue
        if name not in there.files:
            new.append(name)
        else:
            (same if _is_same(checked, name, there.files[name]) else replaced).append(name)
    others = [name for name in there.files if name not in checked.files and name not in OTHERS_KEPT]
    if keep_card:
        others = [name for name in others if name != README]
    problems = []
    if there.private is False and not public:
        problems.append(
            f"{there.name} is public, so everybody would see this: add --public, or name another repository"
        )
    if there.private and public:
        problems.append(f"{there.name} is private, and a push does not change that: leave out --public")
    if others and not replace:
        listed = ", ".join(others[:LISTED]) + ", ..." * (len(others) > LISTED)
        problems.append(
            f"{there.name} has other files, {listed}: name another repository, or delete them by --replace; git keeps "
            "them"
        )
    if README in replaced and there.edited_card and not replace:
        problems.append(
            f"somebody has edited {README} of {there.name}: keep it with --keep-card, or replace it with --replace"
        )
    return Changes(new, replaced, same, others if replace else [], problems)


def push(checked: Checked, there: Repository, changes: Changes, *, public: bool, message: str) -> str:
    """Upload a folder as one commit, creating repository and branch if needed, and check what has arrived.

    Returns:
        The address of the commit.

    Raises:
        UserError: The hub refuses or fails; the message says what to do.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    with _explained(there.name):
        api = _client()
        if not there.exists:
            api.create_repo(there.name, private=not public, exist_ok=True)
        if there.revision and not there.branch_exists:
            api.create_branch(there.name, branch=there.revision, exist_ok=True)
        operations: list[Any] = [CommitOperationAdd(name, str(checked.folder / name)) for name in changes.uploaded]
        operations += [CommitOperationDelete(name) for name in changes.deleted]
        if not operations:
            return there.commit
        done = api.create_commit(
            there.name,
            operations,
            commit_message=message,
            revision=there.revision or None,
            parent_commit=there.commit or None,
        )
        info = api.model_info(there.name, revision=done.oid, files_metadata=True)
    arrived = {one.rfilename: (str(one.lfs.sha256) if one.lfs else "", str(one.blob_id)) for one in info.siblings or ()}
    lost = [one for one in changes.uploaded if one not in arrived or not _is_same(checked, one, arrived[one])]
    if lost:
        raise UserError(
            f"{there.name} lacks {', '.join(lost)}, or has another content, after the upload: if it has a .gitignore, "
            "remove it, and push again"
        )
    return str(done.commit_url)


def _client() -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(library_name="rlinf-core")


def account() -> str:
    """Whose token it is; empty without one.

    Raises:
        UserError: The hub does not accept it, or cannot be reached.
    """
    from huggingface_hub import get_token

    if not get_token():
        return ""
    with _explained("your account"):
        return str(_client().whoami()["name"])


def _is_edited(api: HfApi, name: str, commit: str) -> bool:
    path = api.hf_hub_download(name, README, revision=commit)
    try:
        return is_edited(read_text(Path(path)))
    except (OSError, ValueError):
        return True


def _is_same(checked: Checked, name: str, there: tuple[str, str]) -> bool:
    sha256, git = there
    if sha256:
        return sha256 == checked.digests[name]
    content = (checked.folder / name).read_bytes() if checked.files[name] < 2**26 else b""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == git


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn errors of the hub and of the network into one message each."""
    from httpx import HTTPError
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except LocalTokenNotFoundError as error:
        raise UserError(f"there is no token for the hub: {LOGIN}") from error
    except OfflineModeIsEnabled as error:
        raise UserError("HF_HUB_OFFLINE is set: unset it to push") from error
    except (HfHubHTTPError, HTTPError, OSError, RuntimeError, ValueError) as error:
        cause: BaseException = error
        while not isinstance(cause, HTTPError | HfHubHTTPError) and cause.__cause__ is not None:
            cause = cause.__cause__
        raise UserError(_reason(what, cause)) from error


AGAIN = "run the same command again: files that have arrived are not sent twice"
STATUS = {
    400: "the hub refuses it",
    401: f"the hub does not know this account or token: {LOGIN}",
    403: "this token may not write there: it needs write permission, for an organization its consent, and free storage",
    404: "the hub has no such user or organization, or this account may not see the repository",
    409: f"somebody else changed it at the same time: {AGAIN}",
    412: f"somebody else changed it at the same time: {AGAIN}",
    413: "a file is too large for the hub: export with --dtype bf16",
    429: f"too many requests: wait a few minutes, and {AGAIN}",
}


def _reason(what: str, error: BaseException) -> str:
    from httpx import HTTPError, TransportError
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    response = getattr(error, "response", None)
    status = getattr(response, "status_code", 0)
    said = str(getattr(error, "server_message", None) or "").strip()
    said = f" (it says: {said.splitlines()[0]})" if said else ""
    if status in STATUS:
        return f"{what}: {STATUS[status]}{said}"
    if isinstance(error, TransportError):
        return (
            f"{what}: {constants.ENDPOINT} cannot be reached ({type(error).__name__}): check the network; then {AGAIN}"
        )
    if isinstance(error, HfHubHTTPError | HTTPError):
        return f"{what}: the hub answered {status}{said}: {AGAIN}"
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{what}: {first}"
