"""What the trainer asks of a policy's module, on the standard library alone: a model may import this and only torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn

    from rlinf_core.data.sample import Batch


class WeightSource(Protocol):
    """Pretrained tensors, read one at a time."""

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor of the parameter `name` (the module's own name), on the CPU, in the dtype of the file."""
        ...

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise `UserError` naming every parameter that is missing, unexpected or of another shape."""
        ...


class PolicyOutput(NamedTuple):
    """What a forward pass hands to the trainer (contract 4: a sum and a weight)."""

    loss_sum: torch.Tensor
    """Scalar, float32: the loss summed over the elements that count. The only one with a gradient."""
    weight: torch.Tensor
    """Scalar, float32: the number of elements summed. The loss of a step is the quotient over the global batch."""
    metrics: Mapping[str, torch.Tensor]
    """Detached scalars, sums over the same elements; the trainer divides them by the same weight."""
    sample_losses: torch.Tensor | None = None
    """Detached, [B, 2], float32: what each sample adds to `loss_sum` and to `weight`. In a mixture of datasets the loss
    of each source is made of it; None: it is not reported."""


class ShardUnit(NamedTuple):
    """A module whose parameters are gathered and released together."""

    module: nn.Module
    dtype: Literal["compute", "fp32"] = "compute"
    """`"fp32"`: its parameters are never cast to the compute dtype (small projections, time features)."""
    block: bool = False
    """One of the repeated blocks that make up most of the model: activation checkpointing and compilation apply."""
    reached: bool = True
    """False: no loss depends on its parameters, which are kept for export. They are never gathered in training, have
    neither gradients nor optimizer state, and what weight decay would change of them it does."""


class Policy(Protocol):
    """A policy is an `nn.Module` with these. It is single-device code: sharding is applied from outside."""

    def forward(self, batch: Batch) -> PolicyOutput:
        """The training loss of a batch."""
        ...

    def sample_actions(self, batch: Batch, noise: torch.Tensor) -> torch.Tensor:
        """Draw action chunks.

        Args:
            batch: Observations as `collate` makes them; actions in it are ignored.
            noise: [B, H, A], standard normal, float32.

        Returns:
            [B, H, A] normalised actions, float32.
        """
        ...

    def demonstrate(self, batch: Batch) -> Sequence[str]:
        """Show to a person what the policy does with held-out samples, a line each; the run's loggers print them.

        Only of policies whose config's `shown()` is not 0. Every rank is called with the same batch and must call
        sharded modules equally often, whatever the numbers are.
        """
        ...

    def shard_units(self) -> Iterator[ShardUnit]:
        """Units in the order of use, inner before outer; parameters in none of them belong to the root unit."""
        ...

    def initial_value(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        """The initial value of one whole parameter, float32 on the CPU, from `generator` alone (contract 2).

        Of a parameter with `PolicyConfig.published_parts`, that of a part: `shape` is the part's.
        """
        ...

    def rebuild_buffers(self) -> None:
        """Fill buffers that no checkpoint holds; called after the module got real memory."""
        ...
