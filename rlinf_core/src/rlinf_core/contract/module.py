"""What the trainer needs from a policy's module. Imports the standard library only, so that models may import it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import nn

    from rlinf_core.data.sample import Batch


class WeightSource(Protocol):
    """Pretrained tensors, read one at a time."""

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor of the parameter `name` (the module's own name), on the CPU, in the file's dtype."""
        ...

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise `UserError` naming every parameter that is missing, unexpected or of another shape."""
        ...


@runtime_checkable
class LocatedWeights(Protocol):
    """A `WeightSource` that knows its files, for messages about a tensor."""

    def file_of(self, name: str) -> str:
        """The file, or files, that hold the parameter `name`."""
        ...


class PolicyOutput(NamedTuple):
    """What a forward pass returns to the trainer (contract 4: a sum and a weight)."""

    loss_sum: torch.Tensor
    """Scalar, float32: the loss summed over the elements that count. The only field with a gradient."""
    weight: torch.Tensor
    """Scalar, float32: the number of elements summed. A step's loss is the sum of `loss_sum` over the global batch
    divided by the sum of `weight`."""
    metrics: Mapping[str, torch.Tensor]
    """Detached scalars, sums over the same elements; the trainer divides them by the same weight."""
    sample_losses: torch.Tensor | None = None
    """Detached, [B, 2], float32: each sample's contribution to `loss_sum` and to `weight`. The loss of each source of a
    mixture is computed from it; None: it is not reported."""


class ShardUnit(NamedTuple):
    """A module whose parameters are gathered and released together."""

    module: nn.Module
    dtype: Literal["compute", "fp32"] = "compute"
    """`"fp32"`: its parameters are never cast to the compute dtype (small projections, time features)."""
    block: bool = False
    """One of the repeated blocks that make up most of the model; activation checkpointing and compilation apply to
    these."""
    reached: bool = True
    """False: no loss depends on its parameters, which are kept for export. They are never gathered in training and have
    neither gradients nor optimizer state; weight decay still applies to them."""
    read_in_backward: bool = True
    """False: gradients are computed without its parameters, as for an embedding, so that they are not gathered again
    for the backward pass."""


class Policy(Protocol):
    """What `PolicyConfig.build` builds: an `nn.Module` with these methods.

    It is single-device code: sharding, precision, compilation and checkpoints are applied from outside. Its attribute
    `forward_methods`, a tuple of names, may list more methods that compute with parameters. A trainer then gathers the
    parameters for them as for `forward` and `sample_actions`, so that evaluators may call them.
    """

    def forward(self, batch: Batch) -> PolicyOutput:
        """The training loss of a batch."""
        ...

    def shard_units(self) -> Iterator[ShardUnit]:
        """Units in order of use, inner before outer; the remaining parameters belong to the root unit."""
        ...

    def initial_value(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        """The initial value of one whole parameter, float32 on the CPU, from `generator` alone (contract 2).

        For a parameter with `PolicyConfig.published_parts` it is called once per part, with the part's `shape`.
        """
        ...

    def rebuild_buffers(self) -> None:
        """Fill the buffers, which no checkpoint holds; called once the module has real memory."""
        ...


class ActingPolicy(Policy, Protocol):
    """The module of a policy with actions, that is, one whose config has a `chunk_length` greater than 0."""

    def sample_actions(self, batch: Batch, noise: torch.Tensor) -> torch.Tensor:
        """Draw action chunks.

        Args:
            batch: Observations from `collate`; actions in it are ignored.
            noise: [B, H, A], standard normal, float32.

        Returns:
            [B, H, A] normalised actions, float32.
        """
        ...


class PreviousActions(NamedTuple):
    """Actions that chunks of a batch continue, as tensors on the module's device; H action horizon, A action width."""

    actions: torch.Tensor
    """[B, H, A], normalised: from the first that is due when the observation is made, zeros after the last."""
    delays: torch.Tensor
    """[B], int64: how many of them will be executed before the new chunk is used."""
    weights: torch.Tensor
    """[B, H], from 0 to 1: how much each is to be kept; 1 for the first `delays`."""
    max_guidance_weight: torch.Tensor
    """[B], float32: the largest weight of guidance."""
    trained: bool
    """Whether the policy was trained to get the first `delays` actions; otherwise it is guided."""


class ContinuingPolicy(ActingPolicy, Protocol):
    """The module of a policy whose config has `continuation_ways`: it does real-time chunking."""

    def continue_actions(self, batch: Batch, noise: torch.Tensor, previous: PreviousActions) -> torch.Tensor:
        """Draw action chunks that continue others; may compute gradients, so it is not called in inference mode.

        Args:
            batch: Observations from `collate`, as for `sample_actions`.
            noise: [B, H, A], standard normal, float32.
            previous: The actions to continue.

        A policy whose config has `sampling_steps` also takes `num_steps`.

        Returns:
            [B, H, A] normalised actions, float32. If `previous.trained`, the first `delays` are the given ones.
        """
        ...
