"""Read what a run has left in its folder, whether it is finished, stopped or still training. Torch-free."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlinf_core.errors import UserError
from rlinf_core.loggers.jsonl import METRICS_FILE, read_metrics, read_rows
from rlinf_core.process.ending import EXIT_FILE
from rlinf_core.results import EvaluationFiles, evaluations_of, first_batch_of
from rlinf_core.untrusted.text import read_json

ANOMALIES = "anomalies.jsonl"
PHASES = ("data_wait", "forward", "backward", "optimizer")

Numbers = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Curve:
    """A metric over steps."""

    steps: Numbers
    """[N], ascending."""
    values: Numbers
    """[N]; NaN where the metric was not finite."""

    @property
    def last(self) -> float:
        """The last finite value; NaN if there is none."""
        finite = self.values[np.isfinite(self.values)]
        return float(finite[-1]) if len(finite) else math.nan


@dataclass(frozen=True, eq=False)
class RunRecord:
    """A run's folder."""

    folder: Path
    name: str
    config: Mapping[str, Any]
    """The complete config as tables; empty if it cannot be read."""
    config_text: str
    environment: Mapping[str, Any]
    end: Mapping[str, Any]
    """`exit.json`; empty if the run is training or was killed."""
    training: Mapping[str, Curve]
    """Metrics of steps."""
    validation: Mapping[str, Curve]
    """Metrics of validations."""
    anomalies: Sequence[Mapping[str, Any]]
    """`step`, `kind`, `loss`, `usual_loss`, and `where` of the most suspicious sample."""
    evaluations: Sequence[EvaluationFiles]
    first_batch: Sequence[Path]
    checkpoints: Sequence[str]

    @property
    def step(self) -> int:
        """The last step with metrics."""
        curves = (*self.training.values(), *self.validation.values())
        return int(max((curve.steps[-1] for curve in curves if len(curve.steps)), default=0))

    def latest(self) -> list[EvaluationFiles]:
        """The last evaluation of each evaluator and set of weights."""
        return list({(one.evaluator, one.ema): one for one in self.evaluations}.values())


def read_run(folder: Path) -> RunRecord:
    """Read a run.

    Raises:
        UserError: The folder is not a run's.
    """
    path = folder / "config.toml"
    if not path.is_file():
        what = "there is no" if not folder.exists() else "no run is in"
        raise UserError(f"{what} {folder}: name the folder of a run, runs/<name>, which has a config.toml")
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        config = {}
    training, validation = _curves(read_metrics(folder / METRICS_FILE))
    runner = config.get("runner", {})
    return RunRecord(
        folder=folder,
        name=str(runner.get("name", folder.resolve().name)) if isinstance(runner, dict) else folder.resolve().name,
        config=config,
        config_text=text,
        environment=_table(folder / "environment.json"),
        end=_table(folder / EXIT_FILE),
        training=training,
        validation=validation,
        anomalies=[_anomaly(row) for row in read_rows(folder / ANOMALIES)],
        evaluations=list(evaluations_of(folder)),
        first_batch=first_batch_of(folder),
        checkpoints=sorted(one.name for one in (folder / "checkpoints").glob("step_*") if one.name[5:].isdigit()),
    )


def time_shares(run: RunRecord) -> dict[str, Curve]:
    """The share of a step's time of each phase, and of everything else; empty if it was not measured."""
    measured = {phase: run.training.get(f"{phase}_share") for phase in PHASES}
    shares = {phase: curve for phase, curve in measured.items() if curve is not None}
    if len({len(curve.steps) for curve in shares.values()}) != 1:
        return {}
    first = next(iter(shares.values()))
    rest = 1 - np.sum([curve.values for curve in shares.values()], axis=0)
    return {**shares, "other": Curve(first.steps, np.clip(rest, 0, 1))}


def config_differences(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Keys whose values differ between runs, with the value of each run; empty for a key that a run does not have."""
    flat = [_flat(run.config) for run in runs]
    keys = sorted(set().union(*flat)) if flat else []
    rows = [(key, [str(one[key]) if key in one else "" for one in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _curves(rows: Sequence[Mapping[str, float | None]]) -> tuple[dict[str, Curve], dict[str, Curve]]:
    """Metrics of steps, and those of validations: rows without a loss."""
    found: tuple[dict[str, tuple[list[float], list[float]]], ...] = ({}, {})
    for row in rows:
        step = row["step"]
        assert step is not None
        columns = found["loss" not in row]
        for name, value in row.items():
            if name != "step":
                steps, values = columns.setdefault(name, ([], []))
                steps.append(step)
                values.append(math.nan if value is None else value)
    training, validation = (
        {name: Curve(np.array(steps, float), np.array(values, float)) for name, (steps, values) in columns.items()}
        for columns in found
    )
    return training, validation


def _table(path: Path) -> Mapping[str, Any]:
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _anomaly(row: Mapping[str, Any]) -> Mapping[str, Any]:
    samples = row.get("samples")
    first = samples[0] if isinstance(samples, list) and samples and isinstance(samples[0], dict) else {}
    loss, usual = (value if isinstance(value := row.get(key), int | float) else None for key in ("loss", "usual_loss"))
    where = str(first.get("where", ""))
    return {"step": row["step"], "kind": str(row.get("kind", "")), "loss": loss, "usual_loss": usual, "where": where}


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
