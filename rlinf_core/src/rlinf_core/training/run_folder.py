"""The run's folder is this process's alone, and can be written to."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from rlinf_core.contract.run import RunConfig
from rlinf_core.errors import UserError
from rlinf_core.files import find_obstacle

ORPHANS_WAIT = 60.0
"""Seconds in which a process of the same job is gone: its agent was killed, and it saves before it leaves."""
ASK_AGAIN = 0.2
"""Seconds between two tries to hold the folder."""


def check_folder(run: RunConfig) -> None:
    """Raise `UserError` where the run's folder, or its checkpoints', cannot be made or written to; nothing is made."""
    if why := find_obstacle(run.folder):
        raise cannot_hold(run, why)
    if why := find_obstacle(run.checkpoints):
        raise UserError(
            f"runner.checkpoint_dir = {run.runner.checkpoint_dir!r} cannot hold the checkpoints of "
            f"{run.runner.name!r}: {why}. Name another folder"
        )


def cannot_hold(run: RunConfig, why: str) -> UserError:
    """The error of a run whose folder is not to be had."""
    return UserError(
        f"runner.output_dir = {run.runner.output_dir!r} cannot hold the run {run.runner.name!r}: {why}. "
        "Name another folder"
    )


@contextmanager
def hold_folder(run: RunConfig, *, patience: float = 0.0) -> Iterator[None]:
    """Keep other processes from the run's folder for as long as this one lives. Called on rank 0.

    Args:
        run: The run.
        patience: Seconds to wait for another process that holds it.

    Raises:
        UserError: Another process holds it, or the output folder cannot be written to.
    """
    path = run.folder.with_name(f".{run.folder.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise cannot_hold(run, str(error)) from error
    with file:
        try:
            _lock(file, patience)
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(
                f"{run.folder} is in use by {file.read() or 'another process'}. Wait for it, end it, or give another "
                "runner.name."
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield  # The lock goes with the process, however it ends; the file may stay.


def _lock(file: IO[str], patience: float) -> None:
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= end:
                raise
        time.sleep(ASK_AGAIN)
