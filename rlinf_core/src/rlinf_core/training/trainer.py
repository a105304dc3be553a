"""Core's trainer: a run from opening the data to the last checkpoint, in order of execution.

The optimizer step is the reference's (`training.state.optim`), sharding is applied from outside
(`training.state.fsdp`), and policies and datasets are known only through their protocols.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

from rlinf_core.contract.process_group import ProcessGroup
from rlinf_core.contract.run import LoadedPlugins, RunConfig, Start
from rlinf_core.data.storage import reopen
from rlinf_core.errors import Interrupted
from rlinf_core.process.watchdog import GRACE, enter, watchdog
from rlinf_core.training.checkpoint.load import load
from rlinf_core.training.checkpoint.manager import Checkpoints
from rlinf_core.training.checkpoint.state import Position, step_name
from rlinf_core.training.data import RunData, check_batching
from rlinf_core.training.evaluation import Evaluations, cut_back
from rlinf_core.training.first_batch import save_first_batch
from rlinf_core.training.monitor.errors import explain
from rlinf_core.training.monitor.monitor import Monitor
from rlinf_core.training.settings import Fsdp2Settings
from rlinf_core.training.state.build import build_state, open_weights
from rlinf_core.training.step import TrainStep
from rlinf_core.training.stopping import Best, StopSignal, compared_metric, seconds_from_now, stop_signals
from rlinf_core.training.topology import count_machines


class Fsdp2Trainer:
    """Fully sharded training of one policy on one dataset or on a mixture of several."""

    step_type: type[TrainStep] = TrainStep
    """What computes a step; a subclass may set another."""

    def __init__(
        self, run: RunConfig, config: Fsdp2Settings, *, start: Start, group: ProcessGroup, plugins: LoadedPlugins
    ) -> None:
        check_batching(run, group.size)
        machines = count_machines(group)
        self._sharding = config.describe_replicas(group.size, machines) if machines > 1 else ""
        config = config.placed(group.size, machines)
        enter("opening the data", group.rank)
        with group.first_on_each_machine():  # Data and weights may have to be downloaded.
            data = reopen(lambda: RunData.open(run, plugins))
            weights = None if start.checkpoint else open_weights(data.run)
        self.stop_step = data.stop_step  # Known before statistics, which take long: are there enough rows?
        if run.policy.normalization != "none" and not start.checkpoint:
            enter(f"statistics of {data.size} training rows", group.rank)
        checkpoint = start.checkpoint
        data = data.prepare(
            group, resuming=checkpoint is not None, checkpoint=checkpoint, allow_change=start.allow_change
        )
        self.run, self.step, self.data = data.run, start.step, data
        self._config, self._group = config, group
        self._evaluations = Evaluations.build(data.run, data.for_evaluators(group), group, plugins)
        # Fail now rather than at the first validation.
        self._compared = compared_metric(data.run, plugins) if self._evaluations.exist else None
        source = start.checkpoint or (run.policy.weights if weights is not None else "its initial values")
        enter(f"building the policy with {source}", group.rank)
        self._state = build_state(data.run, config, group, plugins, weights, filled=start.checkpoint is None)
        self._best, self._validated = Best(), 0
        if start.checkpoint:
            watchdog.enter(f"loading {start.checkpoint}")
            position = load(
                start.checkpoint, self._state.tensors(), self._position(), allow_other_rows=start.allow_change
            )
            self._best, self._validated = position.best, position.validated
        watchdog.enter("preparing the first step")
        self._checkpoints = Checkpoints.of(data.run, group, self._state.tensors(), start)
        self._loader = data.loader(group, self.step)
        batches: Any = self._loader.dataset
        self._monitor = Monitor(self, group, plugins, batches, self._state, stop_step=self.stop_step)
        self._monitor.measure(self._checkpoints.stall)
        self._compute = self.step_type.of(self, config, group, plugins, batches, self._state, self._monitor)
        if group.rank == 0:
            cut_back(data.run.folder, self.step)
            self._describe()
            if not start.checkpoint:
                self.data.save_coverage()
                save_first_batch(self.run, batches)

    @property
    def policy(self) -> Any:
        """The sharded policy."""
        return self._state.policy

    @property
    def optimizer(self) -> Any:
        """The policy's optimizer."""
        return self._state.optimizer

    @property
    def ema(self) -> Any:
        """The moving average of the policy's weights; None if `optim.ema_decay` is 0."""
        return self._state.ema

    def _describe(self) -> None:
        if self._sharding:
            self._monitor.log(f"sharding: {self._sharding}")
        for fact in self.data.facts():
            self._monitor.log(fact)
        for fact in self._state.adapters.facts(self.policy):
            self._monitor.log(fact)
        for warning in (*self.data.warnings, *self.data.still_cameras()):
            self._monitor.log(f"warning: {warning}")
        if self._state.compilation:
            self._monitor.log("the first step compiles the policy's blocks, which takes minutes")
        for fact in self.data.sample_facts():
            self._monitor.log(fact)

    def train(self) -> signal.Signals | None:
        """Run the remaining steps; validate and save as configured and after the last one.

        Returns:
            The signal that ended the run early, after saving; None if the run is finished.
        """
        error: BaseException | None = None
        try:
            self._monitor.start()
            with stop_signals() as stop, self._monitor.watching():
                received = self._train(stop)
                self._finish_saving(stop, received)
                if not received and not self._group.rank and (changed := self.data.images_changed()):
                    self._monitor.log(f"warning: image files changed while the run was reading them: {changed}")
            error = Interrupted(received, self.step) if received else None
        except BaseException as e:
            error = explain(e, self._monitor.recorder, self._config, self._group, self._state)
            with stop_signals():  # torchrun sends one when another rank failed; the pending save may still finish.
                self._abandon_saving(error)
            if error is e:
                raise
            raise error from e
        finally:
            self._end(error)
        return received

    def _end(self, error: BaseException | None) -> None:
        """Close evaluators and monitor; what fails to close does not replace the error that ended the run."""
        watchdog.enter("closing evaluators, loggers and plugins")
        try:
            self._evaluations.close()
        except Exception as another:
            if error is None:
                self._monitor.close(another)
                raise
            error.add_note(f"an evaluator could not be closed: {another}")
        self._monitor.close(error)

    def _train(self, stop: StopSignal) -> signal.Signals | None:
        runner = self.run.runner
        if self._validate_at_start(stop) or self._make_up_for_validation(stop):
            return self._agree_on(stop)
        batches = iter(self._loader)
        while self.step < self.stop_step and not self._should_stop_early():
            self._train_step(batches, stop)
            last = self.step == self.stop_step
            interval = bool(runner.save_interval) and self.step % runner.save_interval == 0
            stopping = stop.agreed(self._monitor.read(all_=last or interval or self._validation_is_due()))
            self._monitor.saved(self._checkpoints.finished())
            improved = False
            if not stopping and self._validation_is_due():
                improved, stopping = self._validate(stop)
                stop.agreed(stopping)
            if last or interval or stopping or improved or self._should_stop_early():
                self._monitor.read(all_=True)
                self._save(stop)
                stopping = stop.agreed(self._group.any(stop.received is not None))  # Perhaps during the save.
            if stopping and (self.step < self.stop_step or self._validation_is_due()):
                return self._agree_on(stop)
        if self._should_stop_early():
            self._monitor.log(f"step {self.step}: ends early, {self._best.stale} validations without improvement")
        return None

    def _train_step(self, batches: Iterator[Any], stop: StopSignal) -> None:
        """Start the next step; on CUDA the device may still be computing it on return."""
        times = self._monitor.before(self.step + 1)
        self._monitor.add(self._compute(self.step, batches, asked=lambda: stop.received is not None, times=times))
        self.step += 1

    def _validation_is_due(self) -> bool:
        interval = self.run.runner.val_check_interval
        due = self.step == self.stop_step or (interval > 0 and self.step % interval == 0)
        return self._evaluations.exist and due and self._validated < self.step

    def _validate_at_start(self, stop: StopSignal) -> bool:
        """Validate the initial weights if the run wants that; returns whether to stop."""
        return self.run.runner.val_at_start and not self.step and self._validate(stop)[1]

    def _make_up_for_validation(self, stop: StopSignal) -> bool:
        """Validate if the run was stopped before a validation that was due; returns whether to stop again."""
        if not self.step or not self._validation_is_due():
            return False
        _, stopping = self._validate(stop)
        if not stopping and self._group.rank == 0:
            self._checkpoints.restate(self._position(), self._best_name())
        return stopping

    def _validate(self, stop: StopSignal) -> tuple[bool, bool]:
        """Validate; returns whether to save the result as the best, and whether the run was asked to stop meanwhile."""

        def interrupted() -> bool:
            self._monitor.phase("validation")
            return self._group.any(stop.received is not None)

        self._compute.pause()
        due = self._evaluations.due(self.step, last=self.step == self.stop_step)
        if what := due.description:
            self._monitor.log(f"step {self.step}: validating {what} ...")
        report = due(self.policy, self.ema, self.step, interrupted)
        if report is None:
            return False, True
        self._validated = self.step
        if report.metrics:
            self._monitor.validated(self.step, report.metrics)
        for text in report.messages:
            self._monitor.log(f"step {self.step}: {text}")
        runner, metric = self.run.runner, self._compared
        # An evaluator may measure less often; and step 0 shows the initial weights, which nothing has trained.
        if metric and metric.name in report.metrics and self.step:
            self._best = self._best.after(self.step, metric, report.metrics[metric.name], runner.early_stop_min_delta)
        return runner.save_best and 0 < self._best.step == self.step, False

    def _should_stop_early(self) -> bool:
        runner = self.run.runner
        return self._best.should_stop_early(runner.best_metric, runner.early_stop_patience)

    def _agree_on(self, stop: StopSignal) -> signal.Signals:
        """The signal that stops the run, the same on every rank, even if only one rank received it."""
        interrupted = self._group.any(stop.received == signal.SIGINT)
        return signal.SIGINT if interrupted else signal.SIGTERM

    def _save(self, stop: StopSignal) -> None:
        self._monitor.phase("saving")
        self._compute.pause()
        try:
            self._checkpoints.save(self._position(), best=self._best_name(), left=stop.seconds_left)
        finally:
            self._monitor.saved(self._checkpoints.finished())

    def _finish_saving(self, stop: StopSignal, received: signal.Signals | None) -> None:
        """Wait for the pending save; a run that was asked to stop does so within the grace period (contract 10)."""
        try:
            in_time = self._checkpoints.finish(stop.seconds_left, cut_short=received is not None)
        finally:
            self._monitor.saved(self._checkpoints.finished())
        if not in_time:  # As after a failure: ranks no longer wait for one another.
            raise Interrupted(received or stop.received or signal.SIGTERM, self.step)

    def _abandon_saving(self, error: BaseException) -> None:
        """Give a pending save the chance to finish although training has failed."""
        try:
            self._checkpoints.finish(seconds_from_now(GRACE), cut_short=True)
        except Exception as another:  # Report the error that ended training; this one usually follows from it.
            error.add_note(f"the checkpoint that was being written is lost: {another}")
        self._monitor.saved(self._checkpoints.finished())

    def _best_name(self) -> str:
        return step_name(self._best.step) if self.run.runner.save_best and self._best.step else ""

    def _position(self) -> Position:
        return self.data.position(self.step, self._state, validated=self._validated, best=self._best)
