"""Core's trainer as registered under `trainer.type = "fsdp2"`: its settings and `build`, which imports torch late."""

from __future__ import annotations

from typing import Literal

from rlinf_core.contract.process_group import ProcessGroup
from rlinf_core.contract.run import LoadedPlugins, RunConfig, Start, Trainer
from rlinf_core.training.settings import Fsdp2Settings


class Fsdp2TrainerConfig(Fsdp2Settings):
    """Fully sharded data parallel training on any number of ranks, NCCL or gloo."""

    type: Literal["fsdp2"] = "fsdp2"

    def build(self, run: RunConfig, *, start: Start, group: ProcessGroup, plugins: LoadedPlugins) -> Trainer:
        """Build the FSDP2 trainer on this rank."""
        from rlinf_core.training.trainer import Fsdp2Trainer

        return Fsdp2Trainer(run, self, start=start, group=group, plugins=plugins)
