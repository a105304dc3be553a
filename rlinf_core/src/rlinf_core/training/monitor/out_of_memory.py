"""What to say when a CUDA device is out of memory: who holds it, which micro batch would fit, what else helps.

The arithmetic is pure and needs no torch: what a run keeps from step to step is known, the rest of the peak are
activations and gathered weights, which grow with the micro batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlinf_core.costs.memory import GAPS, States
from rlinf_core.training.config import Fsdp2TrainerConfig

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Shortage:
    """The moment at which a rank ran out of memory; bytes."""

    capacity: int
    """Of the device."""
    peak: int
    """The most that tensors had by then."""
    states: States
    """Of which these stay from step to step, on the device."""
    micro_batch: int
    share: int
    """Samples that a rank computes in a step, over its micro batches."""

    @property
    def activations(self) -> int:
        """What grows with the micro batch; at least, because the pass was not over."""
        return max(self.peak - self.states.total, 0)

    @property
    def fitting(self) -> int:
        """The largest smaller micro batch that should fit and divides the rank's share; 0: none does."""
        room = self.capacity / (1 + GAPS) - self.states.total
        a_sample = max(self.activations, room) / self.micro_batch  # It did not fit, whatever was measured.
        most = min(int(room / a_sample), self.micro_batch - 1) if a_sample > 0 else 0
        return max((size for size in range(1, most + 1) if self.share % size == 0), default=0)


def tell_shortage(shortage: Shortage, config: Fsdp2TrainerConfig, *, where: str, ranks: int) -> str:
    """One message: the largest consumers first, a micro batch that would fit, and other ways out.

    Args:
        shortage: What is known.
        config: The settings in use.
        where: Rank, step and phase, in words.
        ranks: Of the run.
    """
    states = shortage.states
    held = {
        "weights": states.weights,
        "gradients": states.gradients,
        "optimizer moments": states.optimizer,
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
    return f"{where}: out of memory, of {shortage.capacity / 1e9:.1f} GB. Taken: {consumers}. {fits}. Also: {ways}"


def ways_out(shortage: Shortage, config: Fsdp2TrainerConfig, ranks: int) -> Iterable[str]:
    """Settings that take less memory and are not in use yet, the cheapest first."""
    if shortage.states.ema and config.ema_device == "auto":
        yield 'trainer.ema_device = "cpu"'
    if config.activation_checkpointing == "none":
        yield 'trainer.activation_checkpointing = "selective"'
    elif config.activation_checkpointing == "selective":
        yield 'trainer.activation_checkpointing = "full"'
    if not config.reshard_after_forward:
        yield "trainer.reshard_after_forward = true"
    if not config.reduce_every_micro_batch and shortage.share > shortage.micro_batch and ranks > 1:
        yield "trainer.reduce_every_micro_batch = true"
    if config.num_replicas > 1:
        yield "trainer.num_replicas = 1"
    if not config.cpu_offload:
        yield "trainer.cpu_offload = true, which is slow"
    yield "more devices: weights, gradients and moments are divided among them"


def states_of(
    weights: Iterable[torch.Tensor],
    moments: Iterable[torch.Tensor],
    average: Iterable[torch.Tensor],
    gradients: int,
) -> States:
    """Bytes of a rank's own tensors that lie on a CUDA device.

    Args:
        weights: Parameters.
        moments: The optimizer's state.
        average: The moving average, if there is one.
        gradients: Bytes of the gradients, which exist only at times.
    """

    def size(tensors: Iterable[torch.Tensor]) -> int:
        shards = (getattr(tensor, "to_local", lambda tensor=tensor: tensor)() for tensor in tensors)
        return sum(shard.numel() * shard.element_size() for shard in shards if shard.is_cuda)

    return States(size(weights), gradients, size(moments), size(average))
