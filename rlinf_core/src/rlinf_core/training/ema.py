"""An exponential moving average of the weights: float32, sharded like them, unchanged by skipped steps.

Torch and the standard library only. The reference is openpi's JAX training loop: after each step the average becomes
decay · average + (1 - decay) · weights, starting from the initial weights, without bias correction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from rlinf_core.training.fsdp import local_shard, release


class Ema:
    """The average of a policy's trainable parameters; frozen ones need no copy.

    Args:
        policy: The sharded policy, with its initial weights.
        decay: 0 < decay < 1.
        device: Device of the average; None: that of the parameters.
    """

    def __init__(self, policy: nn.Module, decay: float, device: torch.device | None = None) -> None:
        self._policy = policy
        self._decay = decay
        self._parameters = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        self._averages: dict[str, torch.Tensor] = {
            name: p.detach().to(device=device or p.device, copy=True) for name, p in self._parameters.items()
        }
        # Plain tensors: an operation on DTensors takes longer than on its shards (`optimizers.parameters.on_shards`).
        self._shards = [
            (local_shard(self._averages[name]), local_shard(parameter)) for name, parameter in self._parameters.items()
        ]

    @torch.no_grad()
    def update(self, skipped: torch.Tensor) -> None:
        """Update the average after a step.

        Args:
            skipped: 1.0 if the step was skipped, which leaves the average unchanged; else 0.0. Not read on the host
                unless the average is on another device.
        """
        weight: torch.Tensor | None = None
        for average, weights in self._shards:
            if weight is None or weight.device != average.device:
                weight = ((1.0 - self._decay) * (1.0 - skipped)).to(average.device)
            average.lerp_(weights.to(average.device), weight)

    def state_dict(self) -> Mapping[str, torch.Tensor]:
        """The averages by parameter name; loading writes into these tensors."""
        return self._averages

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Let the policy compute with the averages; afterwards the weights are restored exactly."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        release(self._policy)  # Gathered parameters would still have the previous values.
        for average, weights in self._shards:
            kept = weights.clone()
            weights.copy_(average)
            average.copy_(kept)
