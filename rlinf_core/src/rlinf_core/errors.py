"""The errors that are a user's to mend. They are shown as one message without a traceback.

A message names the thing, its owner and the way out. Anything else that is raised is a defect and keeps its traceback.
"""

import difflib
from collections.abc import Iterable
from enum import IntEnum
from signal import Signals

from rlinf_core.untrusted import printable


class Exit(IntEnum):
    """The exit codes of `rlinf` and of a training process (contract 10)."""

    OK = 0
    """Done, or saved and left because the machine was asked for (SIGTERM)."""
    DEFECT = 1
    """A defect, with its traceback."""
    USER_ERROR = 2
    """Something the user can mend, with one message."""
    INTERRUPTED = 130
    """Ctrl-C, as shells number it; a training run has saved before."""


class UserError(Exception):
    """Something the user handed in is wrong: a config, a file, a dataset. The message says which and what to do.

    It may repeat what others wrote; as text it is fit for a terminal and a log (`plain.printable`).
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class PluginError(UserError):
    """A plugin failed or contradicts another. The message names its distribution, version and entry point."""


class RunError(Exception):
    """Something failed that is neither the user's nor the code's: a machine, a network. Starting again may help.

    The message is shown without a traceback, and torchrun's restarts are used up on it.
    """


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop by a signal, and has saved if it was training; the same command continues it.

    Args:
        received: SIGINT or SIGTERM.
        step: Finished optimizer steps.
    """

    def __init__(self, received: Signals, step: int) -> None:
        super().__init__(f"stopped by {received.name} after step {step}")
        self.received = received
        self.step = step


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """`"; did you mean 'a' or 'b'?"` for the names closest to a misspelt one, or an empty string."""
    near = difflib.get_close_matches(name, sorted(set(names)), n=3)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
