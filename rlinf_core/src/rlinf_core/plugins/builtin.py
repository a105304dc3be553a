"""Core's own plugin, found through its own entry point: the FSDP2 trainer, two optimizers, four schedules, the LeRobot
reader, an augmentation, two loggers, two evaluators, the commands, and the launchers torchrun and slurm.

Configs and readers are imported when a hook is called, so that loading the plugins is cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlinf_core.contract.command import Command
from rlinf_core.contract.hookspecs import hookimpl

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlinf_core.contract.augmentation import AugmentationConfig
    from rlinf_core.contract.datasets import DatasetConfig, SampleSource, Split
    from rlinf_core.contract.evaluation import EvaluatorConfig
    from rlinf_core.contract.optim import OptimizerConfig, ScheduleConfig
    from rlinf_core.contract.policy import PolicyConfig
    from rlinf_core.contract.run import LoggerConfig, RunConfig, TrainerConfig
    from rlinf_core.contract.triage import TriageTest


@hookimpl
def rlinf_register_augmentations() -> list[type[AugmentationConfig]]:
    """The augmentation `random_erasing`."""
    from rlinf_core.augmentations.random_erasing import RandomErasingConfig

    return [RandomErasingConfig]


@hookimpl
def rlinf_register_trainers() -> list[type[TrainerConfig]]:
    """The trainer `fsdp2`."""
    from rlinf_core.training.config import Fsdp2TrainerConfig

    return [Fsdp2TrainerConfig]


@hookimpl
def rlinf_register_optimizers() -> list[type[OptimizerConfig]]:
    """The optimizers `adamw` and `muon`."""
    from rlinf_core.contract.optim import AdamWConfig
    from rlinf_core.training.recipes import MuonConfig

    return [AdamWConfig, MuonConfig]


@hookimpl
def rlinf_register_schedules() -> list[type[ScheduleConfig]]:
    """The schedules `constant`, `cosine`, `hf_cosine` and `wsd`."""
    from rlinf_core.contract.optim import CosineConfig
    from rlinf_core.training.recipes import ConstantConfig, HfCosineConfig, WsdConfig

    return [ConstantConfig, CosineConfig, HfCosineConfig, WsdConfig]


@hookimpl
def rlinf_register_loggers() -> list[type[LoggerConfig]]:
    """The loggers `console` and `jsonl`."""
    from rlinf_core.loggers.console import ConsoleLoggerConfig
    from rlinf_core.loggers.jsonl import JsonlLoggerConfig

    return [ConsoleLoggerConfig, JsonlLoggerConfig]


@hookimpl
def rlinf_register_evaluators() -> list[type[EvaluatorConfig]]:
    """The evaluators `held_out` and `simulator`."""
    from rlinf_core.evaluators.held_out import HeldOutConfig
    from rlinf_core.evaluators.simulator import SimulatorConfig

    return [HeldOutConfig, SimulatorConfig]


@hookimpl
def rlinf_register_triage() -> list[type[TriageTest]]:
    """The tests of `rlinf_core.triage`."""
    from rlinf_core.triage.builtin import TESTS

    return [*TESTS]


@hookimpl
def rlinf_register_commands() -> list[Command]:
    """Core's subcommands, in the order of `rlinf --help`; `cli.py` also calls this directly."""
    helps = {
        "launch": "start a run's processes as its config says, and wait for them",
        "validate": "validate a run's config, data and files without starting it",
        "plan": "predict a run's memory, speed and communication",
        "rehearse": "compute two steps on as many ranks as a run will have, without a GPU",
        "inspect": "write a page that shows what a run's model will see",
        "norm-stats": "compute, diagnose, compare and import statistics",
        "check-dataset": "check the files of a LeRobot dataset for damage",
        "bench-data": "measure data loading, and how many GPUs it can feed",
        "cache": "decode a run's images once, into files that need no decoding",
        "eval": "measure the error of a policy's actions on recorded episodes",
        "report": "write a page that shows how one or several runs went",
        "triage": "find out why a policy with a low loss does not act well",
        "export": "export a run's policy for inference or further training",
        "push": "upload an exported policy to the hub, after showing what would be public",
        "serve": "answer observations of robots and simulators with a policy's actions",
        "datasets": "list the dataset formats of installed packages",
        "plugins": "list plugins, what they registered, and what failed",
    }
    return [Command(name, text, f"rlinf_core.commands.{name.replace('-', '_')}") for name, text in helps.items()]


@hookimpl(trylast=True)
def rlinf_open_dataset(dataset: DatasetConfig, policy: PolicyConfig, split: Split) -> SampleSource | None:
    """Open a dataset in LeRobot's layout, unless another plugin has opened it."""
    from rlinf_core.contract.datasets import LeRobotDatasetConfig

    if not isinstance(dataset, LeRobotDatasetConfig):
        return None
    from rlinf_core.data.lerobot.source import open_lerobot

    rows = open_lerobot(dataset, policy.chunk_length(), split)
    if not dataset.cache:
        return rows
    from rlinf_core.data.frame_cache.source import open_cached

    return open_cached(rows, dataset, policy)


@hookimpl
def rlinf_launcher_names() -> Sequence[str]:
    """Core's two."""
    from rlinf_core.contract.tables.cluster import LAUNCHERS

    return LAUNCHERS


@hookimpl(trylast=True)
def rlinf_launch(run: RunConfig, arguments: Sequence[str]) -> int | None:
    """Start the processes with torchrun, or submit a job to Slurm, as `cluster.launcher` selects."""
    from rlinf_core.contract.tables.cluster import SLURM, TORCHRUN

    if run.cluster.launcher == TORCHRUN:
        from rlinf_core.torchrun import launch

        return launch(run, arguments)
    if run.cluster.launcher == SLURM:
        from rlinf_core.slurm import submit

        return submit(run, arguments)
    return None


@hookimpl(trylast=True)
def rlinf_describe_launch(run: RunConfig, arguments: Sequence[str]) -> str | None:
    """The command of torchrun, or Slurm's batch file."""
    from rlinf_core.contract.tables.cluster import SLURM, TORCHRUN

    if run.cluster.launcher == TORCHRUN:
        from rlinf_core.torchrun import describe_launch

        return describe_launch(run, arguments)
    if run.cluster.launcher == SLURM:
        from rlinf_core.slurm import batch_file

        return batch_file(run, arguments)
    return None
