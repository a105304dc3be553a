"""Stragglers: ranks that hold up the others, reported once per interval with what they are slow at.

All ranks take equally long for a step, because each waits for the slowest. Two times are a rank's own: how long it
waits for data, and how long it takes for the same computation. On the CPU the latter is the CPU time of a step; on
CUDA, where kernels wait for other ranks inside collectives, a few small matrix products are timed once per interval.
The times travel with the sums of a step, so that comparing needs no further collective.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence

import torch

from rlinf_core.contract.process_group import ProcessGroup
from rlinf_core.training.monitor.metrics import StepClock, record_event

INTERVAL = 100
"""Steps between two comparisons of all ranks."""
SLOWER = 1.3
"""Report a rank once it takes this many times the median rank's compute time, or waits so much longer for data than the
median rank that a step takes this many times as long."""
TIMED_PRODUCTS = 2048, 32
"""Rows of the square matrices, and number of products timed together: 0.55 TFLOP, about a millisecond."""


class Stragglers:
    """Compares the ranks; every rank makes the same calls."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self._steps, self._seconds, self._data, self._cpu = 0, 0.0, 0.0, 0.0
        self._timed: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self.step_seconds = 0.0
        """Mean duration of a step in the interval before the last call of `own_times`."""

    def is_due(self, step: int) -> bool:
        """Whether the ranks are compared at this step."""
        return self._group.size > 1 and step % INTERVAL == 0

    def add(self, metrics: dict[str, float], clock: StepClock) -> None:
        """Add the times of a step of this rank."""
        self._steps += 1
        self._data += metrics["data_wait_share"] * metrics["step_seconds"]
        self._seconds += metrics["step_seconds"]
        self._cpu += clock.cpu_seconds

    def own_times(self) -> tuple[float, float]:
        """This rank's mean seconds per step since the last call, waiting for data and computing; 0 if not measured."""
        steps = max(self._steps, 1)
        data, computing = self._data / steps, self._cpu / steps
        if self._group.device.type == "cuda":
            done = self._timed is not None and self._timed[1].query()  # type: ignore[no-untyped-call]
            computing = self._timed[0].elapsed_time(self._timed[1]) / 1000 if done and self._timed else 0.0
            self._timed = _queue_products(self._group.device)
        self.step_seconds = self._seconds / steps
        self._steps, self._seconds, self._data, self._cpu = 0, 0.0, 0.0, 0.0
        return data, computing

    def report(self, step: int, times: Sequence[float]) -> str:
        """A message that names the slow ranks; empty if there are none.

        Args:
            step: The step that compared the ranks.
            times: `own_times` of all ranks, concatenated.
        """
        slow = find_slow(times[::2], times[1::2], self.step_seconds)
        if not slow:
            return ""
        return f"step {step}: slower than the other ranks: " + "; ".join(
            f"{name_rank(rank)}, {words}" for rank, words in slow
        )


def find_slow(data: Sequence[float], computing: Sequence[float], step_seconds: float) -> list[tuple[int, str]]:
    """The ranks that are slower than the median rank, each with what it is slow at.

    Args:
        data: Seconds per step that each rank waits for data.
        computing: Seconds that each rank takes for the same computation; 0 if not known.
        step_seconds: Duration of a step.
    """
    slow = []
    usual_data = statistics.median_low(data)
    usual = statistics.median_low(computing)
    for rank, (waited, took) in enumerate(zip(data, computing, strict=True)):
        if waited - usual_data > (1 - 1 / SLOWER) * step_seconds:
            slow.append((rank, f"data: waits {waited:.3g} s per step, the median rank {usual_data:.3g} s"))
        elif usual > 0 and took > SLOWER * usual:
            slow.append((rank, f"computing: takes {took / usual:.2g} times as long as the median rank"))
    return slow


def name_rank(rank: int) -> str:
    """A rank as text, with its machine if there are several."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return f"rank {rank}" if world <= local else f"rank {rank} (process {rank % local} of machine {rank // local})"


def _queue_products(device: torch.device) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """Queue the timed products, the same on every device, without waiting for them."""
    size, times = TIMED_PRODUCTS
    factor = torch.ones(size, size, dtype=torch.bfloat16, device=device)
    start = record_event()
    for _ in range(times):
        factor @ factor
    return start, record_event()
