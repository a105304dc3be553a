"""Compute one chunk before the first client comes: the first call allocates memory and chooses kernels."""

from __future__ import annotations

import time

from rlinf_core.contract.datasets import LeRobotDatasetConfig
from rlinf_core.inference import LoadedPolicy


def warm_up(policy: LoadedPolicy) -> float:
    """Compute synthetic chunks; returns the seconds that the second one took, 0 if the policy has no such sample."""
    cameras = tuple(policy.data.images) if isinstance(policy.data, LeRobotDatasetConfig) else ()
    sample = policy.config.largest_sample(cameras)
    if sample is None:
        return 0.0
    taken = 0.0
    for _ in range(2):
        start = time.perf_counter()
        policy.act_on([sample])
        taken = time.perf_counter() - start
    return taken
