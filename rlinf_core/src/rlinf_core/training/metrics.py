"""Where a step's time goes, and how much memory it took."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHASES = ("data_wait", "forward", "backward", "optimizer")


class StepClock:
    """Times the phases of one step. On CUDA with events, so that measuring waits for nothing.

    Waiting for data is the host's time everywhere; the device may still be busy then.

    Args:
        device: What the step computes on.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._started = time.perf_counter()
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """Add what happens inside to a phase."""
        if self._cuda and phase != "data_wait":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            yield
            end.record()
            self._events.append((phase, start, end))
        else:
            before = time.perf_counter()
            yield
            self._seconds[phase] += time.perf_counter() - before

    def read(self, samples: int) -> dict[str, float]:
        """The step's `samples_per_second` and the share of each phase in its time; call it when the device is done."""
        seconds = time.perf_counter() - self._started
        for phase, start, end in self._events:
            self._seconds[phase] += start.elapsed_time(end) / 1000
        shares = {f"{phase}_share": spent / seconds for phase, spent in self._seconds.items()}
        return {"samples_per_second": samples / seconds, "step_seconds": seconds} | shares


def peak_memory_gb(device: torch.device) -> float:
    """The most memory this process has held so far, in 10⁹ bytes: on its CUDA device, else in the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
