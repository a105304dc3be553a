"""Addresses of object storage that a user may name, such as `s3://bucket/folder`, and what goes wrong there, in words.

Only the schemes of `SCHEMES` are opened, and only where a user names one: nothing in a dataset is an address. Keys and
endpoints come from the environment, as each client reads them; none is part of an address or of a config.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from rlinf_core.errors import UserError
from rlinf_core.untrusted.text import without_secrets


class Scheme(NamedTuple):
    """How a kind of storage is reached."""

    package: str
    """What has to be installed; empty: nothing."""
    install: str
    """The command that installs it."""
    credentials: str
    """Where its client finds credentials."""


_EXTRA = "pip install 'rlinf-core[{}]'"
SCHEMES = {
    "s3": Scheme(
        "s3fs",
        _EXTRA.format("s3"),
        "`aws configure`, AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; for a public bucket "
        "FSSPEC_S3_ANON=true; for MinIO, R2 and others AWS_ENDPOINT_URL",
    ),
    "gs": Scheme(
        "gcsfs",
        _EXTRA.format("gcs"),
        "`gcloud auth application-default login` or GOOGLE_APPLICATION_CREDENTIALS; for a public bucket "
        "FSSPEC_GS_TOKEN=anon",
    ),
    "az": Scheme(
        "adlfs",
        _EXTRA.format("azure"),
        "AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or `az login`, or AZURE_STORAGE_CONNECTION_STRING",
    ),
    "hf": Scheme("", "", "`hf auth login` or HF_TOKEN"),
    "file": Scheme("", "", "the permissions of this user"),
}
"""Those that may be named; `file` is for slow mounts whose files are to be copied to a local disk."""
_NO_CREDENTIALS = frozenset(
    {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "DefaultCredentialsError"}
    | {"TokenRetrievalError", "UnauthorizedSSOTokenError", "SSOTokenLoadError", "ProfileNotFound"}
)
"""Names of errors of botocore and google-auth."""
_DEFINITE = (errno.ENOENT, errno.EINVAL, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
"""Errors that waiting does not change."""


@dataclass(frozen=True)
class Address:
    """A folder in object storage."""

    scheme: str
    path: str
    """Bucket and folder, without a slash at the end."""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}"


def is_address(text: str) -> bool:
    """Whether a setting has the form of an address rather than of a path or a hub id."""
    return "://" in text


def parse_address(text: str, setting: str) -> Address:
    """The address that a user has named in a setting.

    Raises:
        UserError: Its scheme is not one of `SCHEMES`, or it has no folder, or it has credentials or parameters.
    """
    scheme, _, path = text.strip().partition("://")
    shown = without_secrets(text)
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise UserError(f"{setting}: {shown} is not an address that rlinf opens: it may begin with {known}")
    user, at, _ = path.partition("/")[0].rpartition("@")
    if (at and ":" in user) or "?" in path or "#" in path or ".." in path.split("/") or "\0" in path:
        raise UserError(
            f"{setting}: {shown} must be a bucket and a folder alone: no user, password, parameters or `..`. "
            f"Credentials come from {SCHEMES[scheme].credentials}"
        )
    path = path.rstrip("/")
    if not path:
        raise UserError(f"{setting}: {shown} names no bucket: it has the form {scheme}://bucket/folder")
    return Address(scheme, path)


def open_filesystem(address: Address, setting: str) -> Any:
    """The client for an address, without a cache of listings, which would be of earlier objects.

    Raises:
        UserError: Its package is not installed, or it cannot be configured.
    """
    import fsspec

    try:
        return fsspec.filesystem(address.scheme, use_listings_cache=False)
    except ImportError as error:
        known = SCHEMES[address.scheme]
        raise UserError(
            f"{setting}: {address} needs the package {known.package}, which is not installed: {known.install} ({error})"
        ) from error
    except Exception as error:
        raise UserError(f"{setting}: {address} cannot be opened: {reason(address, error)}") from None


def reason(address: Address, error: BaseException) -> str:
    """Why storage refuses or does not answer, in a few words with the way out."""
    credentials = SCHEMES[address.scheme].credentials
    first = without_secrets((str(error).strip() or "-").splitlines()[0])
    if any(type(one).__name__ in _NO_CREDENTIALS for one in _chain(error)):
        return f"there are no usable credentials ({first}). They come from {credentials}"
    if isinstance(error, PermissionError):
        return (
            f"access is denied ({first}): it needs the right to list the folder and to read objects, by {credentials}"
        )
    if isinstance(error, FileNotFoundError):
        return "it does not exist, as storage says"
    return f"{type(error).__name__}: {first}"


def is_definite(error: BaseException) -> bool:
    """Whether storage has answered that it does not have this, so that asking again changes nothing."""
    return (isinstance(error, OSError) and error.errno in _DEFINITE) or isinstance(error, FileNotFoundError)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and its causes."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
