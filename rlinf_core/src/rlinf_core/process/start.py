"""What a process needs from its environment first: standard streams, a user with a name, its rank. Imports no torch."""

from __future__ import annotations

import getpass
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from rlinf_core.errors import UserError
from rlinf_core.terminal import replace_unprintable

LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables in which a launcher such as torchrun passes on the rank."""
LOCAL = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""Those that torchrun sets besides."""


LOG_LEVELS = ("TORCH_CPP_LOG_LEVEL", "LOGLEVEL")
"""Variables with which a user chooses what torch and torchrun log."""


def prepare_process() -> None:
    """Prepare the process of a command or of a run."""
    open_streams()
    replace_unprintable((sys.stdout, sys.stderr))
    name_user()


@contextmanager
def quiet_torch(least: Literal["ERROR", "FATAL"]) -> Iterator[None]:
    """If the body imports torch, its C++ code logs only what is as bad as `least`, unless the user chose a level.

    It logs every lost connection with a stack trace of 20 lines, from each process. The environment stays as it was.
    """
    if any(name in os.environ for name in LOG_LEVELS):
        yield
        return
    os.environ[LOG_LEVELS[0]] = least
    try:
        yield
    finally:
        del os.environ[LOG_LEVELS[0]]


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


def launched_rank() -> int:
    """The rank that a launcher gave this process; 0 without one, or if it is no number (`check_launcher`)."""
    text = os.environ.get("RANK", "")
    return int(text) if _is_number(text) else 0


def check_launcher() -> None:
    """Check what the launcher said. A process without a rank is alone, whatever else an earlier one left in the shell.

    Raises:
        UserError: Some of it is missing or no number: it is left from another job, or was set by hand.
    """
    if "RANK" not in os.environ:
        for name in ("WORLD_SIZE", *LOCAL):
            os.environ.pop(name, None)
        return
    found = {name: os.environ.get(name, "") for name in LAUNCHER}
    found |= {name: os.environ[name] for name in LOCAL if name in os.environ}
    wrong = [name for name, text in found.items() if not (text if name == "MASTER_ADDR" else _is_number(text))]
    if not wrong and int(found["RANK"]) >= int(found["WORLD_SIZE"]):
        wrong = ["RANK", "WORLD_SIZE"]
    if wrong:
        said = ", ".join(f"{name}={os.environ[name]}" if name in os.environ else f"no {name}" for name in wrong)
        raise UserError(
            "RANK is set, so this process takes itself for one of several that a launcher started, but the launcher's "
            f"other variables do not fit: {said}. Start the run with torchrun or `rlinf launch`; for one process, "
            "unset RANK"
        )


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()
