"""Compare how long the chunks of a mixture's datasets last: a policy that mixes rates learns several speeds at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rlinf_core.contract.datasets import LeRobotDatasetConfig, SampleSource, TimedSource
from rlinf_core.contract.run import RunSource

SAME = 0.05
"""Relative difference up to which durations are equal: cameras of 29.97 and 30 frames/s."""
LONGEST = 6
"""Multiples of the slowest step that are tried as the common one."""


def describe_chunk(given: RunSource, rows: SampleSource) -> str:
    """`4 actions of 0.1 s, 0.4 s`; empty if the source does not know."""
    steps = given.run.policy.chunk_length()
    if not isinstance(rows, TimedSource) or not steps:
        return ""
    step = rows.step_seconds()
    return f"{steps} actions of {step:.3g} s (at {1 / step:.4g} Hz): {steps * step:.3g} s"


def compare_rates(sources: Sequence[tuple[RunSource, SampleSource]]) -> list[str]:
    """A warning if the chunks of a mixture's datasets last differently, with the `stride` that evens them."""
    timed = [(number, given, rows) for number, (given, rows) in enumerate(sources) if isinstance(rows, TimedSource)]
    steps = np.array([rows.step_seconds() for _, _, rows in timed])
    horizon = sources[0][0].run.policy.chunk_length() if sources else 0
    if len(timed) < 2 or not horizon or steps.max() <= steps.min() * (1 + SAME):
        return []
    shown = ", ".join(
        f"{horizon * step:.3g} s in {given.name} ({1 / step:.4g} Hz)"
        for (_, given, _), step in zip(timed, steps, strict=True)
    )
    factors = _factors(steps)
    settings = []
    for (number, given, _), factor in zip(timed, factors, strict=True):
        if factor > 1 and isinstance(given.run.data, LeRobotDatasetConfig):
            settings.append(f"data.mixture.{number}.stride = {given.run.data.stride * factor}")
    left = steps * factors
    exact = left.max() <= left.min() * (1 + SAME)
    way_out = (
        f"{' and '.join(settings)} {'evens' if exact else 'brings closest'} them"
        if settings
        else ("Convert the datasets to one rate")
    )
    return [
        f"mixed-rates: a chunk of {horizon} actions lasts {shown}: one policy learns all of these speeds. {way_out}"
    ]


def _factors(steps: NDArray[np.float64]) -> list[int]:
    """Multiples of each step that are equal, the smallest that exist; else the nearest to the slowest step."""
    slowest = float(steps.max())
    for multiple in range(1, LONGEST + 1):
        factors = np.rint(multiple * slowest / steps)
        lengths = factors * steps
        if lengths.max() <= lengths.min() * (1 + SAME):
            return [int(factor) for factor in factors]
    return [max(1, int(factor)) for factor in np.rint(slowest / steps)]
