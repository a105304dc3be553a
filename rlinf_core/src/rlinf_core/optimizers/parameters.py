"""What an optimizer knows of a parameter that it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import nn


class TrainedParameter(NamedTuple):
    """A parameter that the optimizer trains."""

    name: str
    """Its name in the policy's module."""
    parameter: nn.Parameter
    """Float32. In a run a `DTensor` that is sharded along axis 0, or this rank's shard if the optimizer is
    `elementwise`; for `rlinf plan` whole and on the meta device."""
    in_block: bool = False
    """Whether it belongs to one of the policy's repeated blocks (`ShardUnit.block`)."""
    parts: Mapping[str, int] = {}
    """Published tensors that it stacks along axis 0, in order: name -> rows; empty if it is just one
    (`PolicyConfig.published_parts`)."""


def on_shards(parameters: Sequence[TrainedParameter]) -> list[TrainedParameter]:
    """The parameters as plain tensors: this rank's shards, which share their memory. Plain ones stay as they are.

    What is computed element by element needs no DTensors. An operation on them costs more host time than most of its
    kernels, and torch 2.11's fused optimizers build a `DTensorSpec` for every scalar beside one that is never released.
    """
    from torch import nn
    from torch.distributed.tensor import DTensor

    found = []
    for one in parameters:
        weights: torch.Tensor = one.parameter.detach()
        found.append(one._replace(parameter=nn.Parameter(weights.to_local())) if isinstance(weights, DTensor) else one)
    return found
