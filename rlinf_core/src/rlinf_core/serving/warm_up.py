"""Compute one chunk before the first client comes: the first call allocates memory and chooses kernels."""

from __future__ import annotations

import time

from rlinf_core.contract.datasets import LeRobotDatasetConfig
from rlinf_core.inference import LoadedPolicy


def warm_up(policy: LoadedPolicy, most_together: int = 1) -> float:
    """Compute synthetic chunks, first of the longest prompt that there may be.

    Args:
        policy: What to warm up; in the thread that will compute, as CUDA graphs belong to a thread.
        most_together: The largest batch that will be asked for. If the policy is compiled, all powers of two up to it
            are compiled here, largest prompt first, so that no request waits for the compiler.

    Returns:
        Seconds that a chunk takes; 0 if the policy has no such sample.
    """
    cameras = tuple(policy.data.images) if isinstance(policy.data, LeRobotDatasetConfig) else ()
    sample = policy.config.largest_sample(cameras)
    if sample is None:
        return 0.0
    taken, batch = 0.0, 2
    while policy.sample.compiled and batch < 2 * most_together:
        policy.act_on([sample] * min(batch, most_together))
        batch *= 2
    for _ in range(2):
        start = time.perf_counter()
        policy.act_on([sample])
        taken = time.perf_counter() - start
    return taken
