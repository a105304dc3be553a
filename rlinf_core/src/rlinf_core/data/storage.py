"""Storage that goes away and comes back: files that a run has found at its start are read again for a while.

Network file systems lose their server, automounts and credentials expire, files are replaced while they are open. None
of that is the user's mistake: if it lasts, the run ends with a `RunError`, after which launchers start it again. Which
errors are storage's is decided by the errors of the operating system among their causes. Torch-free.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Iterator

from rlinf_core.errors import RunError, UserError
from rlinf_core.terminal import warn

PAUSES = (0.1, 0.9, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Seconds between attempts to read."""
AWAY = tuple(
    getattr(errno, name)
    for name in (
        *("ENOENT", "ENOTDIR", "EACCES", "EPERM", "EIO", "ESTALE", "ENODEV", "ENXIO", "ENOTCONN", "ETIMEDOUT"),
        *("EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ECONNREFUSED", "ECONNRESET", "ECONNABORTED"),
        *("EAGAIN", "EBUSY", "EREMOTEIO", "ENOLINK", "ENOKEY", "EKEYEXPIRED", "ESHUTDOWN", "EPIPE"),
    )
    if hasattr(errno, name)
)
"""Errors of the operating system for a file that was there and cannot be reached."""
_IN_WORDS = re.compile("|".join(re.escape(os.strerror(number)) for number in AWAY), re.IGNORECASE)
"""How libraries without error numbers, such as torchcodec, report them."""


def is_storage_error(error: BaseException) -> bool:
    """Whether an error, or one of its causes, says that a file cannot be reached."""
    return any(
        (isinstance(one, OSError) and one.errno in AWAY)
        or (isinstance(one, RuntimeError) and _IN_WORDS.search(str(one)) is not None)
        for one in _chain(error)
    )


def read_patiently[T](read: Callable[[], T], *, what: str, again: Callable[[], object] = lambda: None) -> T:
    """Read what was there before; while storage is away, wait for it.

    Args:
        read: Reads; called again after a failure.
        what: What is read, for messages.
        again: Called before another attempt; closes open files.

    Raises:
        RunError: Storage has stayed away.
        Exception: What `read` raises otherwise.
    """
    began, warned = time.monotonic(), False
    for pause in (*PAUSES, None):
        try:
            found = read()
        except (UserError, OSError) as error:
            if not is_storage_error(error):
                raise
            if pause is None:
                raise RunError(
                    f"{what} could be read when the run started, but not for the last "
                    f"{time.monotonic() - began:.0f} s: {error}. Is its storage mounted? The same command continues "
                    "from the last checkpoint"
                ) from error
            if not warned:
                warned = True
                warn(f"{what} cannot be read: {error}. Trying again for up to {sum(PAUSES):.0f} s")
        else:
            if warned:
                warn(f"{what} can be read again, after {time.monotonic() - began:.0f} s")
            return found
        time.sleep(pause)
        again()
    raise AssertionError


def reopen[T](open_data: Callable[[], T]) -> T:
    """Open the data of a run; if torchrun has restarted it, a mistake may be storage that is away, as before.

    Raises:
        RunError: They cannot be opened in a process that torchrun has restarted.
        UserError: They cannot be opened in another one.
    """
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return open_data()
    for pause in (*PAUSES, None):
        try:
            return open_data()
        except UserError as error:
            if pause is None:
                raise RunError(
                    f"{error} (for the last {sum(PAUSES):.0f} s; before this restart, the data could be opened)"
                ) from error
            if pause == PAUSES[2]:
                warn(f"the data cannot be opened: {error}. Trying again for up to {sum(PAUSES):.0f} s")
        time.sleep(pause)
    raise AssertionError


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes, the first one last."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__  # Not `__context__`: a cached file that is not there yet is why one of the data is read.
