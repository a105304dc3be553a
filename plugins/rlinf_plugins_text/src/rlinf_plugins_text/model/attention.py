"""Attention within concatenated documents: the texts of a batch share a row without seeing one another.

It is registered with transformers as the attention `rlinf_documents`, so that a model's own code calls it. On CUDA in
half precision it is one kernel for all documents (`torch.nn.attention.varlen`), elsewhere one call per document;
neither computes anything between documents. Axes: H query heads, G key heads, N tokens of all documents, D head width.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from rlinf_core import UserError

NAME = "rlinf_documents"


def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    documents: Tensor | None = None,
    longest: int = 0,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document, with the signature that transformers expects.

    Args:
        module: The calling attention layer.
        query: [1, H, N, D]
        key: [1, G, N, D]
        value: [1, G, N, D]
        attention_mask: Must be None: `documents` decides which tokens see each other.
        scaling: Factor applied to the scores; None: 1 / sqrt(D).
        dropout: Fraction of the probabilities dropped in training.
        sliding_window: A token sees itself and the `sliding_window - 1` before it; None: all before it.
        softcap: Scores become softcap · tanh(score / softcap); None: unchanged.
        documents: int32 [number of documents + 1]: the start of each document, then N.
        longest: Upper bound on the length of a document.
        others: Further arguments of the architecture; those that would change the result are refused.

    Returns:
        Outputs [1, N, H, D]; no attention probabilities.
    """
    unknown = [name for name in ("s_aux", "position_bias", "head_mask") if others.get(name) is not None]
    if documents is None or attention_mask is not None or unknown:
        why = f"it uses {unknown[0]}" if unknown else "it does not pass on where documents begin"
        raise UserError(
            f'{type(module).__name__} cannot attend within documents: {why}. Set policy.attention = "padded"'
        )
    if has_kernel(query) and not softcap and not dropout:
        return _one_kernel(query, key, value, documents, longest, scaling, sliding_window), None
    out: Tensor = _each_document(query, key, value, documents, scaling, dropout, sliding_window, softcap)
    return out, None


def has_kernel(query: Tensor) -> bool:
    """Whether one kernel attends within all documents: on CUDA in half precision, and where that is counted."""
    return (query.is_cuda or query.is_meta) and query.dtype in (torch.bfloat16, torch.float16)


def _one_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # transformers passes transposed views; the kernel takes [N, H, D]. It supports fewer key heads than query heads,
    # although torch 2.11's signature does not say so.
    q, k, v = (one[0].transpose(0, 1).contiguous() for one in (query, key, value))
    reach = (window - 1 if window else -1, 0)
    out = varlen_attn(q, k, v, documents, documents, longest, longest, scale=scaling, window_size=reach)
    assert isinstance(out, Tensor)
    return out[None]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _each_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Tensor,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """One call per document. Not compiled, because the number of documents differs from batch to batch."""
    parts = []
    for begin, end in pairwise(documents.tolist()):
        if end > begin:
            q, k, v = (one[:, :, begin:end] for one in (query, key, value))
            parts.append(_one_document(q, k, v, scaling, dropout, window, softcap))
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()


def _one_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    length = query.shape[2]
    grouped = query.shape[1] != key.shape[1]
    near = window is not None and window < length
    if not softcap:
        mask = _visible(length, window, query.device) if near else None
        return scaled_dot_product_attention(
            query, key, value, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )
    if grouped:
        heads = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(heads, 1), value.repeat_interleave(heads, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~_visible(length, window if near else None, query.device), -torch.inf)
    probabilities = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return torch.dropout(probabilities, dropout, train=dropout > 0) @ value


def _visible(length: int, window: int | None, device: torch.device) -> Tensor:
    """Bool [length, length]: whether a query (row) sees a key (column)."""
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return causal if window is None else causal.triu(1 - window)


AttentionInterface.register(NAME, document_attention)
