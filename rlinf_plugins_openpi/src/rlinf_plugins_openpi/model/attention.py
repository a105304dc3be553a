"""Attention of the two experts: rotary positions, grouped heads, and samples packed end to end.

Torch and the standard library only. Axes: B batch, T tokens (queries), S tokens (keys), N query heads, K key/value
heads, D head dim, R rows of a packed prefix (see `packing`), L slots of its grid. The softmax and the rotation are
float32 (float64 in a float64 model).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from rlinf_plugins_openpi.model.packing import LONGEST_FILLER, Packing, SuffixPacking, rearrange

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


class Grid(NamedTuple):
    """Attention on the grid: packed rows are spread over it, and padding is masked."""

    to_grid: torch.Tensor
    from_grid: torch.Tensor
    """As in `Packing`."""
    bias: torch.Tensor
    """Added to the logits: 0 or `MASKED_LOGIT`, [B, 1, 1, L] in the compute dtype."""


class Sequences(NamedTuple):
    """Attention by one kernel for sequences that are packed end to end, which needs no mask."""

    starts: torch.Tensor
    """Int32 [sequences + 1]: the first row of each sequence, and their number."""
    longest: int
    """Upper bound on the rows of a sequence."""


class SuffixSequences(NamedTuple):
    """The same for the suffix, whose keys include the prefix's."""

    packing: SuffixPacking
    longest: int
    """Upper bound on the queries of a sequence."""
    longest_keys: int
    """Upper bound on the keys of a sequence."""


class PrefixContext(NamedTuple):
    """What a layer needs to know about the prefix besides its tokens."""

    rotation: Rotation
    attention: Grid | Sequences


class SuffixContext(NamedTuple):
    """What a layer needs to know about the suffix besides its tokens."""

    rotation: Rotation
    attention: torch.Tensor | SuffixSequences
    """On the grid, the bias of the logits, [B, 1, T or 1, L+T] in the compute dtype."""


LONGEST_MULTIPLE = 512
"""Bounds of sequences are rounded up to multiples of this, so that compiled code sees one for all batches of a run. An
excess costs nothing: blocks of the kernel past the end of a sequence do nothing."""


def attends_packed(x: torch.Tensor) -> bool:
    """Whether tokens like x are attended by the kernel for packed rows: on CUDA in half precision.

    On the meta device, too, where `rlinf plan` counts what a GPU would do.
    """
    return (x.is_cuda or x.is_meta) and x.dtype in (torch.bfloat16, torch.float16)


def prefix_attention(packing: Packing, tokens: torch.Tensor) -> Grid | Sequences:
    """How a packed prefix attends to itself."""
    if attends_packed(tokens):
        return Sequences(packing.starts, longest_sequence(packing, LONGEST_FILLER))
    return Grid(packing.to_grid, packing.from_grid, bias(packing.valid[:, None, None], tokens.dtype))


