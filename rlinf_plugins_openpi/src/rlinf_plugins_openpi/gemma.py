"""Two Gemma transformers that attend jointly: the VLM reads the prefix, the action expert the suffix.

Torch and the standard library only. Axes: B batch, T tokens (queries), S tokens (keys), N query heads, K key/value
heads, D head dim, E a block's width. `JointLayer` holds the blocks of both experts at one depth: it is one unit of
sharding, always called as a module. The compute dtype is that of the weights found there; norm statistics, the rotation
and the softmax are float32 (float64 in a float64 model).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from rlinf_plugins_openpi.dimensions import GemmaDimensions

RMS_NORM_EPS = 1e-6
ROPE_BASE = 10_000.0
MASKED_LOGIT = -2.3819763e38
"""The reference's, and finite on purpose: a query that may see nothing attends evenly instead of becoming NaN."""


class Rotation(NamedTuple):
    """Cosine and sine of the rotary angles, [B, T, 1, D/2] float32."""

    cos: torch.Tensor
    sin: torch.Tensor


class KeysValues(NamedTuple):
    """Keys, after rotation, and values of one layer: [B, S, K, D] each."""

    keys: torch.Tensor
    values: torch.Tensor


class TokenContext(NamedTuple):
    """What a layer must know of one expert's tokens besides their content."""

    rotation: Rotation
    bias: torch.Tensor
    """Added to the logits: 0 or `MASKED_LOGIT`, [B, 1, T or 1, S] in the compute dtype."""


