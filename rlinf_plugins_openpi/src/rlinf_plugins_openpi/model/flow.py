"""Flow time: its features, and the times at which a chunk of actions is integrated. Noise is at t = 1, data at t = 0.

Torch and the standard library only.
"""

from __future__ import annotations

import math

import torch

MIN_PERIOD, MAX_PERIOD = 4e-3, 4.0
"""Shortest and longest period of the time features; t runs over [0, 1]."""


def time_features(time: torch.Tensor, width: int) -> torch.Tensor:
    """Sines, then cosines, of float32 time [B] at width/2 periods from 0.004 to 4, geometrically spaced: [B, width].

    The angles reach 1570 rad, where float32 steps by 1e-4, so the reference's order of operations counts. XLA turns its
    division by count - 1 into a product: with that the features agree to 6e-8, with a division only to 6e-5.
    """
    count = width // 2
    fraction = torch.arange(count, dtype=torch.float32, device=time.device) * (1.0 / (count - 1))
    fraction[-1] = 1.0
    period = MIN_PERIOD * (MAX_PERIOD / MIN_PERIOD) ** fraction
    angles = time[:, None] * ((1.0 / period) * 2.0 * math.pi)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def euler_times(num_steps: int) -> list[float]:
    """Flow times at which n Euler steps evaluate the velocity, accumulated in float32 from 1 down to 1/n."""
    time, times = torch.ones((), dtype=torch.float32, device="cpu"), []
    step = -1.0 / num_steps
    while time >= -step / 2:
        times.append(time.item())
        time = time + step
    return times
