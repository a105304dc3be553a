"""The loss of the next token without the logits of all tokens: a few at a time, with gradients where they are made.

For 2048 tokens and 150 000 words, logits and their gradient take 2.4 GB in float32. Here a chunk's are made, turned
into its part of both gradients, and forgotten (the idea of Liger Kernel, arXiv 2410.10989): the backward pass computes
no product anew. Torch and the standard library only. Axes: N tokens, W width, V words.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

LOGITS_AT_ONCE = 2**24
"""Numbers of a chunk: 64 MB in float32."""


class HeadShape(NamedTuple):
    """How an architecture makes logits of what its head computes."""

    scale: float = 1.0
    """Logits are the head's outputs times this,"""
    softcap: float = 0.0
    """then softcap · tanh(logits / softcap); 0: as they are."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, shape: HeadShape | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cross entropy of words, summed, and how many of them the likeliest word hits.

    Args:
        hidden: [N, W], what precedes each target.
        weight: [V, W], in the dtype of `hidden`.
        targets: int64 [N].
        shape: How logits are made of products; default: as they are.
        bias: [V].

    Returns:
        Two scalars, float32: the summed loss, and the number of hits without a gradient.
    """
    loss, hits = _Chunked.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, shape or HeadShape()
    )
    return loss, hits


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, shape: HeadShape
    ) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[:3]
        # Sums over many tokens are kept in float32, each chunk's product in the compute dtype.
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
            grad = logits.sub_(normal[:, None]).exp_()  # Probabilities, in place of the logits.
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
        """The gradients of the sum, times what comes from above."""
        grads = [
            None if grad is None else grad.mul_(grad_loss).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*grads, None, None)


def _shape_in_place(logits: Tensor, shape: HeadShape, with_slope: bool) -> Tensor | float | None:
    """Make logits of the head's outputs; the derivative of one by the other, None if it is one everywhere."""
    if shape.scale != 1.0:
        logits *= shape.scale
    if not shape.softcap:
        return None if shape.scale == 1.0 else shape.scale
    torch.tanh(logits.div_(shape.softcap), out=logits)
    slope = (1 - logits.square()) * shape.scale if with_slope else None
    logits *= shape.softcap
    return slope
