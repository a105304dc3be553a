"""What was measured of an exported policy, for its model card: validation, evaluators' tables, files of `rlinf eval`.

Only what belongs to the exported weights is taken: the same step, live or averaged. Rates keep their intervals.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rlinf_core.errors import UserError
from rlinf_core.results import EMA, LARGEST, TABLE, Estimate, ResultTable, evaluations_of, read_table
from rlinf_core.untrusted.text import read_json

RATE = "success"
"""The column of success rates in tables of `rlinf_core.rollout`."""
MOST_ROWS = 40
"""Rows of a table that a model card shows."""
MOST_METRICS = 16
VALIDATION = "val_"
"""Prefix of the metrics that a model card lists."""
BASELINES = ("_mse_mean", "_mse_repeat")
"""Ends of the names of baselines' metrics, which are the same for all weights."""


@dataclass(frozen=True)
class Table:
    """A table of results, and where it is from."""

    source: str
    """Who measured it, such as `rlinf eval --env metaworld`."""
    table: ResultTable
    facts: Mapping[str, str]
    """What the numbers depend on: versions of a simulator, its renderer."""

    @property
    def is_simulator(self) -> bool:
        """Whether it has success rates."""
        return RATE in self.table.columns

    def shown(self) -> ResultTable:
        """The table as a model card shows it: with the first rows and the last one, which is over all tasks."""
        rows = self.table.rows
        if len(rows) <= MOST_ROWS:
            return self.table
        note = f"{self.table.note} {len(rows) - MOST_ROWS} rows are left out.".strip()
        return self.table.model_copy(update={"rows": (*rows[: MOST_ROWS - 1], rows[-1]), "note": note})

    def overall(self) -> tuple[Estimate, int] | None:
        """The success rate over all tasks, and the number of episodes; None if the table has none."""
        if not self.is_simulator or not self.table.rows:
            return None
        row = dict(zip(self.table.columns, self.table.rows[-1], strict=True))
        rate, episodes = row[RATE], row.get("episodes")
        return (rate, episodes) if isinstance(rate, Estimate) and isinstance(episodes, int) else None


@dataclass(frozen=True)
class Measured:
    """All that was measured."""

    validation: Mapping[str, float]
    """Metrics of the run's validation at the exported step, of the exported weights, with their names in the log."""
    tables: Sequence[Table]


def measured_of(run: Path, step: int, ema: bool, validation: Mapping[str, Any], results: Sequence[Path]) -> Measured:
    """Collect what was measured of exported weights.

    Args:
        run: The run's folder.
        step: Finished steps of the checkpoint.
        ema: Whether the averaged weights are exported.
        validation: All metrics of the run's validation at this step.
        results: Files that `rlinf eval --output` wrote.

    Raises:
        UserError: A file is not of `rlinf eval`, or is of other weights; the message lists all mistakes.
    """
    mistakes: list[str] = []
    tables = [
        Table(f"the run's evaluator `{found.evaluator}`", table, {})
        for found in evaluations_of(run)
        if (found.step, found.ema) == (step, ema)
        for name, path in found.files.items()
        if name.endswith(TABLE)
        if (table := _readable(path)) is not None
    ]
    for path in results:
        try:
            tables += _of_file(path, step, ema)
        except UserError as error:
            mistakes.append(str(error))
    if mistakes:
        raise UserError("\n".join(mistakes))
    # `rlinf eval` of a run leaves the same tables in the run's folder and in the file.
    once = {one.table.model_dump_json(): one for one in tables}
    return Measured(_own_metrics(validation, ema), list(once.values()))


def _own_metrics(metrics: Mapping[str, Any], ema: bool) -> dict[str, float]:
    """The metrics of the exported weights, under the names of live ones, and those of baselines."""
    own = {
        name.removeprefix(EMA): float(value)
        for name, value in metrics.items()
        if (name.startswith(EMA) == ema or name.endswith(BASELINES))
        and name.removeprefix(EMA).startswith(VALIDATION)  # Success rates are in tables, with their intervals.
        and isinstance(value, int | float)
        and math.isfinite(value)
    }
    return dict(list(own.items())[:MOST_METRICS])


def _readable(path: Path) -> ResultTable | None:
    """A table of the run's folder; None if it is damaged, which `rlinf report` says."""
    try:
        return read_table(path)
    except UserError:
        return None


def _of_file(path: Path, step: int, ema: bool) -> Iterator[Table]:
    """The tables of a file of `rlinf eval --output`."""
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it is larger than {LARGEST // 2**20} MiB")
        content = read_json(path)
        if not isinstance(content, dict) or not {"step", "weights"} <= content.keys():
            raise ValueError("it has no step and weights")
        env = content.get("settings", {}).get("env", {}).get("type", "") if "table" in content else ""
        found = [content["table"]] if "table" in content else [*content["tables"].values()]
        tables = [ResultTable.model_validate(one) for one in found]
        facts = {str(key): str(value) for key, value in content.get("facts", {}).items()}
    except (OSError, ValueError, KeyError, AttributeError, ValidationError) as error:
        why = str(error).splitlines()[0]
        raise UserError(f"{path} is not a file that `rlinf eval --output` wrote: {why}") from error
    theirs, ours = (content["step"], content["weights"]), (step, "ema" if ema else "live")
    if theirs != ours:
        raise UserError(
            f"{path} is of other weights: step {theirs[0]}, {theirs[1]}; exported are those of step {step}, {ours[1]}. "
            "Evaluate these, or choose those with --step and --ema"
        )
    where = "of the dataset that was named" if content.get("dataset") else f"of {content.get('split')} episodes"
    source = f"`rlinf eval --env {env}`" if env else f"`rlinf eval`, {where}"
    for table in tables:
        yield Table(source, table, facts)
