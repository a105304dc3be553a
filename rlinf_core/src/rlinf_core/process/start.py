"""What a process needs from its environment first: standard streams, and a user with a name. Imports no torch."""

from __future__ import annotations

import getpass
import os
import sys

from rlinf_core.terminal import replace_unprintable


def prepare_process() -> None:
    """Prepare the process of a command or of a run."""
    open_streams()
    replace_unprintable((sys.stdout, sys.stderr))
    name_user()


def open_streams() -> None:
    """Open those of stdin, stdout and stderr that are closed, so that what is printed is lost and goes nowhere else.

    Otherwise the next file or socket that is opened gets the number, and libraries print into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # The lowest number that is free: this one.
    if sys.stdout is None:  # Python's, if it was closed at the start.
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)


def name_user() -> None:
    """Give a user without a name one: its number, in `USER`.

    Containers run as any user (`docker run --user 1234`, OpenShift), and torch names its cache after the user, so that
    importing torch._dynamo, as sharding does, fails for one without a name (pytorch issue 140765).
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):  # OSError from Python 3.13 on.
        os.environ["USER"] = str(os.getuid())
