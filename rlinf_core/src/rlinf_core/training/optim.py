"""The optimizer step: AdamW on float32 master weights, the reference's schedule and clipping, no host synchronisation.

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
        # The order of float32 operations is optax's: it loses the last digits of small rates, and curves must be equal.
        step = step.to(torch.float32)
        start = self.lr / (self.warmup_steps + 1)
        warmup = (start - self.lr) * (1.0 - step / max(self.warmup_steps, 1)) + self.lr
        progress = ((step - self.warmup_steps) / (self.decay_steps - self.warmup_steps)).clamp(0.0, 1.0)
        end = self.min_lr / self.lr
        decay = self.lr * ((1.0 - end) * 0.5 * (1.0 + torch.cos(math.pi * progress)) + end)
        return torch.where(step < self.warmup_steps, warmup, decay)


class StepResult(NamedTuple):
    """What an optimizer step reports: scalars on the device, so that the caller decides when to wait for them."""

    grad_norm: torch.Tensor
    """Global norm of the mean loss's gradient, before clipping."""
    lr: torch.Tensor
    """Learning rate of this step."""
    skipped: torch.Tensor
    """1.0 if the gradient or loss was not finite, so that nothing was changed; else 0.0."""


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
            parameters: Named parameters; those that require no gradient are ignored.
            schedule: The learning rate.
            betas: Decay rates of the two moments.
            eps: Added to the root of the second moment.
            weight_decay: AdamW's decoupled weight decay.
            clip_grad: Largest global gradient norm.
            unused: Names of parameters that the loss does not depend on: no state, only weight decay.
        """
        trained = {name: parameter for name, parameter in parameters if parameter.requires_grad}
        self.parameters = {name: parameter for name, parameter in trained.items() if name not in unused}
        self._only_decayed = [parameter for name, parameter in trained.items() if name in unused]
        self._weight_decay = weight_decay
        device = next(iter(self.parameters.values())).device
        self.schedule = schedule
        self.clip_grad = clip_grad
        self.applied = torch.zeros((), dtype=torch.float32, device=device)
        """Number of steps that changed the weights; the schedule is a function of it."""
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

        The fused kernel scales the gradients as it reads them, so that neither the loss's weight nor clipping costs a
        pass over memory; if `found_inf` is set, it changes nothing.

        Args:
            divisor: Turns the stored gradients into those of the mean loss: total weight / data-parallel ranks.
            loss: Scalar, over all ranks. If it is not finite, the step is skipped even if the gradient is finite.
        """
        if isinstance(divisor, torch.Tensor):
            divisor = divisor.to(self.applied.device)  # Differs only if the parameters are offloaded to the CPU.
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = _whole(torch.nn.utils.get_total_norm(gradients)) / divisor
        # optax.clip_by_global_norm: divide only when the norm exceeds the bound, and without an epsilon.
        excess = torch.where(norm > self.clip_grad, norm / self.clip_grad, torch.ones_like(norm))
        finite = torch.isfinite(norm)
        if loss is not None:
            finite &= torch.isfinite(loss).to(norm.device)
        skipped = (~finite).to(torch.float32)
        self._lr.copy_(self.schedule.at(self.applied))
        # The attributes through which torch.amp.GradScaler passes these to fused optimizers.
        self._adamw.grad_scale = excess * divisor  # type: ignore[attr-defined]
        self._adamw.found_inf = skipped  # type: ignore[attr-defined]
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        self._decay(1.0 - skipped)
        self.applied += 1.0 - skipped
        return StepResult(grad_norm=norm, lr=self._lr.clone(), skipped=skipped)

    @torch.no_grad()
    def _decay(self, applied: torch.Tensor) -> None:
        """Apply weight decay to the unused parameters, as AdamW would with a gradient of zero."""
        if decays(self.schedule.lr, self._weight_decay):
            factor = 1.0 - self._lr * self._weight_decay * applied
            for parameter in self._only_decayed:
                local_shard(parameter).mul_(factor)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All tensors of the state as `<kind>.<parameter>`; loading writes into these same tensors."""
        state = {"applied": self.applied}
        for name, parameter in self.parameters.items():
            for kind, value in self._adamw.state[parameter].items():
                state[f"{kind}.{name}"] = value
        return state


def decays(lr: float, weight_decay: float) -> bool:
    """Whether weight decay changes a float32 number at all; the reference's 1e-10 at usual rates does not."""
    return bool(torch.tensor(1.0, device="cpu") - lr * weight_decay != 1.0)


def _whole(norm: torch.Tensor) -> torch.Tensor:
    """The norm over all shards, as a plain tensor."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
