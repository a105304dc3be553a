"""Anomalies of steps, skipped steps and loss spikes, and the end of the run when too many steps were skipped.

Torch-free. All decisions follow from numbers that every rank reads for the same step, so that ranks decide alike
without communication.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from rlinf_core.contract.run import RunConfig
from rlinf_core.contract.tables.runner import RunnerConfig
from rlinf_core.data.loading.mixture import Source
from rlinf_core.data.sample import ReplacedRow
from rlinf_core.errors import UserError
from rlinf_core.loggers.jsonl import FILE as METRICS
from rlinf_core.loggers.jsonl import RowFile, cut_back, read_metrics
from rlinf_core.training.checkpoint.state import NAMES, STATE

FILE = "anomalies.jsonl"
WINDOW = 100
"""Number of previous steps with whose losses a step's loss is compared."""
FEWEST = 20
"""Fewest losses in the window for a loss to be called a spike."""
TO_DEVIATION = 1.4826
"""For normally distributed numbers, the median absolute deviation times this is the standard deviation."""
SMALLEST_SPREAD = 0.01
"""Least deviation, relative to the median: otherwise any change of a nearly constant loss would be a spike."""
NAMED = 5
"""Bad rows that an error lists."""
MOST_SAMPLES = 64
"""Most samples recorded per anomaly, the most suspicious first."""

AnomalyKind = Literal["skipped", "spike"]


@dataclass(frozen=True)
class Anomaly:
    """An anomaly of a step."""

    kind: AnomalyKind
    value: float
    """The step's loss."""
    expected: float
    """The median of the previous losses; NaN if there are none."""

    def __str__(self) -> str:
        if self.kind == "spike":
            return f"the loss is {self.value:.4g}, where {self.expected:.4g} was usual"
        what = "the gradient" if math.isfinite(self.value) else "the loss"
        return f"{what} was not finite, the step was skipped"


class Spikes:
    """Finds losses that are more than `threshold` robust standard deviations above the median of previous losses.

    Median and median absolute deviation are robust against the spikes in the window; a loss that stays high counts as
    usual once it fills half of the window.

    Args:
        threshold: Robust standard deviations; 0: nothing is a spike.
        losses: The previous losses in order; NaN and infinity are ignored.
    """

    def __init__(self, threshold: float, losses: Iterable[float] = ()) -> None:
        self._threshold = threshold
        self._window = deque((loss for loss in losses if math.isfinite(loss)), maxlen=WINDOW)

    def see(self, loss: float) -> float | None:
        """Add a loss to the window; if it is a spike, returns the median before it."""
        usual = statistics.median(self._window) if self._window else math.nan
        is_spike = False
        if self._threshold and len(self._window) >= FEWEST and math.isfinite(loss) and loss > usual:
            deviation = TO_DEVIATION * statistics.median(abs(one - usual) for one in self._window)
            is_spike = loss - usual > self._threshold * max(deviation, SMALLEST_SPREAD * abs(usual))
        if math.isfinite(loss):
            self._window.append(loss)
        return usual if is_spike else None

    @property
    def usual(self) -> float:
        """The median of the window; NaN if it is empty."""
        return statistics.median(self._window) if self._window else math.nan


@dataclass(frozen=True)
class History:
    """The last steps before the one from which a run continues."""

    losses: Sequence[float] = ()
    """Losses of the steps that were not skipped."""
    skipped: int = 0
    """How many steps in a row were skipped at the end."""


NOTHING = History()


class Guard:
    """Finds anomalies of steps, and ends the run when too many in a row were skipped.

    Args:
        settings: `[runner]`.
        before: The steps before the start, the same on every rank.
    """

    def __init__(self, settings: RunnerConfig, before: History = NOTHING) -> None:
        self._spikes, self._limit = Spikes(settings.spike_threshold, before.losses), settings.max_skipped_steps
        self._in_a_row, self._diverged = before.skipped, False

    def see(self, metrics: Mapping[str, float], *, diverged: bool = False) -> Anomaly | None:
        """The anomaly of the next step; None if there is none.

        Args:
            metrics: The step's metrics.
            diverged: Whether too many losses are not finite for a single sample to explain it.
        """
        loss, self._diverged = metrics["loss"], diverged
        if metrics["skipped"]:
            self._in_a_row += 1
            return Anomaly("skipped", loss, self._spikes.usual)
        self._in_a_row = 0
        usual = self._spikes.see(loss)
        return None if usual is None else Anomaly("spike", loss, usual)

    def check(self, run: RunConfig, step: int) -> None:
        """End the run if too many steps in a row, up to this one, were skipped.

        Raises:
            UserError: Names the skipped steps and the last checkpoint before them.
        """
        if not self._limit or self._in_a_row < self._limit:
            return
        before, folder = step - self._in_a_row, run.folder
        good = last_checkpoint(run.checkpoints, before)
        way_on = (
            f"The last checkpoint before them is {good}: write its name into {folder / 'latest'} to continue from it"
        )
        raise UserError(
            f"{self._in_a_row} steps in a row were skipped, {before + 1} to {step}: loss or gradient was not finite "
            f"(runner.max_skipped_steps = {self._limit}). {folder / FILE} names their samples"
            f"{', most of which are not the cause: the weights have diverged' if self._diverged else ''}. "
            f"{way_on if good else 'There is no checkpoint before'}; with the same settings this will happen "
            f"again: {'' if self._diverged else 'leave the samples out, or '}lower optim.lr"
        )


