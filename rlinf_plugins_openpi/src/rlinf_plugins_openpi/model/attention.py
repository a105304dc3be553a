"""Attention of the two experts: rotary positions, grouped heads, and samples packed end to end.

Torch and the standard library only. Axes: B batch, T tokens (queries), S tokens (keys), N query heads, K key/value
heads, D head dim, R rows of a packed prefix (see `packing`), L slots of its grid. The softmax and the rotation are
float32 (float64 in a float64 model).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from rlinf_plugins_openpi.model.packing import LONGEST_FILLER, Packing, rearrange

ROPE_BASE = 10_000.0
MASKED_LOGIT = -2.3819763e38
"""As in the reference. Finite on purpose: a query that sees no key attends uniformly instead of becoming NaN."""


class Rotation(NamedTuple):
    """Cosine and sine of the rotary angles, float32: [B, T, 1, D/2], or [R, 1, D/2] for packed rows."""

    cos: torch.Tensor
    sin: torch.Tensor


class KeysValues(NamedTuple):
    """Rotated keys, and values of one layer: [B, S, K, D] each, or [R, K, D] for packed rows."""

    keys: torch.Tensor
    values: torch.Tensor


class PrefixContext(NamedTuple):
    """What a layer needs to know about the prefix besides its tokens."""

    rotation: Rotation
    packing: Packing
    bias: torch.Tensor
    """Added to the logits on the grid: 0 or `MASKED_LOGIT`, [B, 1, 1, L] in the compute dtype."""


class SuffixContext(NamedTuple):
    """What a layer needs to know about the suffix besides its tokens."""

    rotation: Rotation
    bias: torch.Tensor
    """As for the prefix, [B, 1, T or 1, L+T]."""


def rotation(positions: torch.Tensor, head_dim: int) -> Rotation:
    """The rotation of integer positions of any shape, computed in float32."""
    exponents = torch.arange(head_dim // 2, dtype=torch.float32, device=positions.device) * (2.0 / head_dim)
    angles = positions[..., None, None].to(torch.float32) / ROPE_BASE**exponents
    return Rotation(angles.cos(), angles.sin())


def rotate(x: torch.Tensor, by: Rotation) -> torch.Tensor:
    """Rotate x [..., N, D]; pairs are (i, i + D/2). Computed in float32, returned in x's dtype."""
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((first * by.cos - second * by.sin, second * by.cos + first * by.sin), dim=-1)
    return rotated.to(x.dtype)


def bias(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The bias to add to the logits, from a bool tensor that is True where a key is visible."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, MASKED_LOGIT)


def attend(q: torch.Tensor, kv: KeysValues, bias: torch.Tensor) -> torch.Tensor:
    """Grouped-query attention: q [B, T, N, D] over keys and values [B, S, K, D] -> [B, T, N·D].

    The N/K query heads that share a key head become additional rows of queries, so that keys are never repeated. With
    one key head (as in all published sizes) every reshape here is a view.
    """
    batch, tokens, heads, head_dim = q.shape
    kv_heads = kv.keys.shape[2]
    groups = heads // kv_heads
    rows = q.view(batch, tokens, kv_heads, groups, head_dim).transpose(1, 2).flatten(2, 3)
    if bias.shape[2] > 1:
        bias = bias.repeat_interleave(groups, dim=2)
    out = F.scaled_dot_product_attention(rows, kv.keys.transpose(1, 2), kv.values.transpose(1, 2), attn_mask=bias)
    return out.view(batch, kv_heads, tokens, groups, head_dim).transpose(1, 2).reshape(batch, tokens, heads * head_dim)


def attend_within(q: torch.Tensor, kv: KeysValues, grid: KeysValues, context: PrefixContext) -> torch.Tensor:
    """Attention within each sample of a packed prefix: q [R, N, D] -> [R, N·D].

    On CUDA in half precision, one kernel processes the packed rows directly; otherwise they are spread over the grid
    and padding is masked. The two agree up to rounding.

    Args:
        q: Rotated queries.
        kv: Keys and values of the rows, [R, K, D].
        grid: The same on the grid, [B, L, K, D].
        context: The context of the prefix.
    """
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        return attend_end_to_end(q, kv, context.packing)
    to_grid, from_grid = context.packing.to_grid, context.packing.from_grid
    out = attend(rearrange(q, to_grid, from_grid), grid, context.bias)
    return rearrange(out.flatten(0, 1), from_grid, to_grid.flatten())


def attend_end_to_end(q: torch.Tensor, kv: KeysValues, packing: Packing) -> torch.Tensor:
    """As `attend_within`, by the kernel for packed rows: CUDA in half precision only."""
    from torch.nn.attention.varlen import varlen_attn

    # An upper bound suffices, and this one is equal for all batches of a shape. The filler is a sequence, too.
    longest, starts = max(packing.to_grid.shape[1], LONGEST_FILLER), packing.starts
    # The kernel (FlashAttention 2) supports fewer key heads than query heads, although torch 2.11's signature does not
    # say so. Its backward pass is parallel over query heads, so they are not folded into rows here.
    out = varlen_attn(q, kv.keys, kv.values, starts, starts, longest, longest)
    assert isinstance(out, torch.Tensor)
    return out.flatten(1)


def spread(kv: KeysValues, packing: Packing) -> KeysValues:
    """Spread keys and values of packed rows over the grid: [R, K, D] -> [B, L, K, D]."""
    return KeysValues(*(rearrange(x, packing.to_grid, packing.from_grid) for x in kv))
