"""Ranks that hold the others up: named now and then, with what they are slow at.

All ranks take equally long for a step, because each waits for the slowest. Two times are a rank's own: what it waits
for its data, and how long it computes the same thing. On the CPU the latter is the processor time of a step; on CUDA,
where a rank's kernels wait for others' inside collectives, a small product of matrices is timed once an interval.
The numbers travel with the sums of a step that are added up anyway.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence

import torch

from rlinf_core.contract.process_group import ProcessGroup
from rlinf_core.training.monitor.metrics import StepClock, record_event

INTERVAL = 100
"""Steps between two looks at all ranks."""
SLOWER = 1.3
"""A rank is told of from this on: computing so many times as long as the median rank, or waiting for data longer than
the median rank by the part of a step that makes it take so many times as long."""
TIMED_PRODUCTS = 2048, 32
"""Rows of the square matrices and number of products that are timed: 0.55 TFLOP, about a millisecond."""


class Stragglers:
    """Compares the ranks; every rank makes the same calls."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self._steps, self._seconds, self._data, self._cpu = 0, 0.0, 0.0, 0.0
        self._timed: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self.step_seconds = 0.0
        """How long a step took, on average, before the last call of `own_times`."""

    def is_due(self, step: int) -> bool:
        """Whether the ranks are compared after so many steps."""
        return self._group.size > 1 and step % INTERVAL == 0

    def add(self, metrics: dict[str, float], clock: StepClock) -> None:
        """Take in a step of this rank."""
        self._steps += 1
        self._data += metrics["data_wait_share"] * metrics["step_seconds"]
        self._seconds += metrics["step_seconds"]
        self._cpu += clock.cpu_seconds

    def own_times(self) -> tuple[float, float]:
        """This rank's seconds since the last call: waiting for data, and computing; 0 where nothing was measured."""
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
        """Who holds the others up; empty if nobody does.

        Args:
            step: The number of the step that brought the times.
            times: What `own_times` gave, rank after rank.
        """
        slow = find_slow(times[::2], times[1::2], self.step_seconds)
        if not slow:
            return ""
        return f"step {step}: slower than the other ranks: " + "; ".join(
            f"{name_rank(rank)}, {words}" for rank, words in slow
        )


def find_slow(data: Sequence[float], computing: Sequence[float], step_seconds: float) -> list[tuple[int, str]]:
    """The ranks that are slower than the median one, each with what it is slow at.

    Args:
        data: Seconds a step that each rank waits for data.
        computing: Seconds that each rank takes to compute the same; 0 where that is not known.
        step_seconds: How long a step takes.
    """
    slow = []
    usual_data = statistics.median_low(data)
    usual = statistics.median_low(computing)
    for rank, (waited, took) in enumerate(zip(data, computing, strict=True)):
        if waited - usual_data > (1 - 1 / SLOWER) * step_seconds:
            slow.append((rank, f"data: waits {waited:.3g} s a step, the median rank {usual_data:.3g} s"))
        elif usual > 0 and took > SLOWER * usual:
            slow.append((rank, f"computing: takes {took / usual:.2g} times as long as the median rank"))
    return slow


def name_rank(rank: int) -> str:
    """A rank in words, with its machine where there are several."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return f"rank {rank}" if world <= local else f"rank {rank} (process {rank % local} of machine {rank // local})"


def _queue_products(device: torch.device) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """Queue the same small piece of work on every device; nothing waits for it."""
    size, times = TIMED_PRODUCTS
    factor = torch.ones(size, size, dtype=torch.bfloat16, device=device)
    start = record_event()
    for _ in range(times):
        factor @ factor
    return start, record_event()
