"""Real-time chunking: a chunk that continues the one that a robot executes while this one is computed.

Two ways. `guided` (Black et al., arXiv 2506.07339) needs no training: at every denoising step, the gradient of the
distance between the estimated chunk and the actions to continue is added to the velocity, as in inpainting by
pseudoinverse guidance. `trained` (arXiv 2512.05964) is for a model that was trained with the first actions given: they
keep their values, at flow time 0, and the others are denoised beside them.

The papers count time from noise, τ; here as in openpi t = 1 - τ, noise is at 1, and velocities point from data to
noise. Torch and the standard library only. Axes: B batch, H action horizon, A action width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from rlinf_core.contract.module import PreviousActions

Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Noisy actions [B, H, A] and flow time [B] or [B, H] -> velocity [B, H, A]."""


def in_prefix(delay: torch.Tensor, horizon: int) -> torch.Tensor:
    """The actions of each chunk that are given: delay [B] -> bool [B, H]."""
    return torch.arange(horizon, device=delay.device) < delay[:, None]


def continue_chunks(
    velocity: Velocity, noise: torch.Tensor, previous: PreviousActions, times: Sequence[float]
) -> torch.Tensor:
    """Denoise chunks by Euler steps so that they continue others.

    Args:
        velocity: The model with everything but actions and time bound.
        noise: [B, H, A] float32, standard normal.
        previous: The actions to continue.
        times: The flow time of each step, from 1 down.

    Returns:
        [B, H, A] float32, normalised actions.
    """
    step = _trained_step if previous.trained else _guided_step
    x_t = noise
    for time in times:
        x_t = step(velocity, x_t, time, previous, 1.0 / len(times))
    if previous.trained:
        x_t = _with_prefix(x_t, previous)
    return x_t


def guidance_weight(time: float, largest: torch.Tensor) -> torch.Tensor:
    """The weight of the correction at a flow time, at most `largest` [B]: the clipping that the paper calls β.

    (1 - τ) / (τ r²) with r² = (1 - τ)² / (τ² + (1 - τ)²) and τ = 1 - t: infinite at t = 1.
    """
    tau = 1.0 - time
    if tau <= 0.0 or time <= 0.0:
        return largest
    return largest.clamp(max=(time * time + tau * tau) / (time * tau))


def _guided_step(
    velocity: Velocity, x_t: torch.Tensor, time: float, previous: PreviousActions, step: float
) -> torch.Tensor:
    with torch.enable_grad():
        x_t = x_t.detach().requires_grad_()
        v_t = velocity(x_t, x_t.new_full(x_t.shape[:1], time))
        estimate = x_t - time * v_t
        error = (previous.actions - estimate.detach()) * previous.weights[..., None]
        (correction,) = torch.autograd.grad(estimate, x_t, error)
    weight = guidance_weight(time, previous.max_guidance_weight)
    return x_t.detach() - step * (v_t.detach() - weight[:, None, None] * correction)


def _trained_step(
    velocity: Velocity, x_t: torch.Tensor, time: float, previous: PreviousActions, step: float
) -> torch.Tensor:
    with torch.no_grad():
        x_t = _with_prefix(x_t, previous)
        time_BH = time * (~in_prefix(previous.delays, x_t.shape[1])).float()
        return x_t - step * velocity(x_t, time_BH)


def _with_prefix(x_t: torch.Tensor, previous: PreviousActions) -> torch.Tensor:
    given = in_prefix(previous.delays, x_t.shape[1])
    return torch.where(given[..., None], previous.actions, x_t)
