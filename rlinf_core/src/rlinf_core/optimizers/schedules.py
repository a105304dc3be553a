"""Learning rates as functions of the step, computed on its device without asking the host.

Each takes the number of the step (from 0, float32) and returns the rate, float32. Rates are plain numbers.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

Curve = Literal["cosine", "linear", "1-sqrt"]
"""How a rate falls."""


def openpi_cosine(step: torch.Tensor, *, lr: float, min_lr: float, warmup_steps: int, decay_steps: int) -> torch.Tensor:
    """Optax's `warmup_cosine_decay_schedule` as openpi calls it: from lr / (warmup_steps + 1), to `min_lr`.

    Warm-up reaches `lr` at `warmup_steps`; the cosine ends at `decay_steps`.
    """
    # The order of float32 operations is optax's: it loses the last digits of small rates, and curves must be equal.
    start = lr / (warmup_steps + 1)
    warmup = (start - lr) * (1.0 - step / max(warmup_steps, 1)) + lr
    progress = ((step - warmup_steps) / (decay_steps - warmup_steps)).clamp(0.0, 1.0)
    end = min_lr / lr
    decay = lr * ((1.0 - end) * 0.5 * (1.0 + torch.cos(math.pi * progress)) + end)
    return torch.where(step < warmup_steps, warmup, decay)


def warmup_stable_decay(
    step: torch.Tensor,
    *,
    lr: float,
    start_lr: float,
    min_lr: float,
    warmup_steps: int,
    stable_steps: int,
    decay_steps: int,
    curve: Curve,
) -> torch.Tensor:
    """Linear from `start_lr` to `lr`, then `lr` for `stable_steps`, then along a curve to `min_lr` at `decay_steps`.

    `decay_steps` is counted from step 0; 0: the rate never falls.
    """
    share = (step / warmup_steps).clamp(max=1.0) if warmup_steps else torch.ones_like(step)
    warmup = start_lr + (lr - start_lr) * share
    if not decay_steps:
        return warmup
    begin = warmup_steps + stable_steps
    progress = ((step - begin) / max(decay_steps - begin, 1)).clamp(0.0, 1.0)
    if curve == "cosine":
        share = 0.5 * (1.0 + torch.cos(math.pi * progress))
    else:
        share = 1.0 - (progress if curve == "linear" else torch.sqrt(progress))
    return torch.where(step < begin, warmup, min_lr + (lr - min_lr) * share)