def last_checkpoint(folder: Path, step: int) -> Path | None:
    """The newest complete checkpoint in a folder of at most this step."""
    paths = (path.parent for path in folder.glob(f"{NAMES}/{STATE}"))
    return max((path for path in paths if int(path.name.removeprefix("step_")) <= step), default=None)


def read_history(folder: Path, step: int) -> History:
    """The last steps of a run up to a step, from its metrics file; rows of validations are ignored."""
    rows = [row for row in read_metrics(folder / METRICS) if cast(int, row["step"]) <= step and "loss" in row]
    losses = [row["loss"] for row in rows if not row.get("skipped") and row["loss"] is not None]
    skipped = itertools.takewhile(lambda row: row.get("skipped"), reversed(rows))
    return History(losses[-WINDOW:], sum(1 for _ in skipped))


@dataclass(frozen=True)
class Suspect:
    """A sample of a step."""

    position: int
    """Index in the global batch."""
    loss: float
    """Its own loss, or its micro batch's mean if the policy does not return `PolicyOutput.sample_losses`."""


def suspects(losses: Sequence[float]) -> list[Suspect]:
    """The samples that may explain a step's anomaly, the most suspicious first.

    Samples whose loss is not finite, if there are any; otherwise all, in order of decreasing loss.
    """
    every = [Suspect(position, loss) for position, loss in enumerate(losses)]
    broken = [suspect for suspect in every if not math.isfinite(suspect.loss)]
    return (broken or sorted(every, key=lambda suspect: -suspect.loss))[:MOST_SAMPLES]


def not_finite(losses: Sequence[float]) -> int:
    """How many losses are NaN or infinity."""
    return sum(not math.isfinite(loss) for loss in losses)


def have_diverged(losses: Sequence[float], *, together: int) -> bool:
    """Whether so many losses of a step are NaN or infinity that the weights, not a single sample, must be the cause.

    Args:
        losses: The losses of its samples.
        together: Number of samples that share one loss value: 1, or the size of a micro batch.
    """
    return not_finite(losses) > max(together, len(losses) / 2)


class AnomalyFile:
    """`<run>/anomalies.jsonl`: one JSON object per anomaly; created with the first one.

    Args:
        folder: The run's folder.
        step: Where the run starts; rows of later steps are cut off, as in `metrics.jsonl`.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / FILE
        cut_back(self.path, step)
        self._file = RowFile(self.path)

    def write(self, step: int, anomaly: Anomaly, samples: Sequence[Mapping[str, Any]], *, of: int) -> None:
        """Append an anomaly.

        Args:
            step: The step's number, from 1.
            anomaly: The anomaly.
            samples: The samples that may explain it, the most suspicious first.
            of: Number of samples in the step.
        """
        row = {
            "step": step,
            "kind": anomaly.kind,
            "loss": number(anomaly.value),
            "usual_loss": number(anomaly.expected),
            "global_batch_size": of,
            "samples": samples,
        }
        self._file.append(row)

    def write_replaced(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append the bad rows that were replaced in a step.

        Args:
            step: The step's number, from 1.
            rows: `bad_row` of each.
        """
        self._file.append({"step": step, "kind": "bad_sample", "samples": rows})


class BadRows:
    """The bad rows that were replaced since the start, the same on every rank."""

    def __init__(self) -> None:
        self._errors: dict[int, dict[int, str]] = {}

    def is_new(self, row: ReplacedRow) -> bool:
        """Add a row; returns whether it is the first time."""
        known = self._errors.setdefault(row.source, {})
        is_new = row.row not in known
        known[row.row] = row.error
        return is_new

    def check(self, sources: Sequence[Source], step: int) -> None:
        """End the run if a dataset has too many.

        Raises:
            UserError: Names some of them.
        """
        for number, errors in self._errors.items():
            most, name = sources[number].max_bad_rows, sources[number].name
            if len(errors) > most:
                shown = "\n".join(f"  {error}" for error in list(errors.values())[:NAMED])
                raise UserError(
                    f"step {step}: {len(errors)} rows{f' of {name}' if name else ''} could not be read, more than "
                    f"data.max_bad_samples = {most}; the first ones:\n{shown}\nRepair them (`rlinf check-dataset "
                    "--full` lists all), leave their episodes out (data.exclude_episodes), or raise the limit"
                )


def bad_row(source: Source, row: ReplacedRow, rank: int) -> dict[str, Any]:
    """A replaced row, for `anomalies.jsonl`."""
    return {
        "where": source.rows.describe(row.row),
        **({"source": source.name} if source.name else {}),
        "row": row.row,
        "error": row.error,
        "replaced_by": source.rows.describe(row.by),
        "replaced_by_row": row.by,
        "rank": rank,
    }


def number(value: float) -> float | None:
    """The value for JSON, which has no NaN or infinity: None in their place."""
    return value if math.isfinite(value) else None
