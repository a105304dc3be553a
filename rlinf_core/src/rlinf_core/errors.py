"""Errors that a user can fix, shown as one message without a traceback, and exit codes.

A message names the thing, its owner and the way out. Any other exception is a defect and keeps its traceback.
"""

import difflib
import sys
from collections.abc import Iterable
from enum import IntEnum
from signal import Signals

from rlinf_core.untrusted import printable


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

    It may quote untrusted text; `str` makes it safe for terminals and logs (`untrusted.printable`).
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class PluginError(UserError):
    """A plugin failed or conflicts with another. The message names its distribution, version and entry point."""


class RunError(Exception):
    """A failure of a machine or a network, which a restart may fix.

    The message is shown without a traceback, and torchrun uses its restarts.
    """


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
