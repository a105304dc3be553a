"""All that a run measures and reports while it trains: one object between the trainer and loggers, hooks and files.

A step is read some time after it was computed, when its numbers have reached the host. All ranks read the same steps at
the same point, so that a decision that follows from a step (to stop, to give up) is made on all of them alike.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from types import MappingProxyType
from typing import Any

from rlinf_core.contract.process_group import ProcessGroup
from rlinf_core.contract.run import LoadedPlugins, Trainer
from rlinf_core.data.loading.micro_batches import MicroBatches
from rlinf_core.data.loading.mixture import Source
from rlinf_core.plugins.observers import Observer
from rlinf_core.plugins.owners import Implementation
from rlinf_core.process.watchdog import watchdog
from rlinf_core.training.checkpoint.manager import Saved
from rlinf_core.training.monitor.anomalies import (
    AnomalyFile,
    BadRows,
    Guard,
    bad_row,
    have_diverged,
    not_finite,
    number,
    read_history,
    suspects,
)
from rlinf_core.training.monitor.flight_recorder import FlightRecorder
from rlinf_core.training.monitor.metrics import (
    StepNumbers,
    StepRecord,
    Throughput,
    as_number,
    check_names,
    peak_memory_gb,
)
from rlinf_core.training.monitor.profiling import Profile
from rlinf_core.training.monitor.stragglers import Stragglers
from rlinf_core.training.state.build import TrainState

LAG = {"cuda": 1}
"""How many steps later a step is read, by device type; 0 for others. While the host waits for a step's numbers, the
device computes the next one; a larger lag would only delay a request to stop."""
OBSERVERS = (
    *("rlinf_step_metrics", "rlinf_step_finished", "rlinf_validation_finished", "rlinf_checkpoint_saved"),
    "rlinf_train_finished",
)
"""Hooks whose implementations only watch: one that raises is left out of the rest of the run."""
LAST_WAIT = 10.0
"""Seconds to wait, when the run ends with an error, for numbers that may never arrive."""


class Monitor:
    """Metrics, anomalies, slow ranks, traces, flight records, loggers and hooks. Every rank makes the same calls.

    Args:
        trainer: Passed to hooks; its `step` is where the run starts.
        group: All ranks.
        plugins: Provide loggers and hooks.
        batches: The run's micro batches, to name the samples of a step.
        state: The sharded policy, to count its useful operations, and what plugins have added to it.
        stop_step: The last step.
    """

    def __init__(
        self,
        trainer: Trainer,
        group: ProcessGroup,
        plugins: LoadedPlugins,
        batches: MicroBatches,
        state: TrainState,
        *,
        stop_step: int,
    ) -> None:
        run, start, first = trainer.run, trainer.step, group.rank == 0
        self._trainer, self._group, self._hook, self._batches = trainer, group, plugins.hook, batches
        self._loggers = plugins.build_loggers(run, start_step=start, stop_step=stop_step) if first else []
        self._observers = {
            hook: [(Observer(str(one), run.folder, group.rank), one) for one in plugins.implementations(hook)]
            for hook in OBSERVERS
        }
        on_cuda = group.device.type == "cuda"
        self.recorder = FlightRecorder(run.folder, group.rank, run.trainer.timeout_seconds, beside_nccl=on_cuda)
        self.throughput = Throughput(run, state.policy, group, plugins, self.log, changed=state.adapters.changed)
        self._profile = Profile(run.folder, run.runner.profile if first else (), group.device, self.log)
        self._stragglers = Stragglers(group)
        self._guard = Guard(run.runner, group.decide(lambda: read_history(run.folder, start)))
        self._anomalies = AnomalyFile(run.folder, start) if first else None
        self._bad_rows = BadRows()
        self._waiting: deque[StepRecord] = deque()
        self._lag = LAG.get(group.device.type, 0)
        self._is_first = True
        self._more: list[Callable[[], Mapping[str, float]]] = []
        self._compilation, self._stop_step = state.compilation, stop_step

    def log(self, text: str) -> None:
        """Send a line to the loggers; does nothing on ranks other than 0."""
        for logger in self._loggers:
            logger.message(text)

    def measure(self, metrics: Callable[[], Mapping[str, float]]) -> None:
        """Add metrics to every reported step; called on rank 0."""
        self._more.append(metrics)

    def phase(self, name: str) -> None:
        """Set what this rank does next, for flight records."""
        self.recorder.enter(name)

    def start(self) -> None:
        """Announce the start to observers, and wait until every rank is here."""
        watchdog.enter("hooks of plugins at the start")
        self._hook.rlinf_train_started(trainer=self._trainer)
        self._group.wait()  # Some ranks read their weights longer than others may wait in a collective.

    def watching(self) -> AbstractContextManager[None]:
        """Write a flight record if anything in the body takes too long."""
        return self.recorder.watching()

    def before(self, step: int) -> tuple[float, float] | None:
        """Called before each step; returns this rank's times if the step compares ranks."""
        self._profile.before(step)
        return self._stragglers.own_times() if self._stragglers.is_due(step) else None

    def add(self, record: StepRecord) -> None:
        """Queue a step that was started; `read` reports it."""
        self._waiting.append(record)
        self._profile.after(record.step)
        if self._compilation:
            for text in self._compilation.news(last=record.step == self._stop_step):
                self.log(text)

    def read(self, *, all_: bool = False) -> bool:
        """Report the steps that are due, or all; returns whether any rank had been asked to stop by one of them.

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

    def validated(self, step: int, results: Mapping[str, float]) -> None:
        """Report the results of a validation."""
        if self._group.rank == 0:
            for logger in self._loggers:
                logger.validation(step, results)
            self._observe("rlinf_validation_finished", step=step, metrics=results)

    def saved(self, checkpoints: Sequence[Saved]) -> None:
        """Report saves that finished or failed."""
        for saved in checkpoints:
            self.log(str(saved))
            if self._group.rank == 0 and not saved.failure:
                self._observe("rlinf_checkpoint_saved", step=saved.step, path=saved.path)

    def close(self, error: BaseException | None) -> None:
        """Report the end of the run to loggers and hooks, even if one of them fails."""
        with contextlib.ExitStack() as ending:
            ending.callback(self._observe, "rlinf_train_finished", error=error)
            for logger in self._loggers:
                ending.callback(logger.close, error)
            ending.callback(self._profile.close)
            ending.callback(self._read_remaining)

    def _read_remaining(self) -> None:
        """Report the steps before an error whose numbers still arrive in time."""
        until = time.monotonic() + LAST_WAIT
        while self._waiting:
            while not self._waiting[0].is_here and time.monotonic() < until:
                time.sleep(0.01)
            if not self._waiting[0].is_here:
                self._waiting.clear()
                return
            self._report(self._waiting.popleft(), together=False)

    def _report(self, record: StepRecord, *, together: bool = True) -> bool:
        """Report a step; returns whether any rank had been asked to stop. `together`: all ranks do so."""
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
        if numbers.replaced and together:
            self._report_replaced(record)
        if numbers.times and (slow := self._stragglers.report(step, numbers.times)):
            self.log(slow)
        return numbers.asked

    def _publish(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._group.rank != 0:
            return
        for more in self._more:
            metrics = {**metrics, **more()}
        for observer, one in self._observers["rlinf_step_metrics"]:
            more_of = partial(metrics_of, one, trainer=self._trainer, step=step, metrics=MappingProxyType(metrics))
            metrics = {**metrics, **(observer.attempt(more_of) or {})}
        for logger in self._loggers:
            logger.step(step, metrics)
        self._observe("rlinf_step_finished", step=step, metrics=metrics)

    def _observe(self, hook: str, **arguments: Any) -> None:
        """Call a hook's implementations, each of which may fail."""
        for observer, one in self._observers[hook]:
            observer.attempt(partial(one.call, trainer=self._trainer, **arguments))

    def _report_anomaly(self, step: int, metrics: Mapping[str, float], numbers: StepNumbers) -> None:
        losses = numbers.sample_losses
        together = 1 if numbers.has_sample_losses else self._batches.batching.micro_batch_size
        diverged = have_diverged(losses, together=together)
        anomaly = self._guard.see(metrics, diverged=diverged)
        if anomaly is None or self._anomalies is None:
            return
        samples = list(self._samples(step, numbers))
        self._anomalies.write(step, anomaly, samples, of=self._batches.batching.global_batch_size)
        advice = f"look at {samples[0]['where']} first"
        if diverged:
            advice = (
                f"{not_finite(losses)} of {len(losses)} samples have no finite loss, so no single sample explains it: "
                "the weights have diverged (lower optim.lr)"
            )
        self.log(f"step {step}: {anomaly}; {advice} ({self._anomalies.path})")

    def _report_replaced(self, record: StepRecord) -> None:
        """List the bad rows that were replaced in a step. All ranks call this: the step says that there are some.

        Raises:
            UserError: There are too many.
        """
        rows = [(rank, row) for rank, of_rank in enumerate(self._group.gather(record.replaced)) for row in of_rank]
        found = [bad_row(self._batches.sources[row.source], row, rank) for rank, row in rows]
        if self._anomalies is not None:
            self._anomalies.write_replaced(record.step, found)
        for (_, row), one in zip(rows, found, strict=True):
            if self._bad_rows.is_new(row):
                self.log(f"step {record.step}: a bad sample was replaced by {one['replaced_by']}: {row.error}")
        self._bad_rows.check(self._batches.sources, record.step)

    def _samples(self, step: int, numbers: StepNumbers) -> Iterator[dict[str, Any]]:
        """The samples that may explain an anomaly, the most suspicious first."""
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


def metrics_of(one: Implementation, *, metrics: Mapping[str, float], **arguments: Any) -> dict[str, float]:
    """The metrics that an implementation of `rlinf_step_metrics` adds to those of a step.

    Raises:
        UserError: One has no valid name, one that is taken, or a value that is not a number.
    """
    added = check_names(one.call(metrics=metrics, **arguments), metrics)
    return {name: as_number(name, value) for name, value in added.items()}


def source_losses(sources: Sequence[Source], sums: Sequence[float]) -> dict[str, float]:
    """`loss/<name>` of each source with samples in the step, from `step.source_sums` of the global batch."""
    pairs = zip(sources, sums[::2], sums[1::2], strict=True) if sums else ()
    return {f"loss/{source.name}": loss / weight for source, loss, weight in pairs if weight}


def missing_losses(sources: Sequence[Source], metrics: Mapping[str, float]) -> str:
    """A note if a mixture's first step has no losses per source; else empty."""
    if len(sources) == 1 or any(key.startswith("loss/") for key in metrics):
        return ""
    return "note: no loss/<source> is measured: the policy does not return PolicyOutput.sample_losses"
