"""`metrics.jsonl`: one JSON object per step and per validation. Torch-free."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, Literal

from rlinf_core.contract.run import Logger, LoggerConfig, RunConfig
from rlinf_core.errors import UserError
from rlinf_core.files import write_bytes
from rlinf_core.terminal import warn

METRICS_FILE = "metrics.jsonl"
MOST_LINES = 8
"""Numbers of lines that a warning lists at most."""
FILE = METRICS_FILE  # The name that training/monitor/anomalies.py imports.


class JsonlLoggerConfig(LoggerConfig):
    """Writes `<run>/metrics.jsonl`. Always on."""

    type: Literal["jsonl"] = "jsonl"

    def build(self, run: RunConfig, *, start_step: int, stop_step: int) -> Logger:
        """Open the file, with rows after `start_step` removed."""
        run.folder.mkdir(parents=True, exist_ok=True)
        path = run.folder / METRICS_FILE
        cut_back(path, start_step)
        return JsonlLogger(RowFile(path))


class RowFile:
    """A file with one JSON object per line, never with a partial row; created with the first row.

    A full disk does not end the run before its next save: rows that cannot be written are kept in memory and written
    together with a later row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: FileIO | None = None
        self._kept: list[bytes] = []

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row, after those that could not be written before."""
        self._kept.append(json.dumps(row).encode() + b"\n")
        try:
            self._write()
        except OSError as error:
            if len(self._kept) == 1:  # Warn once, not for every further row.
                warn(f"{self.path} cannot be written: {error}; its rows are kept in memory")

    def close(self, error: BaseException | None) -> None:
        """Write the rows that could not be written before.

        Args:
            error: What ended the run; it takes precedence over lost rows.

        Raises:
            UserError: Rows are lost, and the run has no other error.
        """
        try:
            self._write()
        except OSError as why:
            if error is None:
                raise UserError(f"{self.path} lacks its last {len(self._kept)} rows: {why}. Free disk space") from why
        if self._file is not None:
            self._file.close()

    def _write(self) -> None:
        if not self._kept:
            return
        if self._file is None:
            self._file = self.path.open("ab", buffering=0)
        whole, rows = os.fstat(self._file.fileno()).st_size, b"".join(self._kept)
        try:
            if self._file.write(rows) != len(rows):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self._file.truncate(whole)  # Half a row would corrupt the next one.
            raise
        self._kept.clear()


class JsonlLogger:
    """Appends a row per step and validation, unbuffered."""

    def __init__(self, file: RowFile) -> None:
        self._file = file

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the row of a step."""
        self._write(step, metrics)

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the row of a validation."""
        self._write(step, metrics)

    def message(self, text: str) -> None:
        """Messages are not metrics."""

    def close(self, error: BaseException | None) -> None:
        """Close the file."""
        self._file.close(error)

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        # JSON has neither NaN nor infinity; every reader understands null.
        self._file.append({"step": step} | {k: v if math.isfinite(v) else None for k, v in metrics.items()})


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file. Lines that are no rows are skipped: an incomplete last one, a note, a damaged one."""
    return [row for _, row in _lines(path) if row is not None]


def read_metrics(path: Path) -> list[dict[str, float | None]]:
    """The rows of a `metrics.jsonl`; those with anything but numbers and null are skipped, too."""
    return [row for row in read_rows(path) if all(one is None or _is_number(one) for one in row.values())]


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Complete lines, each with its row; None if it is not one."""
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        is_row = isinstance(row, dict) and isinstance(row.get("step"), int) and not isinstance(row["step"], bool)
        yield line + b"\n", row if is_row else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def cut_back(path: Path, step: int) -> None:
    """Drop rows after `step` (contract 9); the remaining rows stay identical byte for byte.

    A line that is no row stays with the row before it, and is reported.
    """
    if not path.exists():
        return
    kept, is_kept, strange = [], True, []
    for number, (line, row) in enumerate(_lines(path), start=1):
        if row is None:
            strange.append(str(number))
        else:
            is_kept = row["step"] <= step
        if is_kept:
            kept.append(line)
    write_bytes(path, b"".join(kept))
    if strange:
        shown = ", ".join(strange[:MOST_LINES]) + f" and {len(strange) - MOST_LINES} more" * (len(strange) > MOST_LINES)
        warn(f"{path}: not a row with a step, ignored: line {shown}")