def rotation(positions: torch.Tensor, head_dim: int) -> Rotation:
    """Rotary angles of integer positions [B, T], computed in float32."""
    exponents = torch.arange(head_dim // 2, dtype=torch.float32, device=positions.device) * (2.0 / head_dim)
    angles = positions[..., None, None].to(torch.float32) / ROPE_BASE**exponents
    return Rotation(angles.cos(), angles.sin())


def rotate(x: torch.Tensor, by: Rotation) -> torch.Tensor:
    """Rotate x [B, T, N, D], whose two halves form the pairs; computed in float32, returned in x's dtype."""
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((first * by.cos - second * by.sin, second * by.cos + first * by.sin), dim=-1)
    return rotated.to(x.dtype)


def attend(q: torch.Tensor, kv: KeysValues, bias: torch.Tensor) -> torch.Tensor:
    """Grouped-query attention: q [B, T, N, D] over keys and values [B, S, K, D] -> [B, T, N·D].

    The N/K query heads that share a key head become further rows of queries, so that keys are never repeated; with one
    key head (all published sizes) every reshape here is a view.
    """
    batch, tokens, heads, head_dim = q.shape
    kv_heads = kv.keys.shape[2]
    groups = heads // kv_heads
    rows = q.view(batch, tokens, kv_heads, groups, head_dim).transpose(1, 2).flatten(2, 3)
    if bias.shape[2] > 1:
        bias = bias.repeat_interleave(groups, dim=2)
    out = F.scaled_dot_product_attention(rows, kv.keys.transpose(1, 2), kv.values.transpose(1, 2), attn_mask=bias)
    return out.view(batch, kv_heads, tokens, groups, head_dim).transpose(1, 2).reshape(batch, tokens, heads * head_dim)


def _normalize(x: torch.Tensor) -> torch.Tensor:
    """Divide by the root mean square over the last axis, in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + RMS_NORM_EPS)


class RMSNorm(nn.Module):
    """Gemma's norm: x / rms(x) · (1 + weight)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: torch.Tensor, cond: torch.Tensor | None = None) -> tuple[torch.Tensor, None]:
        """X [B, T, E] -> (normed in x's dtype, None: the residual is not gated)."""
        normed = _normalize(x)
        return (normed * (1.0 + self.weight.to(normed.dtype))).to(x.dtype), None


class AdaptiveRMSNorm(nn.Module):
    """π0.5's norm: x / rms(x) · (1 + scale) + shift; scale, shift and the residual's gate come from a condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, 3 * width)

    def forward(self, x: torch.Tensor, cond: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """X [B, T, E], cond [B, E] -> (normed, gate [B, 1, E]), both in the dtype of the weights."""
        modulation = self.dense(cond.to(self.dense.weight.dtype))[:, None]
        scale, shift, gate = modulation.chunk(3, dim=-1)
        normed = _normalize(x)
        return torch.addcmul(shift.to(normed.dtype), normed, 1.0 + scale.to(normed.dtype)).to(x.dtype), gate


def _residual(x: torch.Tensor, update: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    return x + update if gate is None else torch.addcmul(x, update, gate)


class GemmaBlock(nn.Module):
    """The parameters of one expert at one depth, and the steps before and after the joint attention."""

    def __init__(self, dimensions: GemmaDimensions, *, adaptive: bool) -> None:
        super().__init__()
        width, head_dim = dimensions.width, dimensions.head_dim
        norm = AdaptiveRMSNorm if adaptive else RMSNorm
        self.head_dim = head_dim
        self.input_norm = norm(width)
        self.q_proj = nn.Linear(width, dimensions.num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, dimensions.num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, dimensions.num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(dimensions.num_heads * head_dim, width, bias=False)
        self.post_attention_norm = norm(width)
        self.gate_proj = nn.Linear(width, dimensions.mlp_dim, bias=False)
        self.up_proj = nn.Linear(width, dimensions.mlp_dim, bias=False)
        self.down_proj = nn.Linear(dimensions.mlp_dim, width, bias=False)

    def queries(self, normed: torch.Tensor, by: Rotation) -> torch.Tensor:
        """[B, T, E] -> rotated queries [B, T, N, D]."""
        return rotate(self.q_proj(normed).unflatten(-1, (-1, self.head_dim)), by)

    def keys_values(self, normed: torch.Tensor, by: Rotation) -> KeysValues:
        """[B, S, E] -> rotated keys, and values."""
        keys = rotate(self.k_proj(normed).unflatten(-1, (-1, self.head_dim)), by)
        return KeysValues(keys, self.v_proj(normed).unflatten(-1, (-1, self.head_dim)))

    def finish(
        self, x: torch.Tensor, attended: torch.Tensor, gate: torch.Tensor | None, cond: torch.Tensor | None
    ) -> torch.Tensor:
        """Everything after the attention: output projection, MLP and both residuals."""
        x = _residual(x, self.o_proj(attended), gate)
        normed, gate = self.post_attention_norm(x, cond)
        hidden = F.gelu(self.gate_proj(normed), approximate="tanh") * self.up_proj(normed)
        return _residual(x, self.down_proj(hidden), gate)


class JointLayer(nn.Module):
    """One depth of both experts. The prefix attends to itself, the suffix to the prefix and itself."""

    def __init__(self, vlm: GemmaDimensions, expert: GemmaDimensions, *, adaptive: bool) -> None:
        super().__init__()
        self.vlm = GemmaBlock(vlm, adaptive=False)
        self.expert = GemmaBlock(expert, adaptive=adaptive)

    def forward(
        self,
        prefix: tuple[torch.Tensor, TokenContext] | KeysValues,
        suffix: tuple[torch.Tensor, TokenContext] | None,
        cond: torch.Tensor | None = None,
        *,
        keys_only: bool = False,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, KeysValues]:
        """Run both experts, or the one whose tokens are given.

        Args:
            prefix: Prefix tokens [B, P, W] and their context, or the keys and values that an earlier call returned.
            suffix: Suffix tokens [B, T, E] and their context; None when only the prefix is wanted.
            cond: Condition [B, E] of the adaptive norms; None for π0.
            keys_only: Stop the prefix at its keys and values. In the last layer nothing else of it reaches the actions.

        Returns:
            Prefix tokens or None, suffix tokens or None, and the prefix's keys and values.
        """
        prefix_out = suffix_out = None
        if isinstance(prefix, KeysValues):
            kv = prefix
        else:
            prefix_out, kv = self._prefix(*prefix, keys_only=keys_only)
        if suffix is not None:
            suffix_out = self._suffix(*suffix, kv, cond)
        return prefix_out, suffix_out, kv

    def _prefix(
        self, x: torch.Tensor, context: TokenContext, *, keys_only: bool
    ) -> tuple[torch.Tensor | None, KeysValues]:
        x = x.to(self.vlm.q_proj.weight.dtype)
        normed, gate = self.vlm.input_norm(x)
        kv = self.vlm.keys_values(normed, context.rotation)
        if keys_only:
            return None, kv
        attended = attend(self.vlm.queries(normed, context.rotation), kv, context.bias)
        return self.vlm.finish(x, attended, gate, None), kv

    def _suffix(
        self, x: torch.Tensor, context: TokenContext, prefix: KeysValues, cond: torch.Tensor | None
    ) -> torch.Tensor:
        x = x.to(self.expert.q_proj.weight.dtype)
        normed, gate = self.expert.input_norm(x, cond)
        own = self.expert.keys_values(normed, context.rotation)
        kv = KeysValues(torch.cat((prefix.keys, own.keys), 1), torch.cat((prefix.values, own.values), 1))
        attended = attend(self.expert.queries(normed, context.rotation), kv, context.bias)
        return self.expert.finish(x, attended, gate, cond)


class TokenEmbedding(nn.Module):
    """Gemma's input embedding: a row of the table times sqrt(width)."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids int [B, T] -> [B, T, W] in the dtype of the table."""
        rows = F.embedding(tokens, self.weight)
        # A Python factor stays float32 inside the kernel; as a bfloat16 tensor it would be off by up to 0.2 %.
        return rows.mul(math.sqrt(self.weight.shape[1]))
