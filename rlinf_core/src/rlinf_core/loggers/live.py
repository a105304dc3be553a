"""A run's progress on a terminal: a bar and a few lines at the bottom that are repainted, with messages above them.

Nothing is painted by a thread: a step repaints the display at most four times a second, so that loader workers are
never forked while a thread holds a lock, and a terminal that is gone is an error of the logger.
"""

from __future__ import annotations

import os
import sys
import time
import weakref
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.control import Control
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import ControlType
from rich.table import Table
from rich.text import Text

from rlinf_core.untrusted.text import printable

SECONDS_BETWEEN_PAINTS = 0.25
NARROW = 60
"""Columns below which the bar is left out, for the numbers."""
_RUNNING: weakref.WeakSet[LiveDisplay] = weakref.WeakSet()


class LiveDisplay:
    """The last lines of a terminal while a run trains; `stop` removes them.

    Args:
        console: The terminal.
        name: The run's name.
        stop_step: The last step.
    """

    def __init__(self, console: Console, name: str, stop_step: int) -> None:
        self._console, self._name, self._stop_step = console, name, stop_step
        self._step, self._left = 0, ""
        self._lines: Sequence[str] = ()
        self._painted = float("-inf")
        self._outputs = sys.stdout, sys.stderr
        self._live = Live(self, console=console, auto_refresh=False, transient=True)

    def update(self, step: int, left: str, lines: Sequence[str], *, now: bool = False) -> None:
        """Show a step.

        Args:
            step: Finished steps.
            left: The time that is left, in words.
            lines: What to show below the bar.
            now: Repaint even if that was done a moment ago.
        """
        self._step, self._left, self._lines = step, left, lines
        if not self._live.is_started:
            # Whatever was typed, such as Ctrl-C, is at the beginning of the line.
            self._console.control(Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2)))
            self._live.start()
            _RUNNING.add(self)
        if now or time.monotonic() - self._painted >= SECONDS_BETWEEN_PAINTS:
            self._painted = time.monotonic()
            self._live.refresh()

    def stop(self) -> None:
        """Remove the display; what was printed above it remains."""
        _RUNNING.discard(self)
        if self._live.is_started:
            self._live.stop()

    def forget(self) -> None:
        """In a forked process: print directly again, without repainting the parent's display."""
        sys.stdout, sys.stderr = self._outputs

    def __rich__(self) -> Group:
        """The lines, for the terminal's present width."""
        width = self._console.width
        row = Table.grid(padding=(0, 1), expand=True)
        name = Text(printable(self._name), style="bold", no_wrap=True, overflow="ellipsis")
        cells: list[Any] = [name]
        row.add_column(max_width=max(8, width // 4))
        if width >= NARROW:
            row.add_column(ratio=1)
            cells.append(ProgressBar(total=max(self._stop_step, 1), completed=self._step))
        share = self._step / max(self._stop_step, 1)
        for text in (f"{self._step}/{self._stop_step}", f"{share:.0%}", f"ETA {self._left}"):
            row.add_column(no_wrap=True)
            cells.append(text)
        row.add_row(*cells)
        texts = [Text(printable(line), no_wrap=True, overflow="ellipsis") for line in self._lines if line]
        return Group(row, *texts)


def _leave_to_parent() -> None:
    for display in list(_RUNNING):
        display.forget()
    _RUNNING.clear()


os.register_at_fork(after_in_child=_leave_to_parent)
