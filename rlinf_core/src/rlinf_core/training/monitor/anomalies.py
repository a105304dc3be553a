"""What is odd about a step, and when there is too much of it: skipped steps, and losses that spike. Torch-free.

All of it follows from numbers that every rank reads of the same step, so that ranks decide alike without asking.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlinf_core.contract.run import RunConfig
from rlinf_core.contract.tables import RunnerConfig
from rlinf_core.errors import UserError
from rlinf_core.loggers.jsonl import FILE as METRICS
from rlinf_core.loggers.jsonl import RowFile, cut_back, read_rows
from rlinf_core.training.checkpoint.state import NAMES, STATE

FILE = "anomalies.jsonl"
WINDOW = 100
"""Steps with whose losses a step's is compared."""
FEWEST = 20
"""Steps before which no loss is called a spike."""
TO_DEVIATION = 1.4826
"""Median absolute deviation times this is the standard deviation of normally distributed numbers."""
SMALLEST_SPREAD = 0.01
"""Of the median: a loss that hardly moves does not make every movement a spike."""
MOST_SAMPLES = 64
"""Samples of an anomaly that are written down, the most suspicious first."""

AnomalyKind = Literal["skipped", "spike"]


@dataclass(frozen=True)
class Anomaly:
    """Something odd about a step."""

    kind: AnomalyKind
    value: float
    """The step's loss."""
    expected: float
    """The median of the losses before it; not a number where there are none yet."""

    def __str__(self) -> str:
        if self.kind == "spike":
            return f"the loss is {self.value:.4g}, where {self.expected:.4g} was usual"
        what = "the gradient" if math.isfinite(self.value) else "the loss"
        return f"{what} was not finite, the step was skipped"


class Spikes:
    """Losses far above those of the steps before: by `threshold` robust standard deviations above their median.

    Median and median absolute deviation of the window do not mind the spikes in it; a loss that stays high is usual
    once half of the window is.

    Args:
        threshold: Robust standard deviations; 0: nothing is a spike.
        losses: Of the steps before, in their order; those that are not finite do not count.
    """

    def __init__(self, threshold: float, losses: Iterable[float] = ()) -> None:
        self._threshold = threshold
        self._window = deque((loss for loss in losses if math.isfinite(loss)), maxlen=WINDOW)

    def see(self, loss: float) -> float | None:
        """What was usual, if this loss is a spike; the loss then belongs to the window."""
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
        """The median of the window; not a number if it is empty."""
        return statistics.median(self._window) if self._window else math.nan


@dataclass(frozen=True)
class History:
    """The last steps of a run before the one with which it goes on."""

    losses: Sequence[float] = ()
    """Of those that were not skipped."""
    skipped: int = 0
    """How many of the very last were skipped in a row."""


NOTHING = History()


class Guard:
    """Finds what is odd about steps, and ends the run when too many in a row were skipped.

    Args:
        settings: `[runner]`.
        before: The steps before, the same on every rank.
    """

    def __init__(self, settings: RunnerConfig, before: History = NOTHING) -> None:
        self._spikes, self._limit = Spikes(settings.spike_threshold, before.losses), settings.max_skipped_steps
        self._in_a_row, self._diverged = before.skipped, False

    def see(self, metrics: Mapping[str, float], *, diverged: bool = False) -> Anomaly | None:
        """What is odd about the next step.

        Args:
            metrics: The step's.
            diverged: Whether no single sample explains that its loss is not finite.
        """
        loss, self._diverged = metrics["loss"], diverged
        if metrics["skipped"]:
            self._in_a_row += 1
            return Anomaly("skipped", loss, self._spikes.usual)
        self._in_a_row = 0
        usual = self._spikes.see(loss)
        return None if usual is None else Anomaly("spike", loss, usual)

    def check(self, run: RunConfig, step: int) -> None:
        """End the run if the steps up to this one were skipped too often in a row.

        Raises:
            UserError: They were; it names the last checkpoint from before.
        """
        if not self._limit or self._in_a_row < self._limit:
            return
        before, folder = step - self._in_a_row, run.folder
        good = last_checkpoint(run.checkpoints, before)
        way_on = f"The last checkpoint from before is {good}: write its name into {folder / 'latest'} to go on from it"
        raise UserError(
            f"{self._in_a_row} steps in a row were skipped, {before + 1} to {step}: loss or gradient was not finite "
            f"(runner.max_skipped_steps = {self._limit}). {folder / FILE} names their samples"
            f"{', most of which are no cause: the weights have diverged' if self._diverged else ''}. "
            f"{way_on if good else 'There is no checkpoint from before'}; with the same settings the same happens "
            f"again: {'' if self._diverged else 'leave the samples out, or '}lower optim.lr"
        )


def last_checkpoint(folder: Path, step: int) -> Path | None:
    """The newest complete checkpoint in a folder after at most so many steps."""
    paths = (path.parent for path in folder.glob(f"{NAMES}/{STATE}"))
    return max((path for path in paths if int(path.name.removeprefix("step_")) <= step), default=None)


def read_history(folder: Path, step: int) -> History:
    """The last steps of a run up to a step, from its metrics; validations are none."""
    rows = [row for row in read_rows(folder / METRICS) if row["step"] <= step and "loss" in row]
    losses = [row["loss"] for row in rows if not row.get("skipped") and row["loss"] is not None]
    skipped = itertools.takewhile(lambda row: row.get("skipped"), reversed(rows))
    return History(losses[-WINDOW:], sum(1 for _ in skipped))


@dataclass(frozen=True)
class Suspect:
    """A sample of a step."""

    position: int
    """In the global batch."""
    loss: float
    """Its own, or the mean of its micro batch where the policy does not tell it (`PolicyOutput.sample_losses`)."""


def suspects(losses: Sequence[float]) -> list[Suspect]:
    """The samples of a step that explain what is odd about it, the most suspicious first.

    Losses that are not finite explain it; otherwise any sample may, and the largest come first.
    """
    every = [Suspect(position, loss) for position, loss in enumerate(losses)]
    broken = [suspect for suspect in every if not math.isfinite(suspect.loss)]
    return (broken or sorted(every, key=lambda suspect: -suspect.loss))[:MOST_SAMPLES]


def not_finite(losses: Sequence[float]) -> int:
    """How many losses are not finite."""
    return sum(not math.isfinite(loss) for loss in losses)


def have_diverged(losses: Sequence[float], *, together: int) -> bool:
    """Whether so many losses of a step are not finite that no single sample explains it: the weights do.

    Args:
        losses: Of its samples.
        together: Of how many samples a loss is told: 1, or as many as a micro batch has.
    """
    return not_finite(losses) > max(together, len(losses) / 2)


class AnomalyFile:
    """`<run>/anomalies.jsonl`: one JSON object an anomaly. There is no file where there is none.

    Args:
        folder: The run's.
        step: Where the run starts; what came later is cut back, as in `metrics.jsonl`.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / FILE
        cut_back(self.path, step)
        self._file = RowFile(self.path)

    def write(self, step: int, anomaly: Anomaly, samples: Sequence[Mapping[str, Any]], *, of: int) -> None:
        """Append an anomaly.

        Args:
            step: The step's number, from 1.
            anomaly: What is odd.
            samples: The samples that explain it, the most suspicious first.
            of: Samples in the step.
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


def number(value: float) -> float | None:
    """JSON has no NaN; null says "not a number" to every reader."""
    return value if math.isfinite(value) else None
