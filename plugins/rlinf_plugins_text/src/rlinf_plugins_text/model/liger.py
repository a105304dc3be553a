"""Liger Kernel's fused loss, where it is installed: the same sums, each chunk's by one Triton kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from rlinf_plugins_text.model.cross_entropy import HeadShape

FusedLoss = Callable[[Tensor, Tensor, Tensor, HeadShape, Tensor | None], tuple[Tensor, Tensor]]


@functools.cache
def liger_cross_entropy(shape: HeadShape) -> FusedLoss | None:
    """`cross_entropy.linear_cross_entropy` by Liger's kernel; None if it is not installed, or scales no logits."""
    if shape.scale != 1.0 or not find_spec("liger_kernel"):
        return None
    loss: Any = import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(
        reduction="sum",
        softcap=shape.softcap or None,
        accum_dtype=torch.float32,  # Sums over chunks; the default keeps the head's gradient in bf16.
        return_token_accuracy=True,
    )

    def fused(
        hidden: Tensor, weight: Tensor, targets: Tensor, _: HeadShape, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        out = loss(weight, hidden, targets, bias)
        return out.loss.float(), out.token_accuracy.float().detach() * len(targets)

    return fused
