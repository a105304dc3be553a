"""What is told of steps once their numbers are there: metrics, anomalies with their samples, slow ranks.

Ranks read the same steps at the same time, so that what follows from a step (to stop, to give up) happens on all of
them after the same one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rlinf_core.contract.process_group import ProcessGroup
from rlinf_core.contract.run import RunConfig
from rlinf_core.data.loading.micro_batches import MicroBatches
from rlinf_core.training import data as sources
from rlinf_core.training.monitor.anomalies import AnomalyFile, Guard, have_diverged, not_finite, number, suspects
from rlinf_core.training.monitor.flight_recorder import Watch
from rlinf_core.training.monitor.metrics import Throughput, peak_memory_gb
from rlinf_core.training.monitor.stragglers import Stragglers
from rlinf_core.training.step import StepNumbers, StepRecord

LAG = {"cuda": 1}
"""Steps of a device after which a step is read; elsewhere 0. While the host waits for a step's numbers, the device has
the next step to compute; more would only make a request to stop take longer."""
LAST_WAIT = 10.0
"""Seconds to wait, when the run ends by an error, for numbers that may never come."""


class StepReports:
    """Steps on their way to those who are told of them.

    Args:
        run: The run.
        group: All ranks.
        batches: The run's, for the samples of a step.
        start_step: Where the run starts.
        guard: Finds anomalies.
        stragglers: Finds slow ranks.
        watch: Knows that this rank waits here.
        throughput: Says what a step's operations amount to.
        tell: Tells loggers and observers the metrics of a step; does nothing on ranks other than 0.
        say: Tells loggers a line.
    """

    def __init__(
        self,
        run: RunConfig,
        group: ProcessGroup,
        batches: MicroBatches,
        *,
        start_step: int,
        guard: Guard,
        stragglers: Stragglers,
        watch: Watch,
        throughput: Throughput,
        tell: Callable[[int, Mapping[str, float]], None],
        say: Callable[[str], None],
    ) -> None:
        self._run, self._batches, self._group = run, batches, group
        self._guard, self._stragglers, self._watch = guard, stragglers, watch
        self._tell, self._say, self._throughput = tell, say, throughput
        self._anomalies = AnomalyFile(run.folder, start_step) if group.rank == 0 else None
        self._waiting: deque[StepRecord] = deque()
        self._lag = LAG.get(group.device.type, 0)
        self._first = True

    def add(self, record: StepRecord) -> None:
        """Take in a step that was computed, or is being."""
        self._waiting.append(record)

    def read(self, *, all_: bool = False) -> bool:
        """Tell of the steps that are due, or of all; returns whether a rank had been asked to stop at one of them.

        Raises:
            UserError: Too many steps in a row were skipped.
        """
        asked = False
        while len(self._waiting) > (0 if all_ else self._lag):
            self._watch.enter("reading its numbers", self._waiting[0].step)
            record = self._waiting.popleft()
            asked |= self._tell_of(record)
            self._guard.check(self._run, record.step)
        return asked

    def read_what_is_left(self) -> None:
        """Tell of steps that were computed before an error, as far as their numbers still come."""
        until = time.monotonic() + LAST_WAIT
        while self._waiting:
            while not self._waiting[0].is_here and time.monotonic() < until:
                time.sleep(0.01)
            if not self._waiting[0].is_here:
                self._waiting.clear()
                return
            self._tell_of(self._waiting.popleft())

    def _tell_of(self, record: StepRecord) -> bool:
        step, numbers = record.step, record.read(self._batches.global_batch_size)
        metrics = numbers.metrics | sources.source_losses(self._batches.sources, numbers.by_source)
        metrics |= self._throughput.metrics(numbers.useful_tflop, metrics["step_seconds"])
        metrics["peak_memory_gb"] = peak_memory_gb(self._group.device)
        metrics["epoch"] = step / self._batches.steps_per_epoch
        self._tell(step, metrics)
        if self._first and (missing := sources.missing_losses(self._batches.sources, metrics)):
            self._say(missing)
        self._first = False
        self._look_for_anomalies(step, metrics, numbers)
        self._stragglers.note(metrics, record.clock)
        if numbers.times and (slow := self._stragglers.tell(step, numbers.times)):
            self._say(slow)
        return numbers.asked

    def _look_for_anomalies(self, step: int, metrics: Mapping[str, float], numbers: StepNumbers) -> None:
        losses, together = numbers.sample_losses, 1 if numbers.told else self._run.trainer.micro_batch_size
        diverged = have_diverged(losses, together=together)
        anomaly = self._guard.see(metrics, diverged=diverged)
        if anomaly is None or self._anomalies is None:
            return
        samples = list(self._samples(step, numbers))
        self._anomalies.write(step, anomaly, samples, of=self._batches.global_batch_size)
        advice = f"look at {samples[0]['where']} first"
        if diverged:
            advice = (
                f"{not_finite(losses)} of {len(losses)} samples have no finite loss, so it is hardly a sample's fault: "
                "the weights have diverged (lower optim.lr)"
            )
        self._say(f"step {step}: {anomaly}; {advice} ({self._anomalies.path})")

    def _samples(self, step: int, numbers: StepNumbers) -> Iterator[dict[str, Any]]:
        """The samples that explain a step, the most suspicious first."""
        batches = self._batches
        own, rows = batches.global_batch(step - 1)
        computed_by = {
            int(position): (rank, micro)
            for micro in range(batches.accumulation)
            for rank in range(batches.world_size)
            for position in batches.places(micro, rank)
        }
        for suspect in suspects(numbers.sample_losses):
            source, row = batches.sources[own[suspect.position]], int(rows[suspect.position])
            rank, micro = computed_by[suspect.position]
            yield {
                "where": source.rows.describe(row),
                **({"source": source.name} if source.name else {}),
                "row": row,
                "loss": number(suspect.loss),
                "rank": rank,
                "micro_batch": micro,
            }
