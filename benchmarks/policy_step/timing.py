"""Timing of training steps: sides in turn on a CPU, one side alone on a GPU. Torch and the standard library only."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Step = Callable[[], torch.Tensor]
"""One optimizer step; its loss, on the device."""


def tensors(value: Any, device: torch.device) -> Any:
    """Convert arrays, and lists and mappings of them, to tensors on a device."""
    if isinstance(value, Mapping):
        return {key: tensors(one, device) for key, one in value.items()}
    if isinstance(value, list):
        return [tensors(one, device) for one in value]
    return torch.as_tensor(value).to(device)


def in_turn(steps: Mapping[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side's steps: one step per side and round, after an untimed one.

    Seconds of CPU time: with one thread and nothing else on the machine they are what a clock shows, and what else runs
    beside changes them least.
    """
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        # Every other round in reverse, so that no side always runs after the same one, with its caches.
        for name in list(steps)[:: 1 if number % 2 == 0 else -1]:
            begin = time.process_time()
            steps[name]()
            seconds[name].append(time.process_time() - begin)
    return seconds


def factor(slower: list[float], faster: list[float]) -> dict[str, float]:
    """Speedup: the ratio of the medians, and the smallest and largest ratio of a round."""
    rounds = [a / b for a, b in zip(slower, faster, strict=True)]
    ratio = statistics.median(slower) / statistics.median(faster)
    return {"ratio": round(ratio, 3), "least": round(min(rounds), 3), "greatest": round(max(rounds), 3)}


def to_itself(step: Step, device: torch.device, *, warm_up: int, steps: int) -> dict[str, Any]:
    """A side's first step, median step and peak memory."""

    def timed() -> float:
        begin = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    first = timed()
    for _ in range(warm_up):
        timed()
    seconds = [timed() for _ in range(steps)]
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    return {
        "first_step_seconds": round(first, 3),
        "step_seconds": statistics.median(seconds),
        "slowest_step_seconds": max(seconds),
        "peak_memory_gb": None if peak is None else round(peak, 2),
    }


def waits_for_the_device(step: Step) -> str | None:
    """Torch's message about the first place where a step makes the host wait for the GPU; None if there is none."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None
