"""How long things took: the last thousand durations and their percentiles."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np

REMEMBERED = 1024
"""Durations that percentiles are computed from: the latest."""


class Timing:
    """Durations in seconds; percentiles in milliseconds. Remembers `REMEMBERED` of them, and counts all."""

    def __init__(self, seconds: Iterable[float] = ()) -> None:
        self.count = 0
        self.total = 0.0
        """Seconds, of all."""
        self._latest: deque[float] = deque(maxlen=REMEMBERED)
        for one in seconds:
            self.add(one)

    def add(self, seconds: float) -> None:
        """Remember a duration."""
        self.count += 1
        self.total += seconds
        self._latest.append(seconds)

    def percentile(self, percent: float) -> float:
        """A percentile of the latest durations in milliseconds; NaN if there are no durations."""
        return float(np.percentile(self._latest, percent) * 1e3) if self._latest else float("nan")

    def summary(self) -> dict[str, float]:
        """`count`, `p50_ms`, `p99_ms` and `max_ms`."""
        wanted = {"p50_ms": 50.0, "p99_ms": 99.0, "max_ms": 100.0}
        return {"count": self.count} | {name: round(self.percentile(at), 3) for name, at in wanted.items()}
