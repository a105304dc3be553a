"""Errors that a user can fix, shown as one message without a traceback, and exit codes.

A message names the thing, its owner and the way out. Any other exception is a defect and keeps its traceback.
"""

import difflib
import errno
import sys
from collections.abc import Iterable
from enum import IntEnum
from signal import Signals

from rlinf_core.untrusted.text import printable


class Exit(IntEnum):
    """The exit codes of `rlinf` and of a training process (contract 10)."""

    OK = 0
    """Finished, or preempted by SIGTERM after saving."""
    DEFECT = 1
    """A defect, with its traceback."""
    USER_ERROR = 2
    """Something the user can fix, with one message."""
    INTERRUPTED = 130
    """Ctrl-C, by the shell's convention; a training run has saved first."""


class UserError(Exception):
    """Something the user provided is wrong: a config, a file, a dataset. The message says what, and how to fix it.

    It may quote untrusted text; `str` makes it safe for terminals and logs (`untrusted.text.printable`).
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class PluginError(UserError):
    """A plugin failed or conflicts with another. The message names its distribution, version and entry point."""


class RunError(Exception):
    """A failure of a machine or a network, which a restart may fix.

    The message is shown without a traceback, and torchrun uses its restarts.
    """


_PLACES = "runner.output_dir, runner.checkpoint_dir, RLINF_CACHE, HF_HOME and TMPDIR"
_WAYS_OUT = {
    errno.ENAMETOOLONG: "a file's name may have 255 bytes and its path 4,096: choose a shorter runner.name or folder",
    errno.ELOOP: "correct the symbolic links",
    errno.EROFS: f"folders that can be written to are set by {_PLACES}",
    errno.EACCES: f"change the permissions, or set another folder: {_PLACES}",
    errno.EPERM: f"change the permissions, or set another folder: {_PLACES}",
    errno.ENOTDIR: f"a part of the path is a file: set another folder, see {_PLACES}",
    errno.EMFILE: "raise the limit of open files, for example with `ulimit -n 65536`, or lower data.num_workers",
    errno.ENFILE: "raise the machine's limit of open files (sysctl fs.file-max)",
}
"""What to do about an error of the operating system that is no bug, whichever file it meets."""


def beyond_environment(error: BaseException) -> UserError | None:
    """The message for an error that only the environment explains, such as a read-only folder; None for a defect."""
    if isinstance(error, UnicodeEncodeError):
        return beyond_encoding(error)
    if not isinstance(error, OSError):
        return None
    if error.errno in _WAYS_OUT:
        there = " -> ".join(str(one) for one in (error.filename, error.filename2) if one is not None)
        return UserError(f"{error.strerror}{f': {there}' if there else ''}: {_WAYS_OUT[error.errno]}")
    if isinstance(error, FileNotFoundError) and "No usable temporary directory" in str(error):
        return UserError("no temporary folder can be written to: set TMPDIR to one that can")
    return None


def beyond_encoding(error: UnicodeEncodeError) -> UserError | None:
    """The message for a name that this environment's encoding lacks; None for a defect.

    Without UTF-8, Python cannot open a file with such a name, and reads the command line as lone surrogates.
    """
    encoding = sys.getfilesystemencoding()
    if encoding == "utf-8":
        return None
    found = error.object[max(error.start - 40, 0) : error.end + 40]  # The object may be a whole file.
    return UserError(
        f"a file name or setting has characters that are not in {encoding}, the encoding of this environment's locale: "
        f"set PYTHONUTF8=1 or LC_ALL=C.UTF-8 (found in {found!a})"
    )


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run, which has saved if it was training; the same command continues it.

    Args:
        received: SIGINT or SIGTERM.
        step: Number of finished optimizer steps.
    """

    def __init__(self, received: Signals, step: int) -> None:
        super().__init__(f"stopped by {received.name} after step {step}")
        self.received = received
        self.step = step


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """`"; did you mean 'a' or 'b'?"` with the names closest to a misspelt one, or an empty string."""
    near = difflib.get_close_matches(name, sorted(set(names)), n=3)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
