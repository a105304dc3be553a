"""Where a step's time goes and what it computes, by torch's profiler, from the shapes that operators are called with.

It needs no mark in anybody's code, so that all sides are taken apart alike. Axes: N positions, W width, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from typing import Any

import torch

HEAD, LAYERS, ATTENTION, OPTIMIZER, OTHER, PYTHON = (
    "head and loss",
    "linear layers",
    "attention and its mask",
    "optimizer and clipping",
    "other operators",
    "outside of operators",
)
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")
Shape = tuple[int, ...]


class Profile:
    """A profile of some steps; `found` has its numbers once it has stopped."""

    def __init__(self, *, width: int, vocabulary: int) -> None:
        self.found: dict[str, Any] = {}
        self._weight = {(vocabulary, width), (width, vocabulary)}
        self._width, self._vocabulary = width, vocabulary
        activities = [torch.profiler.ProfilerActivity.CPU]
        self._profiler = torch.profiler.profile(activities=activities, record_shapes=True, acc_events=True)

    def start(self) -> None:
        """Begin to record."""
        self._profiler.start()
        self._begin = time.perf_counter()

    def stop(self, *, steps: int) -> None:
        """End, and sum up.

        Args:
            steps: How many were recorded.
        """
        whole = time.perf_counter() - self._begin
        self._profiler.stop()
        seconds: dict[str, float] = defaultdict(float)
        logits = flops = 0.0
        for event in self._profiler.key_averages(group_by_input_shape=True):
            shapes = [tuple(shape) for shape in event.input_shapes if shape]
            part = self._part(event.key, shapes)
            seconds[part] += event.self_cpu_time_total / 1e6
            flops += event.count * _flops(event.key, shapes)
            if event.key == "aten::mm" and len(shapes) > 1 and shapes[1] == (self._width, self._vocabulary):
                logits += event.count * shapes[0][0]
        seconds[PYTHON] = whole - sum(value for part, value in seconds.items() if part != PYTHON)
        self.found = {
            "shares": {
                part: round(value / whole, 3) for part, value in sorted(seconds.items(), key=lambda one: -one[1])
            },
            "profiled_seconds_per_step": {part: value / steps for part, value in seconds.items()},
            "logit_rows_per_step": logits / steps,
            "gflops_per_step": flops / steps / 1e9,
        }

    def _part(self, name: str, shapes: list[Shape]) -> str:
        if not name.startswith("aten::"):
            return PYTHON
        if "scaled_dot_product" in name or any(_is_mask(shape) for shape in shapes):
            return ATTENTION
        if any(word in name for word in ("adamw", "foreach", "vector_norm")):
            return OPTIMIZER
        of_logits = any(self._vocabulary in shape and shape not in self._weight for shape in shapes)
        if of_logits or (name in PRODUCTS and self._weight & set(shapes)):
            return HEAD
        return LAYERS if name in PRODUCTS else OTHER


def _is_mask(shape: Shape) -> bool:
    return len(shape) == 4 and shape[1] == 1 and shape[2] == shape[3] > 1


def _flops(name: str, shapes: list[Shape]) -> float:
    """Operations of matrix products; 0 for all else."""
    if "scaled_dot_product" in name and "_for_cpu" in name:
        # Query [B, H, T, D] and key [B, G, S, D], after the gradient [B, H, T, D] in the backward pass.
        query, key = (shapes[1], shapes[2]) if "backward" in name else (shapes[0], shapes[1])
        return (10 if "backward" in name else 4) * math.prod(query) * key[2]
    if name not in PRODUCTS:
        return 0.0
    first = 0 if name in ("aten::mm", "aten::bmm") else 1  # After what the product is added to.
    left, right = shapes[first : first + 2]  # An `out` may follow.
    return 2.0 * math.prod(left) * right[-1]
