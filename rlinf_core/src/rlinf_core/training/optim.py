"""The optimizer step: AdamW on float32 masters, the reference's schedule and clipping, and no host synchronisation.

Torch and the standard library only. The reference is openpi's JAX training loop: optax `warmup_cosine_decay_schedule`,
`clip_by_global_norm` and `adamw`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from rlinf_core.training.fsdp import local_shard


class Schedule(NamedTuple):
    """Linear warm-up and cosine decay; see `OptimConfig` for the fields."""

    lr: float
    min_lr: float
    warmup_steps: int
    decay_steps: int

    def at(self, step: torch.Tensor) -> torch.Tensor:
        """Learning rate of the step with number `step` (from 0), float32 scalar on the tensor's device.

        Warm-up runs from lr / (warmup_steps + 1) at 0 to lr at `warmup_steps`; the cosine ends at `decay_steps`.
        """
        # Optax's order of float32 operations, which loses the last digits of small rates: equal rates, equal curves.
        step = step.to(torch.float32)
        start = self.lr / (self.warmup_steps + 1)
        warmup = (start - self.lr) * (1.0 - step / max(self.warmup_steps, 1)) + self.lr
        progress = ((step - self.warmup_steps) / (self.decay_steps - self.warmup_steps)).clamp(0.0, 1.0)
        end = self.min_lr / self.lr
        decay = self.lr * ((1.0 - end) * 0.5 * (1.0 + torch.cos(math.pi * progress)) + end)
        return torch.where(step < self.warmup_steps, warmup, decay)


class StepResult(NamedTuple):
    """What an optimizer step reports; scalars on the device, so that reading them is the caller's choice of moment."""

    grad_norm: torch.Tensor
    """Global norm of the mean loss's gradient, before clipping."""
    lr: torch.Tensor
    """Learning rate of this step."""
    skipped: torch.Tensor
    """1.0 where gradient or loss was not finite and nothing changed, else 0.0."""


class Optimizer:
    """AdamW whose state exists from the start, so that checkpoints have the same keys before and after any step."""

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        schedule: Schedule,
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        clip_grad: float,
        unused: Collection[str] = (),
    ) -> None:
        """See `OptimConfig` for the settings.

        Args:
            parameters: By name; those that require no gradient are left alone.
            schedule: The learning rate.
            betas: Of the two moments.
            eps: Beside the root of the second moment.
            weight_decay: Of AdamW.
            clip_grad: The largest norm of a gradient.
            unused: Names of parameters that no loss reaches: they have no state, only weight decay.
        """
        trained = {name: parameter for name, parameter in parameters if parameter.requires_grad}
        self.parameters = {name: parameter for name, parameter in trained.items() if name not in unused}
        self._only_decayed = [parameter for name, parameter in trained.items() if name in unused]
        self._weight_decay = weight_decay
        device = next(iter(self.parameters.values())).device
        self.schedule = schedule
        self.clip_grad = clip_grad
        self.applied = torch.zeros((), dtype=torch.float32, device=device)
        """Steps that changed the weights; the schedule counts these."""
        self._lr = torch.zeros((), dtype=torch.float32, device=device)
        self._adamw = torch.optim.AdamW(
            self.parameters.values(), lr=self._lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True
        )
        for parameter in self.parameters.values():
            self._adamw.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }

    def step(self, divisor: torch.Tensor | float = 1.0, loss: torch.Tensor | None = None) -> StepResult:
        """Apply the gradients once and clear them.

        The fused kernel divides the gradients as it reads them, so neither the loss's weight nor clipping costs a pass
        over memory, and it changes nothing where `found_inf` is set.

        Args:
            divisor: What turns the stored gradients into those of the mean loss: total weight / data-parallel ranks.
            loss: Of all ranks, scalar. Where it is not finite, the step is skipped even if its gradient is.
        """
        if isinstance(divisor, torch.Tensor):
            divisor = divisor.to(self.applied.device)  # Elsewhere only if the parameters are offloaded to the CPU.
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = _whole(torch.nn.utils.get_total_norm(gradients)) / divisor
        # optax.clip_by_global_norm: divide only when the norm exceeds the bound, and without an epsilon.
        excess = torch.where(norm > self.clip_grad, norm / self.clip_grad, torch.ones_like(norm))
        finite = torch.isfinite(norm)
        if loss is not None:
            finite &= torch.isfinite(loss).to(norm.device)
        skipped = (~finite).to(torch.float32)
        self._lr.copy_(self.schedule.at(self.applied))
        # The names under which torch.amp.GradScaler hands these to fused optimizers.
        self._adamw.grad_scale = excess * divisor  # type: ignore[attr-defined]
        self._adamw.found_inf = skipped  # type: ignore[attr-defined]
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        self._decay(1.0 - skipped)
        self.applied += 1.0 - skipped
        return StepResult(grad_norm=norm, lr=self._lr.clone(), skipped=skipped)

    @torch.no_grad()
    def _decay(self, applied: torch.Tensor) -> None:
        """What AdamW does to a parameter without a gradient."""
        if decays(self.schedule.lr, self._weight_decay):
            factor = 1.0 - self._lr * self._weight_decay * applied
            for parameter in self._only_decayed:
                local_shard(parameter).mul_(factor)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Every tensor of the state under `<kind>.<parameter>`; loading writes into these same tensors."""
        state = {"applied": self.applied}
        for name, parameter in self.parameters.items():
            for kind, value in self._adamw.state[parameter].items():
                state[f"{kind}.{name}"] = value
        return state


def decays(lr: float, weight_decay: float) -> bool:
    """Whether weight decay changes a float32 number at all: the reference's, 1e-10, at usual rates does not."""
    return bool(torch.tensor(1.0, device="cpu") - lr * weight_decay != 1.0)


def _whole(norm: torch.Tensor) -> torch.Tensor:
    """The norm over all shards."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
