"""The `[trainer]` table of core's trainer: its keys and what they rule out. Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rlinf_core.contract.run import RunConfig, TrainerConfig
from rlinf_core.errors import UserError


class Fsdp2Settings(TrainerConfig):
    """Fully sharded data parallel training on any number of ranks, NCCL or gloo."""

    type: Literal["fsdp2"] = "fsdp2"
    param_dtype: Literal["bf16", "fp32"] = "bf16"
    """Dtype of matrix products. Master weights, gradient reduction and optimizer states are float32 either way."""
    reshard_after_forward: bool = True
    """Release gathered weights between forward and backward: less memory, one more all-gather a step."""
    min_unit_size: int = Field(default=1_000_000, ge=0)
    """Parameters from which a float32 unit of the policy is gathered apart; smaller ones go with the root's."""
    num_replicas: int = Field(default=1, ge=1)
    """Hybrid sharding (HSDP): copies of the model, each sharded over ranks / num_replicas neighbouring ranks; one
    a node keeps all-gathers within the node, for as many times the memory."""
    reduce_every_micro_batch: bool = False
    """Reduce gradients after each micro batch, not only after a step's last: no rank keeps whole float32 gradients
    (4 bytes a parameter) between them, but each micro batch communicates."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass of a block computes anew: nothing; everything but matrix products and attention; all."""
    compile: bool = False
    """Compile each block with `torch.compile`: a slow first step, faster ones after it."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimizer states in the CPU's memory, where the optimizer then runs."""
    ema_device: Literal["auto", "cpu"] = "auto"
    """Where the moving average of `optim.ema_decay` lives: `auto`, beside the parameters; `cpu`, a copy each step."""

    @model_validator(mode="after")
    def _offloaded_parameters_are_on_the_cpu(self) -> Fsdp2Settings:
        if self.cpu_offload and self.ema_device == "cpu":
            raise ValueError('ema_device = "cpu" says nothing new beside cpu_offload: leave it out')
        return self

    def check_run(self, run: RunConfig) -> None:
        """Refuse a place for an average that is not kept."""
        if self.ema_device != "auto" and not run.optim.ema_decay:
            raise ValueError(f'trainer.ema_device = "{self.ema_device}" does nothing without optim.ema_decay')

    def check_ranks(self, ranks: int) -> None:
        """Replicas are of equal size."""
        if ranks % self.num_replicas:
            raise UserError(
                f"trainer.num_replicas = {self.num_replicas} does not divide the {ranks} ranks: take a divisor, such "
                "as the number of nodes"
            )
