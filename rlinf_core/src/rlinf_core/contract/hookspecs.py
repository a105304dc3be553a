"""Every hook of rlinf_core, in the order in which a run calls them.

A plugin is a module with functions of these names, marked `@hookimpl` and named by an entry point in the group
`rlinf.plugins`. Arguments are passed by keyword; an implementation may take a subset; arguments are added, never
removed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from pydantic import BaseModel
    from torch import nn

    from rlinf_core.contract.command import Command
    from rlinf_core.contract.datasets import DatasetConfig, SampleSource, Split
    from rlinf_core.contract.policy import PolicyConfig
    from rlinf_core.contract.run import LoggerConfig, RunConfig, Trainer, TrainerConfig

PROJECT = "rlinf"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def rlinf_register_policies() -> Iterable[type[PolicyConfig]]:  # type: ignore[empty-body]
    """Offer policy configs; `[policy] type` selects among them.

    Returns:
        Config classes. All plugins' results are collected; one `type` from two plugins is an error that names both.

    Called on: every rank, while the config is loaded. Since 0.1.
    """


@hookspec
def rlinf_register_trainers() -> Iterable[type[TrainerConfig]]:  # type: ignore[empty-body]
    """Offer trainer configs; `[trainer] type` selects among them.

    Returns:
        Config classes. All plugins' results are collected; one `type` from two plugins is an error that names both.

    Called on: every rank, while the config is loaded. Since 0.1.
    """


@hookspec
def rlinf_register_loggers() -> Iterable[type[LoggerConfig]]:  # type: ignore[empty-body]
    """Offer loggers; `runner.loggers` selects among them by `type`.

    Returns:
        Config classes. All plugins' results are collected; one `type` from two plugins is an error that names both.

    Called on: every rank, while the config is loaded; only rank 0 builds them. Since 0.1.
    """


@hookspec
def rlinf_register_commands() -> Iterable[Command]:  # type: ignore[empty-body]
    """Offer subcommands of `rlinf`.

    Returns:
        Commands; each names a module that is imported when the command is called. All plugins' results are collected;
        one name from two plugins is an error that names both when it is called. Core's own names come first.

    Called on: the process of `rlinf`, when help or a command that is not core's is asked for. Since 0.1.
    """


@hookspec
def rlinf_register_options() -> Mapping[str, type[BaseModel]]:  # type: ignore[empty-body]
    """Offer tables of the config for a plugin's own settings.

    Returns:
        Name -> pydantic class; the class validates the table `[plugins.<name>]`, and `run.plugin_options(cls)` is the
        result. It forbids extra keys, and every field has a default. All plugins' results are collected; one name from
        two plugins is an error that names both when the config has such a table.

    Called on: every rank, while the config is loaded. Since 0.1.
    """


@hookspec
def rlinf_configure(run: RunConfig) -> None:
    """Look at the complete config before anything is built; raise `UserError` to refuse it.

    Args:
        run: The frozen config of the run.

    Called on: every rank, once; also by `rlinf validate` and `rlinf launch`, before there are ranks. Since 0.1.
    """


@hookspec(firstresult=True)
def rlinf_launch(run: RunConfig, arguments: Sequence[str]) -> int | None:
    """Start the processes of a run where `run.cluster` says, and wait for them.

    Args:
        run: The frozen config; `run.cluster.launcher` says who is meant.
        arguments: What each process runs `rlinf_core.train` with: the config's path, `key=value` overrides, options.

    Returns:
        The exit code of the run, or None if another launcher is meant. The first result counts.

    Called on: the one process of `rlinf launch`, never under torchrun. Since 0.1.
    """


@hookspec(firstresult=True)
def rlinf_open_dataset(dataset: DatasetConfig, policy: PolicyConfig, split: Split) -> SampleSource | None:
    """Open the rows of a dataset.

    Args:
        dataset: The `[data]` section, already validated.
        policy: Tells how many actions a chunk holds (`policy.chunk_length()`).
        split: `"train"` or `"validation"`: the held-out episodes are only in the latter.

    Returns:
        The rows, or None to leave the dataset to another plugin. The first result counts.

    Called on: every rank, once a split; also by `rlinf validate`. Since 0.1.
    """


@hookspec
def rlinf_policy_built(policy: nn.Module, run: RunConfig) -> None:
    """Change the model before it has weights: freeze parameters, replace layers.

    Args:
        policy: The whole unsharded model on the meta device.
        run: The frozen config of the run.

    Called on: every rank, once, before sharding. Since 0.1.
    """


@hookspec
def rlinf_train_started(trainer: Trainer) -> None:
    """Look at the trainer when weights and position are in place and the first step is next.

    Args:
        trainer: The trainer; `trainer.run` is the config, `trainer.step` the number of finished steps.

    Called on: every rank, once. Since 0.1.
    """


@hookspec
def rlinf_step_finished(trainer: Trainer, step: int, metrics: Mapping[str, float]) -> None:
    """Receive the metrics of an optimizer step.

    Args:
        trainer: The trainer; on a GPU it may be a step ahead.
        step: Number of the step, from 1.
        metrics: Of core's trainer: `loss`, `lr`, `grad_norm` (before clipping), `skipped` (1 if loss or gradient was
            not finite), `epoch`, `step_seconds`, `samples_per_second`, the shares of the step's time (0-1)
            `data_wait_share`, `forward_share`, `backward_share` and `optimizer_share`, `peak_memory_gb`, and what the
            policy adds. Another trainer reports its own.

    Called on: rank 0, after every step. Since 0.1.
    """


@hookspec
def rlinf_validation_finished(trainer: Trainer, step: int, metrics: Mapping[str, float]) -> None:
    """Receive the metrics of a validation.

    Args:
        trainer: The trainer.
        step: Number of finished steps.
        metrics: `val_loss`, and `val_<name>` of the policy's `validation_metrics`; for policies with actions
            `val_action_mse`, `val_action_mse_mean` and `val_action_mse_repeat` (the data's units, squared);
            `ema_val_loss` and so on where there are averaged weights.

    Called on: rank 0. Since 0.1.
    """


@hookspec
def rlinf_checkpoint_saved(trainer: Trainer, step: int, path: Path) -> None:
    """Learn that a checkpoint is complete on disk, which may be some steps after it was taken.

    Args:
        trainer: The trainer.
        step: Number of steps that were finished when it was taken.
        path: The folder of the checkpoint.

    Called on: rank 0. Since 0.1.
    """


@hookspec
def rlinf_train_finished(trainer: Trainer, error: BaseException | None) -> None:
    """Learn that the run has ended.

    Args:
        trainer: The trainer.
        error: What ended it (after a signal a `KeyboardInterrupt`), or None when it has come to its end.

    Called on: every rank, once. Since 0.1.
    """
