"""Every hook of rlinf_core, in the order in which a run calls them.

A plugin is a module with functions of these names, marked `@hookimpl` and named by an entry point in the group
`rlinf.plugins`. Arguments are passed by keyword, and an implementation may take a subset. Later releases may add
arguments but never remove any.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import torch
    from pydantic import BaseModel
    from torch import nn

    from rlinf_core.contract.augmentation import AugmentationConfig
    from rlinf_core.contract.command import Command
    from rlinf_core.contract.datasets import DatasetConfig, SampleSource, Split
    from rlinf_core.contract.environment import EnvironmentConfig
    from rlinf_core.contract.evaluation import EvaluatorConfig
    from rlinf_core.contract.optim import OptimizerConfig, ScheduleConfig
    from rlinf_core.contract.policy import PolicyConfig
    from rlinf_core.contract.run import LoggerConfig, RunConfig, Trainer, TrainerConfig
    from rlinf_core.contract.triage import TriageTest

PROJECT = "rlinf"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def rlinf_register_policies() -> Iterable[type[PolicyConfig]]:  # type: ignore[empty-body]
    """Offer policy configs; `[policy] type` selects among them.

    Returns:
        Config classes. All plugins' results are collected; the same `type` from two plugins is an error naming both.

    Called on: every rank, while the config is loaded. Since 0.1.
    """


@hookspec
def rlinf_register_augmentations() -> Iterable[type[AugmentationConfig]]:  # type: ignore[empty-body]
    """Offer camera augmentations; `policy.augmentations` selects among them by `type`, if the policy has that key.

    Returns:
        Config classes. All plugins' results are collected; the same `type` from two plugins is an error naming both.

    Called on: every rank, while a config that names an augmentation is loaded. Since 0.1.
    """


@hookspec
def rlinf_register_trainers() -> Iterable[type[TrainerConfig]]:  # type: ignore[empty-body]
    """Offer trainer configs; `[trainer] type` selects among them.

    Returns:
        Config classes. All plugins' results are collected; the same `type` from two plugins is an error naming both.

    Called on: every rank, while the config is loaded. Since 0.1.
    """


@hookspec
def rlinf_register_optimizers() -> Iterable[type[OptimizerConfig]]:  # type: ignore[empty-body]
    """Offer optimizers; `[optim] type` selects among them.

    Returns:
        Config classes. All plugins' results are collected; the same `type` from two plugins is an error naming both.

    Called on: every rank, while the config is loaded. Since 0.1.
    """


@hookspec
def rlinf_register_schedules() -> Iterable[type[ScheduleConfig]]:  # type: ignore[empty-body]
    """Offer learning-rate schedules; `[optim] schedule` selects among them.

    Returns:
        Config classes. All plugins' results are collected; the same `schedule` from two plugins is an error that names
        both.

    Called on: every rank, while the config is loaded. Since 0.1.
    """


@hookspec
def rlinf_register_loggers() -> Iterable[type[LoggerConfig]]:  # type: ignore[empty-body]
    """Offer loggers; `runner.loggers` selects among them by `type`, and `[loggers.<type>]` has their settings.

    Returns:
        Config classes. All plugins' results are collected; the same `type` from two plugins is an error naming both.

    Called on: every rank, while the config is loaded; only rank 0 builds them. Since 0.1.
    """


@hookspec
def rlinf_register_evaluators() -> Iterable[type[EvaluatorConfig]]:  # type: ignore[empty-body]
    """Offer evaluators, which measure the policy at every validation; `runner.evaluators` selects among them by `type`.

    Returns:
        Config classes. All plugins' results are collected; the same `type` from two plugins is an error naming both.

    Called on: every rank, while the config is loaded; every rank builds those of the run. Since 0.1.
    """


@hookspec
def rlinf_register_triage() -> Iterable[type[TriageTest]]:  # type: ignore[empty-body]
    """Offer tests of `rlinf triage`, which run after core's.

    Returns:
        Subclasses of `TriageTest`. All plugins' results are collected; the same `name` from two plugins is an error
        naming both.

    Called on: the process of `rlinf triage`. Since 0.1.
    """


@hookspec
def rlinf_register_environments() -> Iterable[type[EnvironmentConfig]]:  # type: ignore[empty-body]
    """Offer simulators; `rlinf eval --env` and the table `[evaluators.simulator]` select among them by `type`.

    Returns:
        Config classes. All plugins' results are collected; the same `type` from two plugins is an error naming both.

    Called on: every rank, while a config that names an environment is loaded, and by `rlinf eval --env`. Since 0.1.
    """


@hookspec
def rlinf_register_commands() -> Iterable[Command]:  # type: ignore[empty-body]
    """Offer subcommands of `rlinf`.

    Returns:
        Commands; each names a module, which is imported when the command is called. All plugins' results are collected;
        calling a name that two plugins registered is an error that names both. Core's own commands, which its own
        plugin registers, take precedence.

    Called on: the `rlinf` process, for help or for a command that is not core's. Since 0.1.
    """


@hookspec
def rlinf_register_options() -> Mapping[str, type[BaseModel]]:  # type: ignore[empty-body]
    """Offer config tables for a plugin's own settings.

    Returns:
        Name -> pydantic class. The class validates the table `[plugins.<name>]`, and `run.plugin_options(cls)` returns
        the result. It must forbid extra keys and give every field a default. All plugins' results are collected; the
        same name from two plugins is an error that names both if the config has that table.

    Called on: every rank, while the config is loaded. Since 0.1.
    """


@hookspec
def rlinf_configure(run: RunConfig) -> None:
    """Validate the complete config before anything is built; raise `UserError` to reject it.

    Args:
        run: The frozen config of the run.

    Called on: every rank, once; also by `rlinf validate` and `rlinf launch`, before there are ranks. Since 0.1.
    """


@hookspec
def rlinf_launcher_names() -> Sequence[str]:  # type: ignore[empty-body]
    """Name the values of `cluster.launcher` that this plugin's `rlinf_launch` knows, so that others are refused early.

    Without it, no config can be checked for a misspelt launcher while the plugin is installed.

    Returns:
        The names.

    Called on: the single process of `rlinf validate`, and of `rlinf launch` if nothing has started. Since 0.1.
    """


@hookspec(firstresult=True)
def rlinf_launch(run: RunConfig, arguments: Sequence[str]) -> int | None:
    """Start the processes of a run where `run.cluster` places them, and wait for them.

    Args:
        run: The frozen config; `run.cluster.launcher` names the launcher to use.
        arguments: Command line of `rlinf_core.train` for each process: the config's path, `key=value` overrides,
            options.

    Returns:
        The exit code of the run, or None if the config names another launcher. The first result counts.

    Called on: the single process of `rlinf launch`, never under torchrun. Since 0.1.
    """


@hookspec(firstresult=True)
def rlinf_describe_launch(run: RunConfig, arguments: Sequence[str]) -> str | None:
    """Describe what `rlinf_launch` would do, for `rlinf launch --dry-run`: the command to start by hand, a batch file.

    Args:
        run: The frozen config; `run.cluster.launcher` names the launcher to use.
        arguments: Command line of `rlinf_core.train` for each process.

    Returns:
        What to print, or None if the config names another launcher. The first result counts.

    Called on: the single process of `rlinf launch --dry-run`. Since 0.1.
    """


@hookspec(firstresult=True)
def rlinf_open_dataset(dataset: DatasetConfig, policy: PolicyConfig, split: Split) -> SampleSource | None:
    """Open the rows of a dataset.

    Args:
        dataset: The `[data]` section, already validated.
        policy: `policy.chunk_length()` is the number of actions in a chunk.
        split: `"train"` or `"validation"`; only the latter contains the held-out episodes.

    Returns:
        The rows, or None to leave the dataset to another plugin. The first result counts.

    Called on: every rank, once per split; also by `rlinf validate`. Since 0.1.
    """


@hookspec
def rlinf_policy_built(policy: nn.Module, run: RunConfig) -> None:
    """Change the model before it has weights: freeze parameters, replace layers, add adapters.

    Parameters that the policy has keep their names. Those that are added belong to a module that gives them initial
    values, an `rlinf_core.Adapter`; the page on weights has an example.

    Args:
        policy: The whole unsharded model on the meta device. Modules that are made here are on it, too.
        run: The frozen config of the run.

    Called on: every rank, once, before sharding; also by `rlinf plan` and `rlinf export`, and to count operations, each
    time with a model of its own. Since 0.1.
    """


@hookspec
def rlinf_train_started(trainer: Trainer) -> None:
    """Receive the trainer just before the first step, with its weights and position loaded; an exception ends the run.

    Args:
        trainer: The trainer; its `run` is the config, its `step` the number of finished steps.

    Called on: every rank, once. Since 0.1.
    """


@hookspec
def rlinf_gradients_ready(
    trainer: Trainer, policy: nn.Module, step: int, scale: torch.Tensor
) -> Mapping[str, torch.Tensor | float] | None:
    """Read or change the gradients after a step's last backward pass, before they are clipped and applied.

    The stored gradients are sums over micro batches; with FSDP2 they are averaged over the ranks, and each rank holds
    its shard of them, as a DTensor. A parameter that is frozen or that the loss does not depend on has none. They may
    contain NaN or infinity, in which case the step is skipped afterwards.

    Args:
        trainer: The trainer; its `step` is the number of finished steps.
        policy: The sharded module; read `parameter.grad`, and change it in place.
        step: Number of the step, from 1.
        scale: Scalar on the gradients' device. `parameter.grad * scale` is the gradient of the step's mean loss, the
            one whose global norm is reported and clipped.

    Returns:
        Metrics of the step, name -> value, or None. A value is a number or a tensor with one element, on the device:
        it is read with the step's other metrics, so that the device is not waited for. DTensors are reduced over the
        ranks; of others, rank 0's are reported. Every rank must return the same names, and none that is taken.

    Called on: every rank, in every step; an exception ends the run. Since 0.1.
    """


@hookspec
def rlinf_step_metrics(trainer: Trainer, step: int, metrics: Mapping[str, float]) -> Mapping[str, float] | None:
    """Add metrics to those of an optimizer step before loggers and observers receive them.

    Args:
        trainer: The trainer; on a GPU it may already be one step ahead.
        step: Number of the step, from 1.
        metrics: Those of `rlinf_step_finished`, and those of implementations called before. Read-only.

    Returns:
        Further metrics, name -> number, or None. An implementation that raises, or returns a name that is taken, is
        left out of the rest of the run, with one warning.

    Called on: rank 0, after every step. Since 0.1.
    """


@hookspec
def rlinf_step_finished(trainer: Trainer, step: int, metrics: Mapping[str, float]) -> None:
    """Receive the metrics of an optimizer step. An implementation that raises is left out of the rest of the run.

    Args:
        trainer: The trainer; on a GPU it may already be one step ahead.
        step: Number of the step, from 1.
        metrics: From core's trainer: `loss`, `lr`, `grad_norm` (before clipping), `skipped` (1 if loss or gradient was
            not finite), `epoch`, `step_seconds`, `samples_per_second`, the fractions of the step's time (0-1)
            `data_wait_share`, `forward_share`, `backward_share` and `optimizer_share`, `peak_memory_gb`, and the
            policy's own metrics. Other trainers report their own.

    Called on: rank 0, after every step. Since 0.1.
    """


@hookspec
def rlinf_validation_finished(trainer: Trainer, step: int, metrics: Mapping[str, float]) -> None:
    """Receive the metrics of a validation. An implementation that raises is left out of the rest of the run.

    Args:
        trainer: The trainer.
        step: Number of finished steps.
        metrics: `val_loss`, and `val_<name>` for each of the policy's `validation_metrics`; for policies with actions
            `val_action_mse`, `val_action_mse_mean` and `val_action_mse_repeat` (the data's units, squared); the same
            names prefixed with `ema_` if the run averages weights; and those of the run's other evaluators.

    Called on: rank 0. Since 0.1.
    """


@hookspec
def rlinf_checkpoint_saved(trainer: Trainer, step: int, path: Path) -> None:
    """Receive a checkpoint that is complete on disk, which may be some steps after the save began.

    An implementation that raises is left out of the rest of the run: one that uploads should handle what may pass.

    Args:
        trainer: The trainer.
        step: Number of finished steps when the save began.
        path: The checkpoint's folder.

    Called on: rank 0. Since 0.1.
    """


@hookspec
def rlinf_train_finished(trainer: Trainer, error: BaseException | None) -> None:
    """Handle the end of the run. An implementation that raises is warned of, and does not change the exit code.

    Args:
        trainer: The trainer.
        error: What ended the run (a `KeyboardInterrupt` after a signal), or None if all steps are done.

    Called on: every rank, once. Since 0.1.
    """
