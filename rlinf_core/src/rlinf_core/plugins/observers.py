"""Loggers and observers that fail are left out of the rest of the run, which goes on.

They only watch: a tracker's server that is down must not cost days of training. The first failure is one line on
stderr; its traceback is written to `<run>/observer_errors.txt`. Ctrl-C and signals pass through.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from rlinf_core.errors import PluginError
from rlinf_core.plugins.owners import FAULTS
from rlinf_core.untrusted.text import printable

if TYPE_CHECKING:
    from rlinf_core.contract.run import Logger

TRACEBACKS = "observer_errors.txt"


class Observer:
    """Something that only watches a run, and that is left out after its first failure.

    Args:
        name: What it is and whose, for the warning: `logger 'wandb' of acme-wandb 1.0 (entry point ...)`.
        folder: The run's folder.
        rank: The process that calls it.
    """

    def __init__(self, name: str, folder: Path, rank: int = 0) -> None:
        self.name, self._folder, self._rank = name, folder, rank
        self.left_out = False
        """Whether it has failed."""

    def attempt[T](self, call: Callable[[], T]) -> T | None:
        """The call's result; None if it failed, or if this observer has been left out."""
        if self.left_out:
            return None
        try:
            return call()
        except FAULTS as error:
            self._leave_out(error)
            return None

    def last[T](self, call: Callable[[], T]) -> T | None:
        """As `attempt`, and also if this observer has been left out: to release what it holds."""
        try:
            return call()
        except FAULTS as error:
            self._leave_out(error)
            return None

    def _leave_out(self, error: Exception | SystemExit) -> None:
        """Write down a failure, and warn of the first one."""
        where = self._write_down(error)
        if self.left_out:
            return
        self.left_out = True
        # Hooks raise a `UserError` again with the names that the line has anyway.
        cause = error.__cause__ if isinstance(error, PluginError) and error.__cause__ else error
        said = f"{type(cause).__name__}: {cause}".strip().splitlines()[0]
        rank = f" on rank {self._rank}" if self._rank else ""
        line = f"warning: {self.name} failed{rank} and is left out from now on: {said} (traceback: {where})"
        with suppress(OSError, ValueError):  # A run does not end because stderr is full or closed.
            print(printable(line), file=sys.stderr, flush=True)

    def _write_down(self, error: Exception | SystemExit) -> str:
        """Append the traceback to the run's file, or print it if that fails; returns where it is."""
        text = "".join(traceback.format_exception(error))
        path = self._folder / TRACEBACKS
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(printable(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {self.name}\n{text}\n"))
        except OSError:
            with suppress(OSError, ValueError):
                print(printable(text), file=sys.stderr, flush=True)
            return "above"
        return str(path)


class ObservedLogger:
    """A logger that is left out after its first failure; it is closed in any case."""

    def __init__(self, logger: Logger, observer: Observer) -> None:
        self._logger, self._observer = logger, observer

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """The metrics of an optimizer step."""
        self._observer.attempt(lambda: self._logger.step(step, metrics))

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """The metrics of a validation."""
        self._observer.attempt(lambda: self._logger.validation(step, metrics))

    def message(self, text: str) -> None:
        """Something the user should read once."""
        self._observer.attempt(lambda: self._logger.message(text))

    def close(self, error: BaseException | None) -> None:
        """The run has ended."""
        self._observer.last(lambda: self._logger.close(error))