def longest_sequence(packing: Packing, filler: int, more: int = 0) -> int:
    """A bound on the rows of any sample, with `more` rows added to each, and on this much filler."""
    longest = max(packing.to_grid.shape[1] + more, filler)
    return -(-longest // LONGEST_MULTIPLE) * LONGEST_MULTIPLE


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


def spread_bias(bias: torch.Tensor, groups: int) -> torch.Tensor:
    """The bias [B, 1, T or 1, S] for the rows of `attend`, [B, 1, T·groups or 1, S]."""
    return bias if bias.shape[2] == 1 else bias.repeat_interleave(groups, dim=2)


def attend(q: torch.Tensor, kv: KeysValues, bias: torch.Tensor) -> torch.Tensor:
    """Grouped-query attention: q [B, T, N, D] over keys and values [B, S, K, D] -> [B, T, N·D].

    The N/K query heads that share a key head become additional rows of queries, so that keys are never repeated. With
    one key head (as in all published sizes) every reshape here is a view.
    """
    batch, tokens, heads, head_dim = q.shape
    kv_heads = kv.keys.shape[2]
    groups = heads // kv_heads
    rows = q.view(batch, tokens, kv_heads, groups, head_dim).transpose(1, 2).flatten(2, 3)
    if bias.shape[2] == tokens:
        bias = spread_bias(bias, groups)
    out = F.scaled_dot_product_attention(rows, kv.keys.transpose(1, 2), kv.values.transpose(1, 2), attn_mask=bias)
    return out.view(batch, kv_heads, tokens, groups, head_dim).transpose(1, 2).reshape(batch, tokens, heads * head_dim)


def attend_within(q: torch.Tensor, kv: KeysValues, attention: Grid | Sequences) -> tuple[torch.Tensor, KeysValues]:
    """Attention within each sample of a packed prefix, and its keys and values as the suffix reads them.

    One kernel processes the packed rows directly, or they are spread over the grid. The two agree up to rounding.

    Args:
        q: Rotated queries [R, N, D].
        kv: Keys and values of the rows, [R, K, D].
        attention: The prefix's.

    Returns:
        [R, N·D], and `for_suffix` of the keys and values.
    """
    read = for_suffix(kv, attention)
    if isinstance(attention, Sequences):
        starts, longest = attention
        return attend_sequences(q, kv, starts, starts, longest, longest), read
    out = attend(rearrange(q, attention.to_grid, attention.from_grid), read, attention.bias)
    return rearrange(out.flatten(0, 1), attention.from_grid, attention.to_grid.flatten()), read


def for_suffix(kv: KeysValues, attention: Grid | Sequences) -> KeysValues:
    """A prefix's keys and values as the suffix reads them: packed [R, K, D], or on the grid [B, L, K, D]."""
    if isinstance(attention, Sequences):
        return kv
    return KeysValues(*(rearrange(x, attention.to_grid, attention.from_grid) for x in kv))


def attend_jointly(
    q: torch.Tensor, prefix: KeysValues, own: KeysValues, attention: torch.Tensor | SuffixSequences
) -> torch.Tensor:
    """Attention of the suffix to prefix and suffix: q [B, T, N, D] -> [B, T, N·D].

    Args:
        q: Rotated queries.
        prefix: The result of `for_suffix`.
        own: Keys and values of the suffix, [B, T, K, D].
        attention: The suffix's.
    """
    if isinstance(attention, torch.Tensor):
        both = (torch.cat(pair, 1) for pair in zip(prefix, own, strict=True))
        return attend(q, KeysValues(*both), attention)
    packing, longest, longest_keys = attention
    pools = (torch.cat((rows, added.flatten(0, 1))) for rows, added in zip(prefix, own, strict=True))
    kv = KeysValues(*(rearrange(pool, packing.rows, packing.inverse, packing.again) for pool in pools))
    out = attend_sequences(q.flatten(0, 1), kv, packing.starts, packing.key_starts, longest, longest_keys)
    return out.view(*q.shape[:2], -1)


def attend_sequences(
    q: torch.Tensor, kv: KeysValues, starts: torch.Tensor, key_starts: torch.Tensor, longest: int, longest_keys: int
) -> torch.Tensor:
    """Attention of each sequence of queries to its own keys, [rows, N, D] -> [rows, N·D]: CUDA in half precision only.

    Args:
        q: Queries, sequence after sequence.
        kv: Keys and values [rows, K, D], likewise.
        starts: Int32 [sequences + 1]: the first query of each sequence, and the number of queries.
        key_starts: The same for keys. A sequence may have keys without queries; their gradient is zero.
        longest: Upper bound on the queries of a sequence.
        longest_keys: Upper bound on the keys of a sequence.
    """
    from torch.nn.attention.varlen import varlen_attn

    # The kernel (FlashAttention 2) supports fewer key heads than query heads, although torch 2.11's signature does not
    # say so. Its backward pass is parallel over query heads, so they are not folded into rows here.
    out = varlen_attn(q, kv.keys, kv.values, starts, key_starts, longest, longest_keys)
    assert isinstance(out, torch.Tensor)
    return out.flatten(1)
