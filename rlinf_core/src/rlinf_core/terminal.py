"""Text for the terminal that there is: narrow ones wrap at words, and those without UTF-8 get ASCII.

Files are always UTF-8; only stdout and stderr depend on the environment.
"""

from __future__ import annotations

import codecs
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from io import TextIOWrapper
from typing import TextIO

from rlinf_core.untrusted.text import printable

NARROWEST = 40
"""Columns below which words are not kept together any more."""
SECONDS_BEFORE_A_BAR = 0.5
"""What is done sooner shows no bar, unless it says before the work that it begins (0 are done)."""
LINES_APART = 60.0
"""Seconds between two lines of progress where there is no terminal."""
_ASCII = {
    "π": "pi",
    "β": "beta",
    "τ": "tau",
    "…": "...",
    "·": "-",
    "±": "+-",
    "\u00d7": "x",  # times
    "≥": ">=",
    "≤": "<=",
    "→": "->",
    "°": " degrees",
    "↵": "\\n",
    "␣": " ",
    "▁": "_",
    "∅": "none",
    "⟦": "[[",
    "⟧": "]]",
    **dict.fromkeys("\u2013\u2014", "-"),  # dashes
    **dict.fromkeys("─━═╌┄┈╴╶╸╺", "-"),
    **dict.fromkeys("│┃║╎┆┊╵╷╹╻", "|"),
    **dict.fromkeys("\u201c\u201d\u201e", '"'),
    **dict.fromkeys("\u2018\u2019", "'"),
    **dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True)),
    **{power: f"^{digit}" for power, digit in zip("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789", strict=True)},
}
_BOXES, _BRAILLE = range(0x2500, 0x25A0), range(0x2800, 0x2900)
_HANDLER = "rlinf-ascii"


def replace_unprintable(streams: Iterable[TextIO | None]) -> None:
    """Let streams of another encoding than UTF-8 print a replacement for what it lacks, instead of failing."""
    codecs.register_error(_HANDLER, _replace)
    for stream in streams:
        if isinstance(stream, TextIOWrapper) and codecs.lookup(stream.encoding).name != "utf-8":
            stream.reconfigure(errors=_HANDLER)


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(in_ascii, error.object[error.start : error.end])), error.end


def in_ascii(character: str) -> str:
    """What a terminal without Unicode shows for a character: `pi` for π; `?` where nothing is like it."""
    if character in _ASCII:
        return _ASCII[character]
    if ord(character) in _BRAILLE:  # The points of a plot; the first is empty.
        return " " if ord(character) == _BRAILLE.start else "*"
    return "+" if ord(character) in _BOXES else "?"


def wrap(text: str, stream: TextIO) -> str:
    """Break lines at words where a terminal would break inside them; text for pipes and files stays as it is.

    Continuation lines are indented by two columns more than the line. Paths and other long words are never broken, so
    that they can be copied.
    """
    if not stream.isatty():
        return text
    width = shutil.get_terminal_size().columns
    if width < NARROWEST:
        return text
    return "\n".join(line if len(line) <= width else _break(line, width) for line in text.split("\n"))


def announce(phase: str, *, rank: int = 0) -> None:
    """Print on rank 0 what a run does next that may take a while, before it has loggers."""
    if rank == 0:
        with suppress(OSError, ValueError):  # A run does not end because nobody reads what it says.
            print(f"{phase} ...", flush=True)


def warn(text: str) -> None:
    """Print a warning on stderr, if there still is one."""
    with suppress(OSError, ValueError):
        print(printable(f"warning: {text}"), file=sys.stderr, flush=True)


def print_phase(what: str) -> None:
    """Print what a command does next that may take a while, for people only: on stderr, if it is a terminal."""
    if sys.stderr.isatty():
        print(wrap(f"{printable(what)} ...", sys.stderr), file=sys.stderr, flush=True)


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
        yield _progress_lines(what, of)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(of))
    eta = TextColumn("ETA"), TimeRemainingColumn()
    bar = Progress(*columns, *eta, console=Console(stderr=True), transient=True)
    task, begun = bar.add_task(what, total=None), time.monotonic()

    def progress(done: int, all: int) -> None:
        if not bar.live.is_started and (not done or time.monotonic() - begun >= SECONDS_BEFORE_A_BAR):
            bar.start()
        bar.update(task, completed=done, total=all)

    try:
        yield progress
    finally:
        if bar.live.is_started:
            bar.stop()


def _progress_lines(what: str, of: str) -> Callable[[int, int], object]:
    started = said = time.monotonic()

    def progress(done: int, all: int) -> None:
        nonlocal said
        now = time.monotonic()
        if done and now - said >= LINES_APART:
            said = now
            eta = timedelta(seconds=round((now - started) / done * (all - done)))
            print(f"{what}: {done} of {all} {of}, ETA {eta}", file=sys.stderr, flush=True)

    return progress


def _break(line: str, width: int) -> str:
    indent = line[: len(line) - len(line.lstrip())] + "  "
    wrapper = textwrap.TextWrapper(width, subsequent_indent=indent, replace_whitespace=False)
    wrapper.break_long_words = wrapper.break_on_hyphens = False
    return wrapper.fill(line)
