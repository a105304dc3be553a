"""`metrics.jsonl`: one JSON object a step, and one a validation. Torch-free."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, Literal

from rlinf_core.contract.run import Logger, LoggerConfig, RunConfig
from rlinf_core.errors import UserError
from rlinf_core.files import write_text

FILE = "metrics.jsonl"


class JsonlLoggerConfig(LoggerConfig):
    """Writes `<run>/metrics.jsonl`. Always on."""

    type: Literal["jsonl"] = "jsonl"

    def build(self, run: RunConfig, *, start_step: int, stop_step: int) -> Logger:
        """Open the file, cut back to `start_step`."""
        run.folder.mkdir(parents=True, exist_ok=True)
        path = run.folder / FILE
        cut_back(path, start_step)
        return JsonlLogger(RowFile(path))


class RowFile:
    """A file of JSON objects, a line each, which is whole at any time; it is made with the first of them.

    A full disk does not end the run, which can go on until it has to save: rows that do not fit are kept, and written
    with the next one that does.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: FileIO | None = None
        self._kept: list[bytes] = []

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row, and those kept before it."""
        self._kept.append(json.dumps(row).encode() + b"\n")
        try:
            self._write()
        except OSError as error:
            if len(self._kept) == 1:  # The others were told of.
                print(
                    f"warning: {self.path} cannot be written: {error}; its rows are kept", file=sys.stderr, flush=True
                )

    def close(self, error: BaseException | None) -> None:
        """Write what was kept.

        Args:
            error: What ended the run, which is then what is told.

        Raises:
            UserError: Rows are lost, and the run has no other error.
        """
        try:
            self._write()
        except OSError as why:
            if error is None:
                raise UserError(f"{self.path} lacks its last {len(self._kept)} rows: {why}. Make room there") from why
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
            self._file.truncate(whole)  # Half a row would spoil the next.
            raise
        self._kept.clear()


class JsonlLogger:
    """A row is on disk when its step is done."""

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
        # JSON has no NaN; null says "not a number" to every reader.
        self._file.append({"step": step} | {k: v if math.isfinite(v) else None for k, v in metrics.items()})


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of them; a last line torn by a crash is left out.

    Raises:
        UserError: Another line is no row.
    """
    return [row for _, row in _lines(path)]


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Whole lines, and the row in each."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            return
        try:
            row = json.loads(line)
            row["step"] + 0
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(f"{path}: line {number} is damaged, no row with a step. Remove that line") from error
        yield line, row


def cut_back(path: Path, step: int) -> None:
    """Drop rows after `step` (contract 9); the rows that stay keep their bytes."""
    if not path.exists():
        return
    write_text(path, b"".join(line for line, row in _lines(path) if row["step"] <= step).decode())
