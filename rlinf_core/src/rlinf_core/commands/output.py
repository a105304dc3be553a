"""Output of commands: through rich on a terminal, plain text in a pipe or file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from rlinf_core.terminal import wrap
from rlinf_core.untrusted.text import printable


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


def positive_count(text: str) -> int:
    """A number of processes, machines or GPUs, for argparse."""
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def size_in_words(size: float) -> str:
    """Bytes to three significant digits; `-` if there are none."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor / 10:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} bytes" if size else "-"
