"""Next-token cross entropy in chunks, so that the logits of all tokens are never in memory at once.

For 2048 tokens and a vocabulary of 150,000, logits and their gradient take 2.4 GB in float32. Here each chunk's logits
are computed, turned into their part of the gradients in the forward pass, and discarded (the idea of Liger Kernel,
arXiv 2410.10989); the backward pass recomputes nothing. Torch and the standard library only, plus Liger's kernel where
it is installed. Axes: N tokens, W width, V vocabulary entries.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

LOGITS_AT_ONCE = 2**24
"""Logits per chunk: 64 MB in float32."""


class HeadShape(NamedTuple):
    """How an architecture turns the outputs of its head into logits."""

    scale: float = 1.0
    """The head's outputs are multiplied by this factor,"""
    softcap: float = 0.0
    """then become softcap · tanh(logits / softcap); 0: unchanged."""


FusedLoss = Callable[[Tensor, Tensor, Tensor, HeadShape, Tensor | None], tuple[Tensor, Tensor]]


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, shape: HeadShape | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Summed cross entropy of the targets, and the number of targets that have the largest logit.

    Args:
        hidden: [N, W], the last hidden state at the position before each target.
        weight: [V, W], in the dtype of `hidden`.
        targets: int64 [N].
        shape: How the head's outputs become logits; None: unchanged.
        bias: [V].

    Returns:
        Two float32 scalars: the summed loss, and the number of hits, which has no gradient.
    """
    loss, hits = _Chunked.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, shape or HeadShape()
    )
    return loss, hits


@functools.cache
def liger_cross_entropy(shape: HeadShape) -> FusedLoss | None:
    """Liger Kernel's version of `linear_cross_entropy`, one Triton kernel per chunk.

    None if it is not installed, or if the architecture scales its logits, which the kernel cannot do.
    """
    if shape.scale != 1.0 or not find_spec("liger_kernel"):
        return None
    loss: Any = import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(
        reduction="sum",
        softcap=shape.softcap or None,
        accum_dtype=torch.float32,  # Of sums over chunks; the default would keep the head's gradient in bf16.
        return_token_accuracy=True,
    )

    def fused(
        hidden: Tensor, weight: Tensor, targets: Tensor, _: HeadShape, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        out = loss(weight, hidden, targets, bias)
        return out.loss.float(), out.token_accuracy.float().detach() * len(targets)

    return fused


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, shape: HeadShape
    ) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[:3]
        # Sums over chunks are kept in float32; each chunk's product is computed in the compute dtype.
        grads = [
            torch.zeros_like(one, dtype=torch.float32) if want and one is not None else None
            for one, want in zip((hidden, weight, bias), wanted, strict=True)
        ]
        grad_hidden, grad_weight, grad_bias = grads
        loss, hits = hidden.new_zeros((), dtype=torch.float32), hidden.new_zeros((), dtype=torch.float32)
        rows = max(1, LOGITS_AT_ONCE // weight.shape[0])
        for start in range(0, len(targets), rows):
            part, target = hidden[start : start + rows], targets[start : start + rows]
            logits = torch.nn.functional.linear(part, weight, bias).float()
            slope = _shape_in_place(logits, shape, any(wanted))
            hits += (logits.argmax(-1) == target).sum()
            chosen = logits.gather(1, target[:, None])[:, 0]
            normal = logits.logsumexp(-1)
            loss += (normal - chosen).sum()
            if not any(wanted):
                continue
            grad = logits.sub_(normal[:, None]).exp_()  # The probabilities, in the memory of the logits.
            grad[torch.arange(len(target), device=target.device), target] -= 1
            if slope is not None:
                grad *= slope
            product = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[start : start + rows] = product @ weight
            if grad_weight is not None:
                if product.dtype == torch.float32:
                    grad_weight.addmm_(product.T, part)
                else:
                    grad_weight += product.T @ part
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        ctx.save_for_backward(*grads)
        ctx.dtypes = [one.dtype if one is not None else None for one in (hidden, weight, bias)]
        ctx.mark_non_differentiable(hits)
        return loss, hits

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """The stored gradients times the incoming one."""
        grads = [
            None if grad is None else grad.mul_(grad_loss).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*grads, None, None)


def _shape_in_place(logits: Tensor, shape: HeadShape, with_slope: bool) -> Tensor | float | None:
    """Turn the head's outputs into logits in place; returns the derivative, None where it is 1 everywhere."""
    if shape.scale != 1.0:
        logits *= shape.scale
    if not shape.softcap:
        return None if shape.scale == 1.0 else shape.scale
    torch.tanh(logits.div_(shape.softcap), out=logits)
    slope = (1 - logits.square()) * shape.scale if with_slope else None
    logits *= shape.softcap
    return slope
