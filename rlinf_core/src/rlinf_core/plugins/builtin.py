"""Core's own plugin, found through its own entry point: the FSDP2 trainer, two optimizers, four schedules, the LeRobot
reader, two loggers, and torchrun as launcher.

Configs and readers are imported when a hook is called, so that loading the plugins is cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlinf_core.contract.hookspecs import hookimpl

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlinf_core.contract.datasets import DatasetConfig, SampleSource, Split
    from rlinf_core.contract.optim import OptimizerConfig, ScheduleConfig
    from rlinf_core.contract.policy import PolicyConfig
    from rlinf_core.contract.run import LoggerConfig, RunConfig, TrainerConfig


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


@hookimpl(trylast=True)
def rlinf_launch(run: RunConfig, arguments: Sequence[str]) -> int | None:
    """Start the processes with torchrun, if `cluster.launcher` selects it."""
    from rlinf_core.contract.cluster import TORCHRUN

    if run.cluster.launcher != TORCHRUN:
        return None
    from rlinf_core.torchrun import launch

    return launch(run, arguments)
