"""Writing files so that nothing is half-written, and one message where nothing can be."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rlinf_core.errors import UserError


def write_text(path: Path, text: str, *, writer: str = "") -> None:
    """Write a file aside, sync it, and rename it: readers see the old or the new content, never half of it.

    Args:
        path: The file.
        text: What it shall hold.
        writer: Who writes, in a word, where several processes may do so at once.
    """
    aside = path.with_name(f".{path.name}.{writer}{'.' * bool(writer)}tmp")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Put on disk which files a folder holds, where the file system can say so."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # Mounts of object storage have no folders to sync.
            raise
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path, way_out: str) -> Iterator[None]:
    """Name what the user asked for where it cannot be written, rather than a part of it or a file aside.

    Args:
        path: What is written.
        way_out: The end of the message, without a full stop: `"Name another file with --output"`.

    Raises:
        UserError: For an `OSError` of the body.
    """
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        if error.filename and f".{path.name}." not in str(error.filename):  # Files aside are nobody's business.
            why = f"{why}: {error.filename}"
        raise UserError(f"{path} cannot be written: {why}. {way_out}") from error


def check_writable(path: Path, way_out: str, *, file: bool = False) -> None:
    """Find out before the work whether `writing` has a chance; nothing is made.

    Args:
        path: A folder, or a file.
        way_out: As in `writing`.
        file: Whether it is a file.

    Raises:
        UserError: What is there on the way to it is not a folder, or not one to write to.
    """
    if why := find_obstacle(path.parent if file else path):
        raise UserError(f"{path} cannot be written: {why}. {way_out}")


def find_obstacle(folder: Path) -> str:
    """Why a folder cannot be made or written to, by the nearest part of its path that is there; empty if it can."""
    # os.path answers False, where pathlib raises, for what lies in a folder that may not be entered.
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not os.path.isdir(there):
        return f"{there} is not a folder"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"{there} is not a folder that you may write to"
    try:
        tempfile.TemporaryFile(
            dir=there
        ).close()  # It has no name. The superuser may all, and some folders take nothing.
    except OSError as error:
        return f"{there} takes no files ({error.strerror})"
    return ""
