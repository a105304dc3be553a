"""Core's trainer: the run from open data to the last checkpoint, in the order in which it happens.

The optimizer step is the reference's (`training.optim`), sharding is applied from outside (`training.fsdp`), and
nothing here knows a policy or a dataset beyond the protocols.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from rlinf_core.contract.process_group import ProcessGroup
from rlinf_core.contract.run import LoadedPlugins, RunConfig, Start
from rlinf_core.data.loading.chunked_sampling import check_streams, chunks_of
from rlinf_core.data.loading.sampling import check_batch, steps_per_epoch
from rlinf_core.errors import Interrupted
from rlinf_core.training import data as sources
from rlinf_core.training.build import build_ema, build_optimizer, build_policy, open_weights
from rlinf_core.training.checkpoint.load import load
from rlinf_core.training.checkpoint.manager import Checkpoints
from rlinf_core.training.checkpoint.state import Position, step_name
from rlinf_core.training.evaluation import open_validation
from rlinf_core.training.fsdp import layout
from rlinf_core.training.monitor.anomalies import Guard, read_history
from rlinf_core.training.monitor.errors import in_words
from rlinf_core.training.monitor.flight_recorder import Watch
from rlinf_core.training.monitor.metrics import Throughput
from rlinf_core.training.monitor.profiling import Profile
from rlinf_core.training.monitor.reports import StepReports
from rlinf_core.training.monitor.stragglers import Stragglers
from rlinf_core.training.settings import Fsdp2Settings
from rlinf_core.training.step import StepRecord, TrainStep
from rlinf_core.training.stopping import GRACE, Best, StopSignal, best_metric, seconds_from_now, stop_signals


class Fsdp2Trainer:
    """Fully sharded training of one policy on one dataset or a mixture of several."""

    def __init__(
        self, run: RunConfig, config: Fsdp2Settings, *, start: Start, group: ProcessGroup, plugins: LoadedPlugins
    ) -> None:
        self.step = start.step
        self._config, self._group, self._plugins = config, group, plugins
        config.check_ranks(group.size)
        check_batch(config.global_batch_size, config.micro_batch_size, group.size)
        check_streams(chunks_of(run.data), group.size)
        with group.first_on_each_machine():  # They may have to be downloaded.
            rows = sources.open_training_rows(run, plugins)
            run, self._data_layout = sources.know_data(run, plugins)
            weights = None if start.checkpoint else open_weights(run)
        self.run = run
        self._rows, self._data = sum(map(len, rows)), sources.made_of(run, rows)
        self._steps_per_epoch = steps_per_epoch(self._rows, config.global_batch_size)
        self.stop_step = run.runner.stop_step(self._steps_per_epoch)
        self.sources, warnings = sources.build_sources(run, rows, group, resuming=start.checkpoint is not None)
        held_out = sources.open_held_out_rows(run, plugins)
        self._validation = open_validation(run, self.sources, held_out, group)
        self.policy = build_policy(run, config, group, plugins, weights, filled=start.checkpoint is None)
        self.optimizer = build_optimizer(run, self.policy)
        self.ema = build_ema(run, config, self.policy)
        # Taken now: while parameters are gathered, the policy shows those instead, in the compute dtype.
        self._parameters = dict(self.policy.named_parameters())
        self._layout = layout(self._parameters.items())
        self._best, self._validated = Best(), 0
        if start.checkpoint:
            position = load(start.checkpoint, self._tensors(), self._position())
            self._best, self._validated = position.best, position.validated
        self._checkpoints = Checkpoints.of(run, group, self._tensors(), start)
        first = group.rank == 0
        self._loggers = plugins.build_loggers(run, start_step=start.step, stop_step=self.stop_step) if first else []
        for fact in sources.describe_splits_of(run, self.sources, held_out) if first else ():
            self._tell(fact)
        for warning in warnings:
            self._tell(f"warning: {warning}")
        on_cuda = group.device.type == "cuda"
        self._watch = Watch(run.folder, group.rank, run.trainer.timeout_seconds, beside_nccl=on_cuda)
        self._profile = Profile(run.folder, run.runner.profile if first else (), group.device, self._tell)
        self._stragglers = Stragglers(group)
        self._loader = sources.open_loader(run, self.sources, group, self.step, self.stop_step)
        throughput = Throughput(run, self.policy, group, self._tell)
        self._compute = TrainStep(
            run,
            config,
            group,
            self._loader.dataset,
            policy=self.policy,
            optimizer=self.optimizer,
            ema=self.ema,
            watch=self._watch,
            throughput=throughput,
        )
        self._reports = StepReports(
            run,
            group,
            self._loader.dataset,
            start_step=start.step,
            guard=Guard(run.runner, group.decide(lambda: read_history(run.folder, start.step))),
            stragglers=self._stragglers,
            watch=self._watch,
            throughput=throughput,
            tell=lambda step, metrics: self._report("step", step, {**metrics, **self._checkpoints.stall()}),
            say=self._tell,
        )
        if first:
            if config.compile:
                self._tell("the first step compiles the policy's blocks, which takes minutes")
            for fact in sources.describe_samples(run, self.sources):
                self._tell(fact)

    def train(self) -> signal.Signals | None:
        """Run the remaining steps; validate and save as configured and after the last one.

        Returns:
            The signal that ended the run early, after saving; None when it has come to its end.
        """
        error: BaseException | None = None
        try:
            self._plugins.hook.rlinf_train_started(trainer=self)
            self._group.wait()  # Some ranks read their weights longer than others may wait in a collective.
            with stop_signals() as stop, self._watch.watching():
                received = self._train(stop)
                self._finish_saving(stop, received)
            error = Interrupted(received, self.step) if received else None
        except BaseException as e:
            error = in_words(e, self._watch, self._config, self._group, self._parameters, self._tensors())
            with stop_signals():  # torchrun's, once another rank has ended: what is being written may still be saved.
                self._abandon_saving(error)
            if error is e:
                raise
            raise error from e
        finally:
            with contextlib.ExitStack() as ending:  # All are told, even if one of them fails.
                ending.callback(self._plugins.hook.rlinf_train_finished, trainer=self, error=error)
                for logger in self._loggers:
                    ending.callback(logger.close, error)
                ending.callback(self._profile.close)
                ending.callback(self._reports.read_what_is_left)
        return received

    def _train(self, stop: StopSignal) -> signal.Signals | None:
        runner = self.run.runner
        if self._make_up_for_validation(stop):
            return self._agree_on(stop)
        batches = iter(self._loader)
        while self.step < self.stop_step and not self._improves_no_more():
            self._profile.before(self.step + 1)
            self._reports.add(self._train_step(batches, stop))
            self.step += 1
            self._profile.after(self.step)
            last = self.step == self.stop_step
            interval = bool(runner.save_interval) and self.step % runner.save_interval == 0
            stopping = stop.agreed(self._reports.read(all_=last or interval or self._validation_is_due()))
            self._tell_saved()
            improved = False
            if not stopping and self._validation_is_due():
                improved, stopping = self._validate(stop)
                stop.agreed(stopping)
            if last or interval or stopping or improved or self._improves_no_more():
                self._reports.read(all_=True)
                self._save(stop)
                stopping = stop.agreed(self._group.any(stop.received is not None))  # Saving takes time, too.
            if stopping and (self.step < self.stop_step or self._validation_is_due()):
                return self._agree_on(stop)
        if self._improves_no_more():
            self._tell(f"step {self.step}: ends early, {self._best.stale} validations without improvement")
        return None

    def _train_step(self, batches: Iterator[Any], stop: StopSignal) -> StepRecord:
        """Compute the next step; on CUDA it is under way when this returns."""
        times = self._stragglers.own() if self._stragglers.due(self.step + 1) else None
        return self._compute(self.step, batches, asked=lambda: stop.received is not None, times=times)

    def _validation_is_due(self) -> bool:
        interval = self.run.runner.val_check_interval
        due = self.step == self.stop_step or (interval > 0 and self.step % interval == 0)
        return self._validation is not None and due and self._validated < self.step

    def _make_up_for_validation(self, stop: StopSignal) -> bool:
        """Validate if the run was stopped before it could; returns whether to stop again."""
        if not self.step or not self._validation_is_due():
            return False
        _, stopping = self._validate(stop)
        if not stopping and self._group.rank == 0:
            self._checkpoints.restate(self._position(), self._best_name())
        return stopping

    def _validate(self, stop: StopSignal) -> tuple[bool, bool]:
        """Validate, unless asked to stop meanwhile: whether the result is the best to be saved, and whether to stop."""
        assert self._validation is not None

        def interrupted() -> bool:
            self._watch.enter("validation")
            return self._group.any(stop.received is not None)

        self._compute.pause()
        results = self._validation(self.policy, self.ema, interrupted)
        if results is None:
            return False, True
        self._validated = self.step
        self._report("validation", self.step, results)
        for text in self._validation.demonstrate(self.policy):
            self._tell(f"step {self.step}: {text}")
        runner = self.run.runner
        metric = best_metric(runner.best_metric, results)
        self._best = self._best.after(self.step, metric, results[metric], runner.early_stop_min_delta)
        return runner.save_best and self._best.step == self.step, False

    def _improves_no_more(self) -> bool:
        runner = self.run.runner
        return self._best.improves_no_more(runner.best_metric, runner.early_stop_patience)

    def _agree_on(self, stop: StopSignal) -> signal.Signals:
        """The signal that stops the run on every rank, though it may have reached only one."""
        interrupted = self._group.any(stop.received == signal.SIGINT)
        return signal.SIGINT if interrupted else signal.SIGTERM

    def _report(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        """Tell loggers and observers; rank 0 only."""
        if self._group.rank != 0:
            return
        for logger in self._loggers:
            (logger.step if kind == "step" else logger.validation)(step, metrics)
        hook = self._plugins.hook
        notify = hook.rlinf_step_finished if kind == "step" else hook.rlinf_validation_finished
        notify(trainer=self, step=step, metrics=metrics)

    def _tell(self, text: str) -> None:
        for logger in self._loggers:
            logger.message(text)

    def _save(self, stop: StopSignal) -> None:
        self._watch.enter("saving")
        self._compute.pause()
        try:
            self._checkpoints.save(self._position(), best=self._best_name(), left=stop.seconds_left)
        finally:
            self._tell_saved()

    def _finish_saving(self, stop: StopSignal, received: signal.Signals | None) -> None:
        """Wait for what is being written; a run that was asked to leave does so in time (contract 10)."""
        try:
            in_time = self._checkpoints.finish(stop.seconds_left, cut_short=received is not None)
        finally:
            self._tell_saved()
        if not in_time:  # As for a failure: nobody waits for anybody any more.
            raise Interrupted(received or stop.received or signal.SIGTERM, self.step)

    def _abandon_saving(self, error: BaseException) -> None:
        """Let a checkpoint that is being written become complete, though training has failed."""
        try:
            self._checkpoints.finish(seconds_from_now(GRACE), cut_short=True)
        except Exception as another:  # What ended training is what to tell; this mostly follows from it.
            error.add_note(f"the checkpoint that was being written is lost: {another}")
        self._tell_saved()

    def _tell_saved(self) -> None:
        """Tell loggers and observers of checkpoints that have become complete, or have not."""
        for saved in self._checkpoints.finished():
            self._tell(str(saved))
            if self._group.rank == 0 and not saved.failure:
                self._plugins.hook.rlinf_checkpoint_saved(trainer=self, step=saved.step, path=saved.path)

    def _best_name(self) -> str:
        return step_name(self._best.step) if self.run.runner.save_best and self._best.step else ""

    def _position(self) -> Position:
        return Position(
            step=self.step,
            epoch=self.step // self._steps_per_epoch,
            sample=self.step % self._steps_per_epoch * self._config.global_batch_size,
            rows=self._rows,
            seed=self.run.seed,
            layout=self._layout,
            validated=self._validated,
            best=self._best,
            data=self._data,
            data_layout=self._data_layout,
        )

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Everything a checkpoint holds, in place."""
        parts: dict[str, Mapping[str, torch.Tensor]] = {
            "model": {name: parameter.detach() for name, parameter in self._parameters.items()},
            "optim": self.optimizer.state_dict(),
            "ema": self.ema.state_dict() if self.ema else {},
        }
        return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
