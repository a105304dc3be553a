"""Errors of a step that are told in this project's words: collectives that time out, devices without memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from rlinf_core.contract.process_group import ProcessGroup
from rlinf_core.costs.memory import GAPS, States
from rlinf_core.errors import UserError
from rlinf_core.training.monitor.flight_recorder import Watch
from rlinf_core.training.settings import Fsdp2Settings

if TYPE_CHECKING:
    import torch


def in_words(
    error: BaseException,
    watch: Watch,
    config: Fsdp2Settings,
    group: ProcessGroup,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, torch.Tensor],
) -> BaseException:
    """What to raise for an error of training: the error itself, or one whose message says more.

    Args:
        error: What was raised.
        watch: Knows rank, step and phase.
        config: The trainer's settings.
        group: All ranks.
        parameters: The policy's.
        tensors: What a checkpoint holds, `<part>.<name>`.
    """
    if isinstance(error, torch.OutOfMemoryError) and group.device.type == "cuda":
        where = f"rank {watch.rank}, step {watch.step}, {watch.phase}"
        shortage = _shortage(config, group, parameters, tensors)
        return UserError(tell_shortage(shortage, config, where=where, ranks=group.size))
    return (watch.explain(error) if group.size > 1 else None) or error


def _shortage(
    config: Fsdp2Settings,
    group: ProcessGroup,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, torch.Tensor],
) -> Shortage:
    share = config.global_batch_size // group.size
    trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
    accumulates = share > config.micro_batch_size and not config.reduce_every_micro_batch
    kept = (p.numel() if accumulates else getattr(p, "to_local", lambda p=p: p)().numel() for p in trained)

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


def tell_shortage(shortage: Shortage, config: Fsdp2Settings, *, where: str, ranks: int) -> str:
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


def ways_out(shortage: Shortage, config: Fsdp2Settings, ranks: int) -> Iterable[str]:
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
