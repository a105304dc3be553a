"""What evaluators leave in a run's folder, for reports and trackers: tables, action errors, images and videos.

An evaluation writes its files to `<run>/evaluations/<type>/step_<step>/`, or `ema_step_<step>/` for averaged weights.
Reports show a file by its name: `*.table.json` is a `ResultTable`, `*.actions.json` an `ActionErrors`; images, videos
and texts are shown as what they are. Plugins may use this module; it leaves torch and NumPy unloaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from rlinf_core.errors import UserError
from rlinf_core.untrusted.text import read_json

FOLDER = "evaluations"
"""The folder of evaluators' files, in that of the run."""
FIRST_BATCH = "first_batch"
"""The folder of images of the first batch as the model sees them, in that of the run."""
TABLE, ACTIONS = ".table.json", ".actions.json"
IMAGES = (".png", ".jpg", ".jpeg", ".gif", ".webp")
VIDEOS = (".mp4", ".webm")
TEXTS = (".txt", ".md", ".log")
EMA = "ema_"
LARGEST = 64 * 2**20
"""Bytes of a file of results that is read."""
DIGITS = 6
"""Significant digits of numbers in files of results."""

Matrix = list[list[float | None]]


class _Result(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    def to_json(self) -> bytes:
        """The content of the file."""
        return json.dumps(_shortened(self.model_dump(mode="json")), separators=(",", ":")).encode() + b"\n"


class Estimate(_Result):
    """A number with its confidence interval."""

    value: float
    low: float
    """Lower end of the interval, usually of 95 %."""
    high: float
    """Upper end."""


Cell = str | int | float | Estimate | None


class ResultTable(_Result):
    """A table of results, for example success rates per task: the content of a file `<name>.table.json`."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    """Cells are texts, numbers, `Estimate`s, or None for an empty cell."""
    note: str = ""
    """A sentence below the table, for example what the intervals are."""

    @model_validator(mode="after")
    def _is_rectangular(self) -> ResultTable:
        wrong = [number for number, row in enumerate(self.rows) if len(row) != len(self.columns)]
        if wrong:
            raise ValueError(f"row {wrong[0]} has {len(self.rows[wrong[0]])} cells, not {len(self.columns)}")
        return self


class PredictedChunk(_Result):
    """A chunk of actions that the policy sampled, beside the recorded one, in the data's units."""

    where: str
    """The row: dataset, file, episode and frame."""
    recorded: Matrix
    """[steps within the episode, dimensions]."""
    predicted: Matrix
    """[steps within the episode, dimensions]."""


class ActionErrors(_Result):
    """Errors of sampled actions in the data's units: the content of a file `<name>.actions.json`."""

    rows: int
    """Rows whose actions were sampled."""
    names: tuple[str, ...]
    """Name of each dimension of an action; empty for one without a name."""
    counts: tuple[int, ...]
    """[steps], compared actions per step of the chunk: those within the episode."""
    rmse: Matrix
    """[steps, dimensions], root mean squared error; None for a step that no row has."""
    mae: Matrix
    """[steps, dimensions], mean absolute error."""
    baselines: dict[str, Matrix] = {}
    """Root mean squared errors, [steps, dimensions], of predictions that ignore the observation."""
    chunks: tuple[PredictedChunk, ...] = ()
    """Some of the chunks, to be drawn."""

    @model_validator(mode="after")
    def _fits(self) -> ActionErrors:
        shape = (len(self.counts), len(self.names))
        for name, matrix in {"rmse": self.rmse, "mae": self.mae, **self.baselines}.items():
            if len(matrix) != shape[0] or any(len(row) != shape[1] for row in matrix):
                raise ValueError(f"{name} is not [{shape[0]}, {shape[1]}]")
        for chunk in self.chunks:
            for matrix in (chunk.recorded, chunk.predicted):
                if len(matrix) != len(chunk.recorded) or any(len(row) != shape[1] for row in matrix):
                    raise ValueError(f"the chunk of {chunk.where} is not [steps, {shape[1]}]")
        return self


@dataclass(frozen=True)
class EvaluationFiles:
    """The files of an evaluation."""

    evaluator: str
    """The evaluator's type."""
    step: int
    """Finished steps."""
    ema: bool
    """Whether the averaged weights were evaluated."""
    files: Mapping[str, Path]
    """Path by name, which is relative to the evaluation's folder, in order."""


def evaluations_of(run: Path) -> Iterator[EvaluationFiles]:
    """The evaluations of a run that left files, by evaluator and step.

    Args:
        run: The run's folder.
    """
    for of_type in sorted((run / FOLDER).glob("*")):
        found = [one for path in of_type.glob("*step_*") if (one := _files(of_type.name, path)) is not None]
        yield from sorted(found, key=lambda one: (one.step, one.ema))


def first_batch_of(run: Path) -> list[Path]:
    """The images of a run's first batch as the model sees them, in order.

    Args:
        run: The run's folder.
    """
    return sorted((run / FIRST_BATCH).glob("*.png"))


def read_table(path: Path) -> ResultTable:
    """Read a `*.table.json`. Raises `UserError` that names the file if it is not one."""
    return _read(ResultTable, path)


def read_action_errors(path: Path) -> ActionErrors:
    """Read a `*.actions.json`. Raises `UserError` that names the file if it is not one."""
    return _read(ActionErrors, path)


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> Estimate:
    """A success rate with its Wilson score interval (95 % by default).

    Args:
        successes: Number of successes.
        trials: Number of trials, at least 1.
        z: Quantile of the standard normal distribution.
    """
    rate = successes / trials
    scale = 1 / (1 + z * z / trials)
    middle = (rate + z * z / (2 * trials)) * scale
    reach = z * scale * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    # Exactly 0 and 1 at the ends, where rounding would leave 3e-17.
    low = middle - reach if successes else 0.0
    high = middle + reach if successes < trials else 1.0
    return Estimate(value=rate, low=low, high=high)


def cell_text(cell: Cell) -> str:
    """A cell of a table as text: `0.75 (0.51 to 0.91)` for an estimate."""
    if isinstance(cell, Estimate):
        return f"{cell.value:.4g} ({cell.low:.4g} to {cell.high:.4g})"
    if cell is None:
        return ""
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def as_markdown(table: ResultTable) -> str:
    """A table as Markdown, for trackers that show texts."""
    rows = [table.columns, ["---"] * len(table.columns), *([cell_text(cell) for cell in row] for row in table.rows)]
    lines = ["| " + " | ".join(_escaped(text) for text in row) + " |" for row in rows]
    return "\n".join([f"**{_escaped(table.title)}**", "", *lines, "", _escaped(table.note)]).strip() + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _files(evaluator: str, folder: Path) -> EvaluationFiles | None:
    """The files of an evaluation's folder; None if it is something else, such as a temporary one."""
    ema = folder.name.startswith(EMA)
    number = folder.name.removeprefix(EMA).removeprefix("step_")
    if not number.isdigit() or not folder.is_dir():
        return None
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return EvaluationFiles(evaluator, int(number), ema, {path.relative_to(folder).as_posix(): path for path in paths})


def _read[R: _Result](kind: type[R], path: Path) -> R:
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it is larger than {LARGEST // 2**20} MiB")
        return kind.model_validate(read_json(path))
    except (OSError, ValidationError, ValueError) as error:
        lines = str(error).splitlines() if not isinstance(error, ValidationError) else _mistakes(error)
        raise UserError(f"{path} is not a {kind.__name__} of an evaluation: {lines[0]}") from error


def _mistakes(error: ValidationError) -> list[str]:
    return [f"{'.'.join(map(str, one['loc']))}: {one['msg']}".removeprefix(": ") for one in error.errors()]


def _shortened(value: Any) -> Any:
    """A JSON value with fewer digits: files of results are read by people and programs, not continued from."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: _shortened(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_shortened(inner) for inner in value]
    return value
