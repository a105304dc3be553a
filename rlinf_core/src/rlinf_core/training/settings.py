"""The `[trainer]` table of core's trainer: its keys and their constraints. Torch-free."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rlinf_core.contract.run import RunConfig, TrainerConfig
from rlinf_core.errors import UserError


class Fsdp2Settings(TrainerConfig):
    """Fully sharded data parallel training on any number of ranks, NCCL or gloo."""

    param_dtype: Literal["bf16", "fp32"] = "bf16"
    """Dtype of matrix products. Master weights, gradient reduction and optimizer states are float32 either way."""
    reshard_after_forward: bool = True
    """Release gathered weights between forward and backward: less memory, one more all-gather per step."""
    min_unit_size: int = Field(default=1_000_000, ge=0)
    """Float32 units of the policy with at least this many parameters are gathered separately; smaller ones with the
    root."""
    num_replicas: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Hybrid sharding (HSDP): copies of the model, each sharded over ranks / num_replicas neighbouring ranks; memory
    per rank grows by this factor. `"auto"`: on several machines with more than one rank each, one copy per machine,
    which keeps all-gathers within it; otherwise 1."""
    reduce_every_micro_batch: bool = False
    """Reduce gradients after each micro batch, not only after the last of a step: no rank keeps unsharded float32
    gradients (4 bytes per parameter) in between, but each micro batch communicates."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass of a block recomputes: nothing; all but matrix products and attention; everything."""
    compile: bool | None = None
    """Compile each block with `torch.compile`: the first step is slow, later ones are faster and need less memory. Not
    set: on CUDA devices, if the policy has blocks."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimizer states in CPU memory; the optimizer then runs on the CPU."""
    ema_device: Literal["auto", "cpu"] = "auto"
    """Device of the moving average (`optim.ema_decay`): `auto`, that of the parameters; `cpu`, which copies the weights
    each step."""

    @model_validator(mode="after")
    def _offloaded_parameters_are_on_the_cpu(self) -> Fsdp2Settings:
        if self.cpu_offload and self.ema_device == "cpu":
            raise ValueError('ema_device = "cpu" is redundant with cpu_offload: leave it out')
        return self

    def check_run(self, run: RunConfig) -> None:
        """Refuse a device for a moving average that does not exist."""
        if self.ema_device != "auto" and not run.optim.ema_decay:
            raise ValueError(f'trainer.ema_device = "{self.ema_device}" does nothing without optim.ema_decay')

    def compiles(self, device_type: str) -> bool:
        """Whether blocks are compiled on a device of this type, `cuda` or `cpu`."""
        return device_type == "cuda" if self.compile is None else self.compile

    @property
    def asks_for_blocks(self) -> bool:
        """Whether these settings need a policy with blocks."""
        return self.activation_checkpointing != "none" or bool(self.compile)

    @property
    def compile_fact(self) -> str:
        """Whether blocks are compiled, in words."""
        if self.compile is not None:
            return f"{'yes' if self.compile else 'no'}, as trainer.compile says"
        return "no, on the CPU" if self.device == "cpu" else "on CUDA devices, as trainer.compile is not set"

    def replicas(self, ranks: int, machines: int) -> int:
        """Number of copies of the model.

        Args:
            ranks: Number of processes.
            machines: Number of machines, with equally many neighbouring ranks each.
        """
        if self.num_replicas != "auto":
            return self.num_replicas
        return machines if ranks % machines == 0 and ranks > machines else 1

    def placed(self, ranks: int, machines: int) -> Self:
        """The same settings with a number in place of `"auto"`; see `replicas`."""
        return self.model_copy(update={"num_replicas": self.replicas(ranks, machines)})

    def describe_replicas(self, ranks: int, machines: int) -> str:
        """How the model is sharded on several machines, in words, and what has chosen that. 0 ranks: unknown."""
        if not ranks and self.num_replicas == "auto":
            return 'one copy of the model per machine, if machines have several ranks (trainer.num_replicas = "auto")'
        copies = self.replicas(ranks, machines)
        over = "a machine" if copies == machines else "a copy" if copies > 1 else "all machines"
        shards = f"sharded over the {ranks // copies} ranks of {over}" if ranks > copies else "whole on one rank"
        what = (
            f"{copies} copies of the model" + f", each {shards}" * bool(ranks)
            if copies > 1
            else f"one copy of the model, {shards}"
        )
        auto = ' = "auto"' if self.num_replicas == "auto" else f" = {copies}"
        return f"{what} (trainer.num_replicas{auto})"

    def check_ranks(self, ranks: int) -> None:
        """Refuse a number of ranks that replicas do not divide."""
        if self.num_replicas != "auto" and ranks % self.num_replicas:
            raise UserError(
                f"trainer.num_replicas = {self.num_replicas} does not divide the {ranks} ranks: choose a divisor, such "
                "as the number of nodes"
            )
