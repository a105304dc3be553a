"""What a run measures, watches and reports while it trains: one object between the trainer and everyone who listens.

Steps are read some time after they were computed, when their numbers have reached the host. Ranks read the same steps
at the same time, so that what follows from a step (to stop, to give up) happens on all of them after the same one.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rlinf_core.contract.process_group import ProcessGroup
from rlinf_core.contract.run import LoadedPlugins, Trainer
from rlinf_core.data.loading.micro_batches import MicroBatches
from rlinf_core.data.loading.mixture import Source
from rlinf_core.training.checkpoint.manager import Saved
from rlinf_core.training.monitor.anomalies import (
    AnomalyFile,
    Guard,
    have_diverged,
    not_finite,
    number,
    read_history,
    suspects,
)
from rlinf_core.training.monitor.flight_recorder import FlightRecorder
from rlinf_core.training.monitor.metrics import StepNumbers, StepRecord, Throughput, peak_memory_gb
from rlinf_core.training.monitor.profiling import Profile
from rlinf_core.training.monitor.stragglers import Stragglers

LAG = {"cuda": 1}
"""Steps of a device after which a step is read; elsewhere 0. While the host waits for a step's numbers, the device has
the next step to compute; more would only make a request to stop take longer."""
LAST_WAIT = 10.0
"""Seconds to wait, when the run ends by an error, for numbers that may never come."""


class Monitor:
    """Metrics, anomalies, slow ranks, traces, flight records, loggers and observers. Every rank makes the same calls.

    Args:
        trainer: What hooks get; its `step` is where the run starts.
        group: All ranks.
        plugins: Bring loggers and observers.
        batches: The run's micro batches, for the samples of a step.
        policy: The sharded policy, for its useful operations.
        stop_step: The last step.
    """

    def __init__(
        self,
        trainer: Trainer,
        group: ProcessGroup,
        plugins: LoadedPlugins,
        batches: MicroBatches,
        policy: Any,
        *,
        stop_step: int,
    ) -> None:
        run, start, first = trainer.run, trainer.step, group.rank == 0
        self._trainer, self._group, self._hook, self._batches = trainer, group, plugins.hook, batches
        self._loggers = plugins.build_loggers(run, start_step=start, stop_step=stop_step) if first else []
        on_cuda = group.device.type == "cuda"
        self.recorder = FlightRecorder(run.folder, group.rank, run.trainer.timeout_seconds, beside_nccl=on_cuda)
        self.throughput = Throughput(run, policy, group, self.log)
        self._profile = Profile(run.folder, run.runner.profile if first else (), group.device, self.log)
        self._stragglers = Stragglers(group)
        self._guard = Guard(run.runner, group.decide(lambda: read_history(run.folder, start)))
        self._anomalies = AnomalyFile(run.folder, start) if first else None
        self._waiting: deque[StepRecord] = deque()
        self._lag = LAG.get(group.device.type, 0)
        self._is_first = True
        self._more: list[Callable[[], Mapping[str, float]]] = []

    def log(self, text: str) -> None:
        """Send a line to the loggers; does nothing on ranks other than 0."""
        for logger in self._loggers:
            logger.message(text)

    def measure(self, metrics: Callable[[], Mapping[str, float]]) -> None:
        """Ask for further metrics whenever a step is reported; on rank 0."""
        self._more.append(metrics)

    def phase(self, name: str) -> None:
        """Note what this rank does next, for flight records."""
        self.recorder.enter(name)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Write a flight record if anything in the body takes too long; announce its start to observers."""
        self._hook.rlinf_train_started(trainer=self._trainer)
        self._group.wait()  # Some ranks read their weights longer than others may wait in a collective.
        with self.recorder.watching():
            yield

    def before(self, step: int) -> tuple[float, float] | None:
        """The step with this number comes next; returns this rank's times if the ranks are compared after it."""
        self._profile.before(step)
        return self._stragglers.own_times() if self._stragglers.is_due(step) else None

    def add(self, record: StepRecord) -> None:
        """Take in a step that was computed, or is being."""
        self._waiting.append(record)
        self._profile.after(record.step)

    def read(self, *, all_: bool = False) -> bool:
        """Report the steps that are due, or all; returns whether a rank had been asked to stop at one of them.

        Raises:
            UserError: Too many steps in a row were skipped.
        """
        asked = False
        while len(self._waiting) > (0 if all_ else self._lag):
            self.recorder.enter("reading its numbers", self._waiting[0].step)
            record = self._waiting.popleft()
            asked |= self._report(record)
            self._guard.check(self._trainer.run, record.step)
        return asked

    def validated(self, step: int, results: Mapping[str, float], shown: Sequence[str]) -> None:
        """Report the results of a validation, and what the policy showed of held-out samples."""
        if self._group.rank == 0:
            for logger in self._loggers:
                logger.validation(step, results)
            self._hook.rlinf_validation_finished(trainer=self._trainer, step=step, metrics=results)
        for text in shown:
            self.log(f"step {step}: {text}")

    def saved(self, checkpoints: Sequence[Saved]) -> None:
        """Report checkpoints that have become complete, or have failed."""
        for saved in checkpoints:
            self.log(str(saved))
            if self._group.rank == 0 and not saved.failure:
                self._hook.rlinf_checkpoint_saved(trainer=self._trainer, step=saved.step, path=saved.path)

    def close(self, error: BaseException | None) -> None:
        """The run has ended. Everyone is told, even if one of them fails."""
        with contextlib.ExitStack() as ending:
            ending.callback(self._hook.rlinf_train_finished, trainer=self._trainer, error=error)
            for logger in self._loggers:
                ending.callback(logger.close, error)
            ending.callback(self._profile.close)
            ending.callback(self._read_remaining)

    def _read_remaining(self) -> None:
        """Report steps that were computed before an error, as far as their numbers still arrive."""
        until = time.monotonic() + LAST_WAIT
        while self._waiting:
            while not self._waiting[0].is_here and time.monotonic() < until:
                time.sleep(0.01)
            if not self._waiting[0].is_here:
                self._waiting.clear()
                return
            self._report(self._waiting.popleft())

    def _report(self, record: StepRecord) -> bool:
        step, numbers = record.step, record.read(self._batches.batching.global_batch_size)
        metrics = numbers.metrics | source_losses(self._batches.sources, numbers.by_source)
        metrics |= self.throughput.metrics(numbers.useful_tflop, metrics["step_seconds"])
        metrics["peak_memory_gb"] = peak_memory_gb(self._group.device)
        metrics["epoch"] = step / self._batches.steps_per_epoch
        self._publish(step, metrics)
        if self._is_first and (missing := missing_losses(self._batches.sources, metrics)):
            self.log(missing)
        self._is_first = False
        self._report_anomaly(step, metrics, numbers)
        self._stragglers.add(metrics, record.clock)
        if numbers.times and (slow := self._stragglers.report(step, numbers.times)):
            self.log(slow)
        return numbers.asked

    def _publish(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._group.rank != 0:
            return
        for more in self._more:
            metrics = {**metrics, **more()}
        for logger in self._loggers:
            logger.step(step, metrics)
        self._hook.rlinf_step_finished(trainer=self._trainer, step=step, metrics=metrics)

    def _report_anomaly(self, step: int, metrics: Mapping[str, float], numbers: StepNumbers) -> None:
        losses, together = numbers.sample_losses, 1 if numbers.has_sample_losses else self._batches.batching.micro_batch_size
        diverged = have_diverged(losses, together=together)
        anomaly = self._guard.see(metrics, diverged=diverged)
        if anomaly is None or self._anomalies is None:
            return
        samples = list(self._samples(step, numbers))
        self._anomalies.write(step, anomaly, samples, of=self._batches.batching.global_batch_size)
        advice = f"look at {samples[0]['where']} first"
        if diverged:
            advice = (
                f"{not_finite(losses)} of {len(losses)} samples have no finite loss, so it is hardly a sample's fault: "
                "the weights have diverged (lower optim.lr)"
            )
        self.log(f"step {step}: {anomaly}; {advice} ({self._anomalies.path})")

    def _samples(self, step: int, numbers: StepNumbers) -> Iterator[dict[str, Any]]:
        """The samples that explain a step, the most suspicious first."""
        batches = self._batches
        own, rows = batches.global_batch(step - 1)
        computed_by = {
            int(position): (rank, micro)
            for micro in range(batches.accumulation)
            for rank in range(batches.batching.ranks)
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


def source_losses(sources: Sequence[Source], sums: Sequence[float]) -> dict[str, float]:
    """`loss/<name>` of the sources that the step has samples of, from `step.source_sums` of the global batch."""
    pairs = zip(sources, sums[::2], sums[1::2], strict=True) if sums else ()
    return {f"loss/{source.name}": loss / weight for source, loss, weight in pairs if weight}


def missing_losses(sources: Sequence[Source], metrics: Mapping[str, float]) -> str:
    """A note for a mixture whose first step has no losses of sources; empty where it has."""
    if len(sources) == 1 or any(key.startswith("loss/") for key in metrics):
        return ""
    return "note: no loss/<source> is measured: the policy does not tell PolicyOutput.sample_losses"
