"""Explains two errors of a step: collectives that time out, and devices that run out of memory.

`explain` chooses the message. For memory, a `Shortage` holds what was measured when it ran out, and `describe_shortage`
lists the largest consumers, a micro batch that should fit, and other settings that need less.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rlinf_core.contract.process_group import ProcessGroup
from rlinf_core.costs.memory import GAPS, States
from rlinf_core.errors import UserError
from rlinf_core.training.monitor.flight_recorder import FlightRecorder
from rlinf_core.training.settings import Fsdp2Settings
from rlinf_core.training.state.build import TrainState

if TYPE_CHECKING:
    import torch


def explain(
    error: BaseException, recorder: FlightRecorder, config: Fsdp2Settings, group: ProcessGroup, state: TrainState
) -> BaseException:
    """The error to raise instead of an error of training: one with a better message, or the error itself.

    Args:
        error: The error that was raised.
        recorder: Knows rank, step and phase.
        config: The trainer's settings.
        group: All ranks.
        state: Policy, optimizer and moving average.
    """
    if isinstance(error, torch.OutOfMemoryError) and group.device.type == "cuda":
        where = f"rank {recorder.rank}, step {recorder.step}, {recorder.phase}"
        return UserError(describe_shortage(_shortage(config, group, state), config, where=where, ranks=group.size))
    return (recorder.explain(error) if group.size > 1 else None) or error


def _shortage(config: Fsdp2Settings, group: ProcessGroup, state: TrainState) -> Shortage:
    share = config.global_batch_size // group.size
    trained = [parameter for parameter in state.parameters.values() if parameter.requires_grad]
    accumulates = share > config.micro_batch_size and not config.reduce_every_micro_batch
    kept = (p.numel() if accumulates else getattr(p, "to_local", lambda p=p: p)().numel() for p in trained)
    tensors = state.tensors()

    def part(name: str) -> list[torch.Tensor]:
        return [tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")]

    return Shortage(
        capacity=torch.cuda.get_device_properties(group.device).total_memory,
        peak=torch.cuda.max_memory_allocated(group.device),
        states=states_of(part("model"), part("optim"), part("ema"), 0 if config.cpu_offload else 4 * sum(kept)),
        micro_batch=config.micro_batch_size,
        share=share,
    )


@dataclass(frozen=True)
class Shortage:
    """A rank's memory when it ran out, in bytes."""

    capacity: int
    """Memory of the device."""
    peak: int
    """Peak memory of tensors up to then."""
    states: States
    """The part of it that stays on the device from step to step."""
    micro_batch: int
    share: int
    """Samples per rank and step, over all micro batches."""

    @property
    def activations(self) -> int:
        """Memory that grows with the micro batch; a lower bound, as the pass was not complete."""
        return max(self.peak - self.states.total, 0)

    @property
    def fitting(self) -> int:
        """The largest smaller micro batch that should fit and divides `share`; 0 if there is none."""
        room = self.capacity / (1 + GAPS) - self.states.total
        a_sample = max(self.activations, room) / self.micro_batch  # At least `room`, since it did not fit.
        most = min(int(room / a_sample), self.micro_batch - 1) if a_sample > 0 else 0
        return max((size for size in range(1, most + 1) if self.share % size == 0), default=0)


def describe_shortage(shortage: Shortage, config: Fsdp2Settings, *, where: str, ranks: int) -> str:
    """One message: consumers, the largest first, a micro batch that should fit, and other settings.

    Args:
        shortage: The measured memory.
        config: The settings in use.
        where: Rank, step and phase, as text.
        ranks: Number of ranks.
    """
    states = shortage.states
    held = {
        "weights": states.weights,
        "gradients": states.gradients,
        "optimizer state": states.optimizer,
        "moving average": states.ema,
        f"activations and gathered weights of {shortage.micro_batch} samples, at least": shortage.activations,
    }
    largest = sorted(((size, name) for name, size in held.items() if size), reverse=True)
    consumers = ", ".join(f"{name} {size / 1e9:.1f} GB" for size, name in largest)
    fits = (
        f"trainer.micro_batch_size = {shortage.fitting} should fit (now {shortage.micro_batch}; same result)"
        if shortage.fitting
        else f"no smaller trainer.micro_batch_size than {shortage.micro_batch} should fit by itself"
    )
    ways = "; ".join(ways_out(shortage, config, ranks))
    return f"{where}: out of memory, of {shortage.capacity / 1e9:.1f} GB. Used: {consumers}. {fits}. Also: {ways}"


def ways_out(shortage: Shortage, config: Fsdp2Settings, ranks: int) -> Iterable[str]:
    """Settings that need less memory and are not in use yet, the cheapest first."""
    if not config.compiles("cuda"):
        yield "trainer.compile = true"
    if not config.reshard_after_forward:
        yield "trainer.reshard_after_forward = true"
    if config.activation_checkpointing == "none":
        yield 'trainer.activation_checkpointing = "selective"'
    elif config.activation_checkpointing == "selective":
        yield 'trainer.activation_checkpointing = "full"'
    if shortage.states.ema and config.ema_device == "auto":
        yield 'trainer.ema_device = "cpu"'
    if not config.reduce_every_micro_batch and shortage.share > shortage.micro_batch and ranks > 1:
        yield "trainer.reduce_every_micro_batch = true"
    if config.replicas(ranks, 1) > 1:  # A trainer has put the number in place of "auto".
        yield "trainer.num_replicas = 1"
    if not config.cpu_offload:
        yield "trainer.cpu_offload = true, which is slow"
    yield "more devices: weights, gradients and optimizer state are divided among them"


def states_of(
    weights: Iterable[torch.Tensor],
    optimizer: Iterable[torch.Tensor],
    average: Iterable[torch.Tensor],
    gradients: int,
) -> States:
    """Bytes of a rank's own shards on a CUDA device.

    Args:
        weights: Parameters.
        optimizer: Its state.
        average: The moving average; empty if there is none.
        gradients: Bytes of the gradients, given because they exist only at times.
    """

    def size(tensors: Iterable[torch.Tensor]) -> int:
        shards = (getattr(tensor, "to_local", lambda tensor=tensor: tensor)() for tensor in tensors)
        return sum(shard.numel() * shard.element_size() for shard in shards if shard.is_cuda)

    return States(size(weights), gradients, size(optimizer), size(average))
