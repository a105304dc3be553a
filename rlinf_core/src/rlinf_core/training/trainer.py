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

from rlinf_core.config.fsdp2 import Fsdp2TrainerConfig
from rlinf_core.config.run import RunConfig
from rlinf_core.data.chunked import check_streams, chunks_of
from rlinf_core.data.loader import build_train_loader
from rlinf_core.data.micro_batches import SOURCE
from rlinf_core.data.order import check_batch, steps_per_epoch
from rlinf_core.errors import Interrupted
from rlinf_core.plugins import Plugins
from rlinf_core.policy import PolicyOutput
from rlinf_core.training import sources
from rlinf_core.training.build import build_policy, open_weights
from rlinf_core.training.checkpoint import Checkpoints, load
from rlinf_core.training.distributed import Processes, to_device
from rlinf_core.training.ema import Ema
from rlinf_core.training.fsdp import communicate, derived_seed, layout
from rlinf_core.training.metrics import StepClock, peak_memory_gb
from rlinf_core.training.optim import Optimizer, Schedule
from rlinf_core.training.position import Position, step_name
from rlinf_core.training.resume import Start
from rlinf_core.training.stopping import GRACE, Best, StopSignal, best_metric, stop_signals
from rlinf_core.training.validations import open_validation


class Fsdp2Trainer:
    """Fully sharded training of one policy on one dataset or a mixture of several."""

    def __init__(
        self, run: RunConfig, config: Fsdp2TrainerConfig, *, start: Start, group: Processes, plugins: Plugins
    ) -> None:
        self.run = run
        self.step = start.step
        self._config, self._group, self._plugins = config, group, plugins
        config.check_ranks(group.size)
        self._micro_batches = check_batch(config.global_batch_size, config.micro_batch_size, group.size)
        check_streams(chunks_of(run.data), group.size)
        with group.first_on_each_machine():  # They may have to be downloaded.
            rows = sources.open_training_rows(run, plugins)
            weights = None if start.checkpoint else open_weights(run)
        self._rows, self._data = sum(map(len, rows)), sources.made_of(run, rows)
        self._steps_per_epoch = steps_per_epoch(self._rows, config.global_batch_size)
        self.stop_step = run.runner.stop_step(self._steps_per_epoch)
        self.sources, warnings = sources.build_sources(run, rows, group, resuming=start.checkpoint is not None)
        held_out = sources.open_held_out_rows(run, plugins)
        self._validation = open_validation(run, self.sources, held_out, group)
        self.policy = build_policy(run, config, group, plugins, weights, filled=start.checkpoint is None)
        self.optimizer = self._build_optimizer()
        self.ema = self._build_ema()
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
        for fact in sources.describe_splits_of(run, self.sources, held_out):
            self._tell(fact)
        for warning in warnings:
            self._tell(f"warning: {warning}")
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
            with stop_signals() as stop:
                received = self._train(stop)
                self._finish_saving(stop, received)
            error = Interrupted(received, self.step) if received else None
        except BaseException as e:
            error = e
            self._abandon_saving(e)
            raise
        finally:
            with contextlib.ExitStack() as ending:  # All are told, even if one of them fails.
                ending.callback(self._plugins.hook.rlinf_train_finished, trainer=self, error=error)
                for logger in self._loggers:
                    ending.callback(logger.close, error)
        return received

    def _train(self, stop: StopSignal) -> signal.Signals | None:
        runner = self.run.runner
        if self._make_up_for_validation(stop):
            return self._agree_on(stop)
        batches, first_here = iter(self._open_loader()), True
        while self.step < self.stop_step and not self._improves_no_more():
            metrics, stopping = self._train_step(batches, stop)
            self.step += 1
            self._report("step", metrics | self._checkpoints.stall())
            self._tell_saved()
            if first_here and (missing := sources.missing_losses(self.sources, metrics)):
                self._tell(missing)
            first_here = False
            last = self.step == self.stop_step
            improved = False
            if not stopping and self._validation_is_due():
                improved, stopping = self._validate(stop)
            interval = runner.save_interval and self.step % runner.save_interval == 0
            if last or interval or stopping or improved or self._improves_no_more():
                self._save()
                stopping = self._group.any(stop.received is not None)  # Saving takes time, too.
            if stopping and (self.step < self.stop_step or self._validation_is_due()):
                return self._agree_on(stop)
        if self._improves_no_more():
            self._tell(f"step {self.step}: ends early, {self._best.stale} validations without improvement")
        return None

    def _train_step(self, batches: Iterator[Any], stop: StopSignal) -> tuple[dict[str, float], bool]:
        """One optimizer step over the global batch: its metrics, and whether any rank was asked to stop."""
        clock = StepClock(self._group.device)
        self.policy.train()
        totals: torch.Tensor | None = None
        names: list[str] = []
        for micro in range(self._micro_batches):
            self._say_what_to_send(last=micro + 1 == self._micro_batches)
            with clock.time("data_wait"):
                batch = next(batches)
            # Modules with randomness of their own (dropout) draw the same numbers after a resume.
            torch.manual_seed(derived_seed(self.run.seed, self.step, self._group.rank, micro))
            with clock.time("forward"):
                batch = to_device(batch, self._group.device)
                numbers = batch.pop(SOURCE, None)  # The loader's, not the policy's.
                out: PolicyOutput = self.policy(batch)
            with clock.time("backward"):
                torch.autograd.backward(out.loss_sum)
            names = sorted(out.metrics)
            sums = torch.stack([out.loss_sum.detach(), out.weight, *(out.metrics[name] for name in names)])
            if numbers is not None:
                sums = torch.cat([sums, sources.source_sums(out, numbers, len(self.sources))])
            totals = sums if totals is None else totals + sums
        assert totals is not None
        # The request to stop travels with the sums: ranks agree on it without communicating more than they do anyway.
        asked = totals.new_full((1,), float(stop.received is not None))
        with clock.time("optimizer"):
            totals = self._group.sum(torch.cat([totals, asked]))
            # FSDP stored the mean over ranks of each rank's gradients; the loss is sum / weight (contract 4).
            result = self.optimizer.step(divisor=totals[1] / self._group.size)
            if self.ema:
                self.ema.update(result.skipped)
        optimizer = torch.stack([result.lr, result.grad_norm, result.skipped]).to(totals.device)
        own, by_source = totals[2 : 2 + len(names)], totals[2 + len(names) :]  # Which ends with `asked`.
        values = torch.cat([totals[:1] / totals[1], optimizer, own / totals[1], by_source]).tolist()
        keys = ["loss", "lr", "grad_norm", "skipped", *names]
        metrics = dict(zip(keys, values, strict=False)) | sources.source_losses(self.sources, values[len(keys) : -1])
        metrics |= clock.read(self._config.global_batch_size)
        metrics["peak_memory_gb"] = peak_memory_gb(self._group.device)
        metrics["epoch"] = (self.step + 1) / self._steps_per_epoch
        return metrics, values[-1] > 0

    def _say_what_to_send(self, *, last: bool) -> None:
        if self._micro_batches > 1:
            communicate(
                self.policy,
                last=last,
                reduce_every_micro_batch=self._config.reduce_every_micro_batch,
                reshard=self._config.reshard_after_forward,
            )

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
        results = self._validation(self.policy, self.ema, lambda: self._group.any(stop.received is not None))
        if results is None:
            return False, True
        self._validated = self.step
        self._report("validation", results)
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

    def _report(self, kind: str, metrics: Mapping[str, float]) -> None:
        """Tell loggers and observers; rank 0 only."""
        if self._group.rank != 0:
            return
        for logger in self._loggers:
            (logger.step if kind == "step" else logger.validation)(self.step, metrics)
        hook = self._plugins.hook
        notify = hook.rlinf_step_finished if kind == "step" else hook.rlinf_validation_finished
        notify(trainer=self, step=self.step, metrics=metrics)

    def _tell(self, text: str) -> None:
        for logger in self._loggers:
            logger.message(text)

    def _save(self) -> None:
        try:
            self._checkpoints.save(self._position(), best=self._best_name())
        finally:
            self._tell_saved()

    def _finish_saving(self, stop: StopSignal, received: signal.Signals | None) -> None:
        """Wait for what is being written; a run that was asked to leave does so in time (contract 10)."""
        try:
            self._checkpoints.finish(stop.seconds_left if received else None)
        finally:
            self._tell_saved()

    def _abandon_saving(self, error: BaseException) -> None:
        """Let a checkpoint that is being written become complete, though training has failed."""
        try:
            self._checkpoints.finish(GRACE)
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
        )

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Everything a checkpoint holds, in place."""
        parts: dict[str, Mapping[str, torch.Tensor]] = {
            "model": {name: parameter.detach() for name, parameter in self._parameters.items()},
            "optim": self.optimizer.state_dict(),
            "ema": self.ema.state_dict() if self.ema else {},
        }
        return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def _open_loader(self) -> Any:
        return build_train_loader(
            self.sources,
            self.run.policy,
            seed=self.run.seed,
            global_batch_size=self._config.global_batch_size,
            micro_batch_size=self._config.micro_batch_size,
            rank=self._group.rank,
            world_size=self._group.size,
            start_step=self.step,
            stop_step=self.stop_step,
            num_workers=self.run.data.num_workers,
            pin_memory=self._group.device.type == "cuda",
            chunks=chunks_of(self.run.data),
        )

    def _build_optimizer(self) -> Optimizer:
        optim = self.run.optim
        return Optimizer(
            self.policy.named_parameters(),
            Schedule(optim.lr, optim.min_lr, optim.warmup_steps, optim.decay_steps),
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            clip_grad=optim.clip_grad,
        )

    def _build_ema(self) -> Ema | None:
        decay, device = self.run.optim.ema_decay, self._config.ema_device
        return Ema(self.policy, decay, torch.device("cpu") if device == "cpu" else None) if decay else None
