"""`metrics.jsonl`: one JSON object a step, and one a validation. Torch-free."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Literal

from rlinf_core.config.run import RunConfig
from rlinf_core.files import write_text
from rlinf_core.logger import Logger, LoggerConfig

FILE = "metrics.jsonl"


class JsonlLoggerConfig(LoggerConfig):
    """Writes `<run>/metrics.jsonl`. Always on."""

    type: Literal["jsonl"] = "jsonl"

    def build(self, run: RunConfig, *, start_step: int, stop_step: int) -> Logger:
        """Open the file, cut back to `start_step`."""
        run.folder.mkdir(parents=True, exist_ok=True)
        path = run.folder / FILE
        cut_back(path, start_step)
        return JsonlLogger(path.open("a"))


class JsonlLogger:
    """A row is on disk when its step is done."""

    def __init__(self, file: IO[str]) -> None:
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
        self._file.close()

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        # JSON has no NaN; null says "not a number" to every reader.
        row = {"step": step} | {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line torn by a crash is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def cut_back(path: Path, step: int) -> None:
    """Drop rows after `step` (contract 9); the rows that stay keep their bytes."""
    if not path.exists():
        return
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    write_text(path, "".join(kept))
