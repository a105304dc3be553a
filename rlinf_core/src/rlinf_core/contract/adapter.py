"""What a plugin's modules provide for the parameters and buffers that `rlinf_policy_built` adds to a policy.

Standard library only. None of these classes has to be inherited: an `nn.Module` with the methods is enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch


@runtime_checkable
class Adapter(Protocol):
    """A module that a plugin adds to a policy, or puts in the place of one of its modules.

    It answers for the parameters that it adds: those below it that the policy did not have. They are neither looked for
    in `policy.weights` nor given a value by the policy. If one adapter contains another, the inner one answers.

    A module in the place of another must keep the other's parameters under the names that they had, e.g. as a subclass
    with `self.weight = layer.weight`. Published weights, initial values and checkpoints find them by these names.
    """

    def initial_value(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        """The initial value of one whole parameter that the module adds, float32 on the CPU.

        Args:
            name: The parameter's name within this module.
            shape: Its whole shape, however it is sharded.
            generator: Keyed by the run's seed and the parameter's full name, and the only source of randomness: the
                value is then the same on any number of ranks (contract 2).
        """
        ...


@runtime_checkable
class MergeableAdapter(Adapter, Protocol):
    """An adapter that can be expressed in the policy's own parameters, so that `rlinf export` needs no plugin."""

    def merged(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """The policy's own parameters with which it computes the same without the adapter.

        Must return nothing only if the policy acts the same without the adapter, as with a value head.

        Args:
            tensors: All parameters of this module, those it adds included, by their names within it: whole, float32,
                on the CPU. They are cast to the exported dtype after merging.

        Returns:
            New values of parameters that the policy has without the adapter, of the same shapes. Those left out keep
            their values; the parameters that the adapter adds are not exported.
        """
        ...


@runtime_checkable
class BufferedAdapter(Adapter, Protocol):
    """An adapter with buffers. They are not saved: register them with `persistent=False`."""

    def rebuild_buffers(self) -> None:
        """Fill the buffers that the module adds; called once it has real memory, after the policy's own."""
        ...
