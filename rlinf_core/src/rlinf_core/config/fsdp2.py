"""The `[trainer]` table of core's own trainer. Declarative: `build` imports torch late."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from rlinf_core.trainer import Trainer, TrainerConfig

if TYPE_CHECKING:
    from rlinf_core.config.run import RunConfig
    from rlinf_core.plugins import Plugins
    from rlinf_core.training.distributed import Processes
    from rlinf_core.training.resume import Start


class Fsdp2TrainerConfig(TrainerConfig):
    """Fully sharded data parallel training on any number of ranks, NCCL or gloo."""

    type: Literal["fsdp2"] = "fsdp2"
    param_dtype: Literal["bf16", "fp32"] = "bf16"
    """Dtype of matrix products. Master weights, gradient reduction and optimizer states are float32 either way."""
    reshard_after_forward: bool = True
    """Release gathered weights between forward and backward: less memory, one more all-gather a step."""
    min_unit_size: int = Field(default=1_000_000, ge=0)
    """Parameters from which a float32 unit of the policy is gathered apart; smaller ones go with the root's."""

    def build(self, run: RunConfig, *, start: Start, group: Processes, plugins: Plugins) -> Trainer:
        """Build the FSDP2 trainer on this rank."""
        from rlinf_core.training.trainer import Fsdp2Trainer

        return Fsdp2Trainer(run, self, start=start, group=group, plugins=plugins)
