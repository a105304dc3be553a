"""Output of commands: through rich on a terminal, plain text in a pipe or file."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rlinf_core.terminal import wrap
from rlinf_core.untrusted import printable


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under column names. A terminal wraps wide columns; a pipe gets every row on one line."""
    rows = [[printable(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*columns, box=None, pad_edge=False, header_style="bold")
        for row in rows:
            table.add_row(*row)
        Console(markup=False, highlight=False).print(table)
        return
    lines = [[cell.replace("\n", " ") for cell in row] for row in (columns, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def print_text(text: str) -> None:
    """Print one or more lines of text."""
    print(wrap(printable(text), sys.stdout))


def print_json(value: Any) -> None:
    """Print one JSON document."""
    print(json.dumps(value, indent=2))


def print_error(message: str) -> None:
    """Print an error message to stderr."""
    message = wrap(f"error: {printable(message)}", sys.stderr)
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.text import Text

        text = Text(message)
        text.stylize("bold red", 0, len("error:"))
        Console(stderr=True).print(text, soft_wrap=True)
        return
    print(message, file=sys.stderr)


LINES_APART = 60.0
"""Seconds between two lines of progress where there is no terminal."""


@contextmanager
def print_progress(what: str, of: str) -> Iterator[Callable[[int, int], object]]:
    """Show progress on stderr: a bar on a terminal, elsewhere a line a minute, so that a job's log has few of them.

    Args:
        what: What is being done.
        of: What is counted, in the plural.

    Returns:
        A context whose value takes how much is done, and the total.
    """
    if not sys.stderr.isatty():
        yield _lines(what, of)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(of))
    eta = TextColumn("ETA"), TimeRemainingColumn()
    with Progress(*columns, *eta, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, all: bar.update(task, completed=done, total=all)


def _lines(what: str, of: str) -> Callable[[int, int], object]:
    started = said = time.monotonic()

    def progress(done: int, all: int) -> None:
        nonlocal said
        now = time.monotonic()
        if done and now - said >= LINES_APART:
            said = now
            eta = timedelta(seconds=round((now - started) / done * (all - done)))
            print(f"{what}: {done} of {all} {of}, ETA {eta}", file=sys.stderr, flush=True)

    return progress
