"""Two Gemma transformers that attend jointly: the VLM reads the prefix, the action expert the suffix.

Torch and the standard library only. Axes: B batch, T suffix tokens, R rows of the packed prefix, W VLM width, E a
block's width. `JointLayer` contains the blocks of both experts at one depth: it is one unit of sharding, always called
as a module. The compute dtype is that of its weights; norm statistics are float32 (float64 in a float64 model).
Matrices with the same input are merged into one: queries, keys and values; gate and up; all modulations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from rlinf_plugins_openpi.model.attention import (
    KeysValues,
    PrefixContext,
    Rotation,
    SuffixContext,
    attend_jointly,
    attend_within,
    for_suffix,
    rotate,
)

if TYPE_CHECKING:
    from rlinf_plugins_openpi.model.dimensions import GemmaDimensions

RMS_NORM_EPS = 1e-6


def _normalize(x: torch.Tensor) -> torch.Tensor:
    """Divide by the root mean square over the last axis, in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + RMS_NORM_EPS)


class RMSNorm(nn.Module):
    """Gemma's norm: x / rms(x) · (1 + weight)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: torch.Tensor, modulation: torch.Tensor | None = None) -> tuple[torch.Tensor, None]:
        """X [..., E] -> (normed x in its dtype, None: the residual is not gated)."""
        normed = _normalize(x)
        return (normed * (1.0 + self.weight.to(normed.dtype))).to(x.dtype), None


class AdaptiveRMSNorm(nn.Module):
    """π0.5's norm: x / rms(x) · (1 + scale) + shift. Scale, shift and the residual's gate come from `Modulation`."""

    def forward(self, x: torch.Tensor, modulation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """X [B, T, E], modulation [B, 3, 1 or T, E] -> (normed x in its dtype, gate [B, 1 or T, E])."""
        scale, shift, gate = modulation.unbind(1)
        normed = _normalize(x)
        return torch.addcmul(shift.to(normed.dtype), normed, 1.0 + scale.to(normed.dtype)).to(x.dtype), gate


class Modulation(nn.Module):
    """Scale, shift and gate of all adaptive norms from a condition, by one product instead of one per norm."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.width, self.depth = width, depth
        norms = 2 * depth + 1
        self.weight = nn.Parameter(torch.empty(norms * 3 * width, width))
        self.bias = nn.Parameter(torch.empty(norms * 3 * width))

    def forward(self, cond: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Cond [B, E], or [B, T, E] if tokens differ, to what the norms take.

        Returns:
            [B, 2, 3, 1 or T, E] for the two norms of each layer, and [B, 3, 1 or T, E] for the final norm.
        """
        every = F.linear(cond.to(self.weight.dtype), self.weight, self.bias)
        if cond.ndim == 2:
            all_norms = every.view(len(cond), -1, 3, 1, self.width)
        else:
            all_norms = every.view(*cond.shape[:2], -1, 3, self.width).movedim(1, 3)
        *layers, last = torch.split(all_norms, [2] * self.depth + [1], dim=1)
        return layers, last[:, 0]


def _residual(x: torch.Tensor, update: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    return x + update if gate is None else torch.addcmul(x, update, gate)


class _AfterAttention(nn.Module):
    """The part of a block after its attention."""

    def __init__(self, dimensions: GemmaDimensions, *, adaptive: bool) -> None:
        super().__init__()
        width = dimensions.width
        self.head_dim, self.kv_heads = dimensions.head_dim, dimensions.num_kv_heads
        self.o_proj = nn.Linear(dimensions.num_heads * dimensions.head_dim, width, bias=False)
        self.post_attention_norm = AdaptiveRMSNorm() if adaptive else RMSNorm(width)
        self.gate_up = nn.Linear(width, 2 * dimensions.mlp_dim, bias=False)
        self.down_proj = nn.Linear(dimensions.mlp_dim, width, bias=False)

    def finish(
        self,
        x: torch.Tensor,
        attended: torch.Tensor,
        gate: torch.Tensor | None = None,
        modulation: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Output projection, MLP and both residuals."""
        x = _residual(x, self.o_proj(attended), gate)
        normed, gate = self.post_attention_norm(x, modulation)
        gated, up = self.gate_up(normed).chunk(2, dim=-1)
        return _residual(x, self.down_proj(F.gelu(gated, approximate="tanh") * up), gate)


class GemmaBlock(_AfterAttention):
    """One expert at one depth: the steps before and after the joint attention."""

    def __init__(self, dimensions: GemmaDimensions, *, adaptive: bool) -> None:
        super().__init__(dimensions, adaptive=adaptive)
        heads = dimensions.num_heads + 2 * dimensions.num_kv_heads
        self.input_norm = AdaptiveRMSNorm() if adaptive else RMSNorm(dimensions.width)
        self.qkv = nn.Linear(dimensions.width, heads * dimensions.head_dim, bias=False)

    def project(self, normed: torch.Tensor, by: Rotation) -> tuple[torch.Tensor, KeysValues]:
        """[..., E] -> rotated queries [..., N, D], and keys and values."""
        heads = self.qkv(normed).unflatten(-1, (-1, self.head_dim))
        queries = rotate(heads[..., : -2 * self.kv_heads, :], by)
        return queries, _keys_values(heads[..., -2 * self.kv_heads :, :], by)


class KeysValuesBlock(nn.Module):
    """The VLM's part of the last layer: of the prefix, only keys and values reach the actions."""

    def __init__(self, dimensions: GemmaDimensions) -> None:
        super().__init__()
        self.head_dim = dimensions.head_dim
        self.input_norm = RMSNorm(dimensions.width)
        self.kv = nn.Linear(dimensions.width, 2 * dimensions.num_kv_heads * dimensions.head_dim, bias=False)

    def project(self, normed: torch.Tensor, by: Rotation) -> KeysValues:
        """[R, W] -> rotated keys, and values."""
        return _keys_values(self.kv(normed).unflatten(-1, (-1, self.head_dim)), by)


def _keys_values(heads: torch.Tensor, by: Rotation) -> KeysValues:
    keys, values = heads.chunk(2, dim=-2)
    return KeysValues(rotate(keys, by), values)


class PrefixEnd(_AfterAttention):
    """The rest of the VLM: its last layer after keys and values, and its final norm. No loss reaches these parameters.

    Published weights contain them, so they are kept and exported. Keys and values come from the last layer.
    """

    def __init__(self, dimensions: GemmaDimensions) -> None:
        super().__init__(dimensions, adaptive=False)
        self.q_proj = nn.Linear(dimensions.width, dimensions.num_heads * dimensions.head_dim, bias=False)
        self.norm = RMSNorm(dimensions.width)

    def forward(self, x: torch.Tensor, last: KeysValuesBlock, context: PrefixContext) -> torch.Tensor:
        """Input of the last layer [R, W] -> the VLM's output [R, W], after its final norm."""
        normed, _ = last.input_norm(x)
        kv = last.project(normed, context.rotation)
        queries = rotate(self.q_proj(normed).unflatten(-1, (-1, self.head_dim)), context.rotation)
        finished = self.finish(x, attend_within(queries, kv, context.attention)[0])
        out: torch.Tensor = self.norm(finished)[0]
        return out


class JointLayer(nn.Module):
    """Both experts at one depth. The prefix attends to itself, the suffix to the prefix and itself.

    Args:
        vlm: Dimensions of the expert for the prefix.
        expert: Dimensions of the expert for the suffix.
        adaptive: Modulate the norms of the suffix (π0.5).
        last: The last layer, where the prefix needs only keys and values.
    """

    def __init__(self, vlm: GemmaDimensions, expert: GemmaDimensions, *, adaptive: bool, last: bool) -> None:
        super().__init__()
        self.vlm = KeysValuesBlock(vlm) if last else GemmaBlock(vlm, adaptive=False)
        self.expert = GemmaBlock(expert, adaptive=adaptive)

    def forward(
        self,
        prefix: tuple[torch.Tensor, PrefixContext] | KeysValues,
        suffix: tuple[torch.Tensor, SuffixContext] | None,
        modulation: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, KeysValues]:
        """Run both experts, or only the one whose tokens are given.

        Args:
            prefix: Rows of the prefix [R, W] and their context, or the keys and values that an earlier call returned.
            suffix: Suffix tokens [B, T, E] and their context; None to run the prefix only.
            modulation: [B, 2, 3, 1 or T, E] for the two norms of the suffix; None for π0.

        Returns:
            Rows of the prefix, or None if they are not given or this is the last layer; suffix tokens or None; the
            prefix's keys and values as the suffix reads them (`attention.for_suffix`).
        """
        prefix_out = suffix_out = None
        if isinstance(prefix, KeysValues):
            kv = prefix
        else:
            prefix_out, kv = self._prefix(*prefix)
        if suffix is not None:
            suffix_out = self._suffix(*suffix, kv, modulation)
        return prefix_out, suffix_out, kv

    def _prefix(self, x: torch.Tensor, context: PrefixContext) -> tuple[torch.Tensor | None, KeysValues]:
        block = self.vlm
        if isinstance(block, KeysValuesBlock):
            normed, _ = block.input_norm(x.to(block.kv.weight.dtype))
            return None, for_suffix(block.project(normed, context.rotation), context.attention)
        x = x.to(block.qkv.weight.dtype)
        queries, kv = block.project(block.input_norm(x)[0], context.rotation)
        attended, read = attend_within(queries, kv, context.attention)
        return block.finish(x, attended), read

    def _suffix(
        self, x: torch.Tensor, context: SuffixContext, prefix: KeysValues, modulation: torch.Tensor | None
    ) -> torch.Tensor:
        block = self.expert
        before, after = (None, None) if modulation is None else modulation.unbind(1)
        x = x.to(block.qkv.weight.dtype)
        normed, gate = block.input_norm(x, before)
        queries, own = block.project(normed, context.rotation)
        return block.finish(x, attend_jointly(queries, prefix, own, context.attention), gate, after)


class TokenEmbedding(nn.Module):
    """Gemma's input embedding: a row of the table times sqrt(width)."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids int [B, T] -> [B, T, W] in the dtype of the table."""
        rows = F.embedding(tokens, self.weight)
        # A Python factor stays float32 inside the kernel; as a bfloat16 tensor it would have an error of up to 0.2 %.
        return rows.mul(math.sqrt(self.weight.shape[1]))


class EmbeddingRows(TokenEmbedding):
    """The trained rows of a token embedding as a table of their own, the only one read in training.

    Args:
        rows: The token ids of its rows, ascending.
        vocab_size: Rows of the whole embedding.
        width: The width of both.
    """

    def __init__(self, rows: Sequence[int], vocab_size: int, width: int) -> None:
        super().__init__(len(rows), width)
        self.rows = tuple(rows)
        self.places: torch.Tensor
        self.register_buffer("places", torch.empty(vocab_size, dtype=torch.int32), persistent=False)
        self.rebuild_buffers()

    def rebuild_buffers(self) -> None:
        """Fill in the row of each token id; out of range for ids without a row, so that looking them up fails."""
        self.places.fill_(len(self.rows))
        self.places[torch.tensor(self.rows, device=self.places.device)] = torch.arange(
            len(self.rows), dtype=torch.int32, device=self.places.device
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids of the whole vocabulary, int [B, T] -> [B, T, W] in the dtype of the table."""
        return super().forward(self.places[tokens])
