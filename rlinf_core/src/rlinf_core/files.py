"""Write files atomically, and report an unwritable path in one message."""

import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from rlinf_core.errors import UserError
from rlinf_core.terminal import warn

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""What file systems without locks answer: NFS without its lock service, Lustre mounted without `flock`, and others."""


def write_text(path: Path, text: str, *, writer: str = "") -> None:
    """Write a text file atomically, in UTF-8; see `write_bytes`."""
    write_bytes(path, text.encode(), writer=writer)


def write_bytes(path: Path, content: bytes, *, writer: str = "") -> None:
    """Write a file atomically: to a temporary file, fsynced and renamed. Readers see the old or the new content.

    Args:
        path: The file.
        content: The content.
        writer: A name for this process, if several may write the file at once.
    """
    aside = path.with_name(f".{path.name}.{writer}{'.' * bool(writer)}tmp")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def lock_file(file: IO[str], folder: Path) -> None:
    """Lock a file against other processes until it is closed; where the file system has no locks, warn and go on.

    Args:
        file: The open file.
        folder: What it protects, for the warning.

    Raises:
        BlockingIOError: Another process holds the lock.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        warn(
            f"{folder} cannot be locked, as its file system has no locks ({error.strerror}): make sure yourself that "
            "no other process writes to it meanwhile"
        )


def sync_folder(folder: Path) -> None:
    """Fsync a folder, so that new file names are durable, if the file system supports it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # Mounts of object storage do not support it.
            raise
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path, way_out: str) -> Iterator[None]:
    """Turn an `OSError` into a message that names the path the user gave, not a file in it or a temporary one.

    Args:
        path: The file or folder that is written.
        way_out: The end of the message, without a full stop: `"Name another file with --output"`.

    Raises:
        UserError: For an `OSError` of the body.
    """
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        if error.filename and f".{path.name}." not in str(error.filename):  # Do not mention temporary files.
            why = f"{why}: {error.filename}"
        raise UserError(f"{path} cannot be written: {why}. {way_out}") from error


def check_writable(path: Path, way_out: str, *, file: bool = False) -> None:
    """Check before the work whether a path can be written; creates nothing.

    Args:
        path: A folder, or a file.
        way_out: As in `writing`.
        file: Whether `path` is a file.

    Raises:
        UserError: An existing parent is not a folder or not writable.
    """
    if why := find_obstacle(path.parent if file else path):
        raise UserError(f"{path} cannot be written: {why}. {way_out}")


def find_obstacle(folder: Path) -> str:
    """The reason why a folder cannot be created or written, from its nearest existing parent; empty if it can."""
    # For paths in an inaccessible folder, os.path returns False where pathlib raises.
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not os.path.isdir(there):
        return f"{there} is not a folder"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"{there} is not writable for you"
    try:
        # `os.access` allows the superuser everything, but some folders accept no files. This one has no name.
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        return f"{there} does not accept files ({error.strerror})"
    return ""
