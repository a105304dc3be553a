"""Core's trainer: the run from open data to the last checkpoint, in the order in which it happens.

The optimizer step is the reference's (`training.optim`), sharding is applied from outside (`training.fsdp`), and
nothing here knows a policy or a dataset beyond the protocols.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from rlinf_core.config.fsdp2 import Fsdp2TrainerConfig
from rlinf_core.config.run import RunConfig
from rlinf_core.data.loader import build_train_loader
from rlinf_core.data.order import check_batch, steps_per_epoch
from rlinf_core.data.pipeline import build_pipeline
from rlinf_core.datasets import SampleSource, Split
from rlinf_core.errors import UserError
from rlinf_core.evaluate import Validation
from rlinf_core.plugins import Plugins
from rlinf_core.policy import PolicyOutput, WeightSource
from rlinf_core.training import checkpoint
from rlinf_core.training.distributed import Processes, to_device
from rlinf_core.training.fsdp import derived_seed, layout, materialize, shard
from rlinf_core.training.optim import Optimizer, Schedule
from rlinf_core.training.resume import Start
from rlinf_core.training.statistics import run_statistics

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Fsdp2Trainer:
    """Fully sharded training of one policy on one dataset."""

    def __init__(
        self, run: RunConfig, config: Fsdp2TrainerConfig, *, start: Start, group: Processes, plugins: Plugins
    ) -> None:
        self.run = run
        self.step = start.step
        self._config, self._group, self._plugins = config, group, plugins
        self._micro_batches = check_batch(config.global_batch_size, config.micro_batch_size, group.size)
        with group.first_on_each_machine():  # It may have to download.
            self.source = open_split(run, plugins, "train")
        self._steps_per_epoch = steps_per_epoch(len(self.source), config.global_batch_size)
        weights = open_weights(run)
        stats = run_statistics(run, self.source, group, resuming=start.checkpoint is not None)
        self.pipeline = build_pipeline(run.data, run.policy, stats)
        self._validation = self._open_validation()
        self.policy = build_policy(run, config, group, plugins, weights)
        self.optimizer = self._build_optimizer()
        if start.checkpoint:
            tag = layout(self.policy.named_parameters())
            checkpoint.load(start.checkpoint, self._tensors(), layout=tag, rows=len(self.source))
        self._loggers = self._build_loggers(start.step)

    def train(self) -> None:
        """Run the remaining steps; validate and save as configured and after the last one."""
        error: BaseException | None = None
        try:
            self._plugins.hook.rlinf_train_started(trainer=self)
            self._train()
        except BaseException as e:
            error = e
            raise
        finally:
            with contextlib.ExitStack() as ending:  # All are told, even if one of them fails.
                ending.callback(self._plugins.hook.rlinf_train_finished, trainer=self, error=error)
                for logger in self._loggers:
                    ending.callback(logger.close, error)

    def _train(self) -> None:
        runner = self.run.runner
        batches = iter(self._open_loader())
        while self.step < runner.max_steps:
            metrics = self._train_step(batches)
            self.step += 1
            self._report("step", metrics)
            last = self.step == runner.max_steps
            if self._validation and (last or self.step % runner.val_check_interval == 0):
                self._report("validation", self._validation(self.policy))
            if last or (runner.save_interval and self.step % runner.save_interval == 0):
                self._save()

    def _train_step(self, batches: Iterator[Any]) -> dict[str, float]:
        """One optimizer step over the global batch; returns its metrics."""
        started, waited = time.perf_counter(), 0.0
        self.policy.train()
        totals: torch.Tensor | None = None
        names: list[str] = []
        for micro in range(self._micro_batches):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            # Modules with randomness of their own (dropout) draw the same numbers after a resume.
            torch.manual_seed(derived_seed(self.run.seed, self.step, self._group.rank, micro))
            out: PolicyOutput = self.policy(to_device(batch, self._group.device))
            torch.autograd.backward(out.loss_sum)
            names = sorted(out.metrics)
            sums = torch.stack([out.loss_sum.detach(), out.weight, *(out.metrics[name] for name in names)])
            totals = sums if totals is None else totals + sums
        assert totals is not None
        totals = self._group.sum(totals)
        # FSDP stored the mean over ranks of the gradients of each rank's sum; the loss is sum / weight (contract 4).
        result = self.optimizer.step(divisor=totals[1] / self._group.size)
        means = totals / totals[1]
        values = torch.stack([means[0], result.lr, result.grad_norm, result.skipped, *means[2:]]).tolist()
        seconds = time.perf_counter() - started
        return dict(zip(["loss", "lr", "grad_norm", "skipped", *names], values, strict=True)) | {
            "samples_per_second": self._config.global_batch_size / seconds,
            "data_wait_share": waited / seconds,
            "epoch": (self.step + 1) / self._steps_per_epoch,
        }

    def _report(self, kind: str, metrics: Mapping[str, float]) -> None:
        """Tell loggers and observers; rank 0 only."""
        if self._group.rank != 0:
            return
        for logger in self._loggers:
            (logger.step if kind == "step" else logger.validation)(self.step, metrics)
        hook = self._plugins.hook
        notify = hook.rlinf_step_finished if kind == "step" else hook.rlinf_validation_finished
        notify(trainer=self, step=self.step, metrics=metrics)

    def _save(self) -> None:
        position = checkpoint.Position(
            step=self.step,
            epoch=self.step // self._steps_per_epoch,
            sample=self.step % self._steps_per_epoch * self._config.global_batch_size,
            rows=len(self.source),
            seed=self.run.seed,
            layout=layout(self.policy.named_parameters()),
        )
        path = checkpoint.save(
            self.run.folder, position, self._tensors(), self._group, keep_last=self.run.runner.keep_last
        )
        if self._group.rank == 0:
            for logger in self._loggers:
                logger.message(f"step {self.step}: saved {path}")
            self._plugins.hook.rlinf_checkpoint_saved(trainer=self, step=self.step, path=path)

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Everything a checkpoint holds, in place."""
        model = {f"model.{name}": parameter.detach() for name, parameter in self.policy.named_parameters()}
        return model | {f"optim.{name}": tensor for name, tensor in self.optimizer.state_dict().items()}

    def _open_loader(self) -> Any:
        return build_train_loader(
            self.source,
            self.pipeline,
            self.run.policy,
            seed=self.run.seed,
            global_batch_size=self._config.global_batch_size,
            micro_batch_size=self._config.micro_batch_size,
            rank=self._group.rank,
            world_size=self._group.size,
            start_step=self.step,
            stop_step=self.run.runner.max_steps,
            num_workers=self.run.data.num_workers,
            pin_memory=self._group.device.type == "cuda",
        )

    def _open_validation(self) -> Validation | None:
        if not self.run.runner.val_check_interval:
            return None
        held_out = open_split(self.run, self._plugins, "validation")
        return Validation(self.run, self.pipeline, held_out, self.source, self._group)

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

    def _build_loggers(self, start_step: int) -> list[Any]:
        if self._group.rank != 0:
            return []
        names = dict.fromkeys(("jsonl", "console", *self.run.runner.loggers))
        stop_step = self.run.runner.max_steps
        configs = [self._plugins.logger(name)(type=name) for name in names]
        return [config.build(self.run, start_step=start_step, stop_step=stop_step) for config in configs]


