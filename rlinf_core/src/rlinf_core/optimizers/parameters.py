"""What an optimizer knows of a parameter that it trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import nn


class TrainedParameter(NamedTuple):
    """A parameter that the optimizer trains."""

    name: str
    """Its name in the policy's module."""
    parameter: nn.Parameter
    """Float32. In a run a `DTensor` that is sharded along axis 0; for `rlinf plan` whole and on the meta device."""
    in_block: bool = False
    """Whether it belongs to one of the policy's repeated blocks (`ShardUnit.block`)."""
    parts: Mapping[str, int] = {}
    """Published tensors that it stacks along axis 0, in order: name -> rows; empty if it is just one
    (`PolicyConfig.published_parts`)."""
