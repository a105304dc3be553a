"""AdamW as core's optimizer step drives it: one fused kernel that scales gradients itself and may skip a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from rlinf_core.optimizers.parameters import TrainedParameter


class AdamW(NamedTuple):
    """AdamW's settings, and what `training.state.optim.Optimizer` asks of an optimizer."""

    lr: float
    """Peak learning rate."""
    betas: tuple[float, float]
    """Decay rates of the two moments."""
    eps: float
    """Added to the root of the second moment."""
    weight_decay: float
    """Decoupled weight decay."""

    @property
    def unused_weight_decay(self) -> float:
        """Parameters that no loss depends on decay like all others."""
        return self.weight_decay

    @property
    def elementwise(self) -> bool:
        """It is built over this rank's shards."""
        return True

    def build(self, parameters: Sequence[TrainedParameter]) -> torch.optim.Optimizer:
        """The fused AdamW, with a learning rate on the parameters' device."""
        return torch.optim.AdamW(
            [one.parameter for one in parameters],
            lr=rate_tensor(parameters, self.lr),
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=True,
        )

    def initial_state(self, parameter: TrainedParameter) -> dict[str, torch.Tensor]:
        """Two moments of zero and a step counter."""
        tensor = parameter.parameter
        return {
            "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
            "exp_avg": torch.zeros_like(tensor, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(tensor, memory_format=torch.preserve_format),
        }


def rate_tensor(parameters: Sequence[TrainedParameter], lr: float) -> torch.Tensor:
    """A learning rate that the schedule changes on the parameters' device, so that no step waits for the host."""
    return torch.tensor(lr, dtype=torch.float32, device=parameters[0].parameter.device)