def open_split(run: RunConfig, plugins: Plugins, split: Split) -> SampleSource:
    """The rows of a split, from the plugin that knows the dataset."""
    source: SampleSource | None = plugins.hook.rlinf_open_dataset(dataset=run.data, policy=run.policy, split=split)
    if source is None:
        raise UserError(
            f"No installed plugin opens the dataset {run.data.config_name!r} ({type(run.data).__name__}): "
            "its config must derive from LeRobotDatasetConfig, or a plugin must implement rlinf_open_dataset."
        )
    return source


def open_weights(run: RunConfig) -> WeightSource | None:
    """The pretrained weights to start from; None: from the policy's initial values."""
    return run.policy.open_weights() if run.policy.weights not in ("", "random") else None


def build_policy(
    run: RunConfig, config: Fsdp2TrainerConfig, group: Processes, plugins: Plugins, weights: WeightSource | None
) -> Any:
    """Build on the meta device, let plugins change it, shard it, and give it its weights (initial or pretrained)."""
    with torch.device("meta"):
        policy: Any = run.policy.build()
    plugins.hook.rlinf_policy_built(policy=policy, run=run)
    shapes = {name: tuple(parameter.shape) for name, parameter in policy.named_parameters()}
    if unfilled := sorted(policy.state_dict().keys() - dict(policy.named_parameters(remove_duplicate=False)).keys()):
        raise UserError(
            f"the policy {run.policy.type!r} has buffers that checkpoints would have to hold: {', '.join(unfilled)}. "
            "Register them with persistent=False and fill them in rebuild_buffers, or make them parameters"
        )
    if weights is not None:
        weights.check(shapes)
    shard(
        policy,
        group.mesh(),
        compute_dtype=DTYPES[config.param_dtype],
        reshard_after_forward=config.reshard_after_forward,
        min_unit_size=config.min_unit_size,
    )

    def value(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if weights is not None:
            return weights.tensor(name)
        generator = torch.Generator().manual_seed(derived_seed(run.seed, run.policy.published_name(name)))
        initial: torch.Tensor = policy.initial_value(name, shape, generator)
        return initial

    materialize(policy, group.device, value)
    return policy
