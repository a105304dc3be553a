"""Times of kernels, and what a probe has found so far."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

ROUNDS, WARM_UP = 20, 3


class Probe:
    """The device to ask, and its answers.

    Args:
        device: CUDA, or the CPU to try the probe itself.
        tiny: Use small shapes.
    """

    def __init__(self, device: torch.device, *, tiny: bool) -> None:
        self.device, self.tiny = device, tiny
        self.on_cuda = device.type == "cuda"
        self.results: dict[str, float] = {}

    def report(self, name: str, **numbers: float) -> None:
        """Print numbers, and keep them as results."""
        print(f"{name}: {', '.join(f'{key} {value:.4g}' for key, value in numbers.items())}", flush=True)
        self.results |= {f"{name} {key}": float(value) for key, value in numbers.items()}

    def milliseconds(self, function: Callable[[], Any], rounds: int = ROUNDS) -> float:
        """Median time of a call on the device; on a CPU, of a single one."""
        if not self.on_cuda:
            start = time.perf_counter()
            function()
            return 1e3 * (time.perf_counter() - start)
        for _ in range(WARM_UP):
            function()
        events = [[torch.cuda.Event(enable_timing=True) for _ in "be"] for _ in range(rounds)]
        for begin, end in events:
            begin.record()
            function()
            end.record()
        torch.cuda.synchronize()
        return sorted(begin.elapsed_time(end) for begin, end in events)[rounds // 2]


def apart(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The relative distance of two tensors."""
    wanted = wanted.detach().double().cpu()
    return float((got.detach().double().cpu() - wanted).norm() / wanted.norm())
