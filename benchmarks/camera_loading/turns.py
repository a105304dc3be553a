"""Loaders measured in turns: each stays open, and is measured while the others are idle."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

Batches = Iterator[int]
"""A running loader: yields the number of samples of each batch as it arrives."""


class Speed(NamedTuple):
    """The speed of a loader in one turn."""

    samples_per_second: float
    processor_ms: float
    """CPU time per sample, over all processes; independent of how busy the cores are otherwise."""


class Runner:
    """A loader that stays open from turn to turn."""

    def __init__(self, batches: Batches, workers: int, together: int = 0) -> None:
        """Open the loader and take one batch from each worker.

        Args:
            batches: The loader.
            workers: How many it has.
            together: Batches a turn takes a multiple of; 0: one of each worker, which deliver at about the same time.
        """
        self._batches, self._ready, self._together = batches, 2 * workers, together or max(workers, 1)
        self._take(max(workers, 1))
        settle()

    def turn(self, seconds: float) -> Speed:
        """Run for at least this long, from idle to idle; batches that workers had ready do not count."""
        self._take(self._ready)
        begin, before, taken, passed = time.perf_counter(), processor_seconds(), 0, 0.0
        while passed < seconds:
            taken += self._take(self._together)
            passed = time.perf_counter() - begin
        spent = processor_seconds() - before
        settle()
        return Speed(taken / passed, spent / taken * 1000)

    def _take(self, count: int) -> int:
        return sum(itertools.islice(self._batches, count))

    def close(self) -> None:
        """End its workers."""
        self._batches.close()  # type: ignore[attr-defined]


def settle() -> None:
    """Wait until workers have prefetched all they may, so that they do not disturb the next turn."""
    before = processor_seconds()
    while True:
        time.sleep(0.15)
        now = processor_seconds()
        if now - before < 0.02:
            return
        before = now


def processor_seconds() -> float:
    """CPU time so far of this process and its current workers."""
    total = time.process_time()
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total
