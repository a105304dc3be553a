"""Errors of a step that are told in this project's words: collectives that time out, devices without memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from rlinf_core.errors import UserError
from rlinf_core.training.config import Fsdp2TrainerConfig
from rlinf_core.training.distributed.processes import Processes
from rlinf_core.training.monitor.flight_recorder import Watch
from rlinf_core.training.monitor.out_of_memory import Shortage, states_of, tell_shortage


def in_words(
    error: BaseException,
    watch: Watch,
    config: Fsdp2TrainerConfig,
    group: Processes,
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
    config: Fsdp2TrainerConfig,
    group: Processes,
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
