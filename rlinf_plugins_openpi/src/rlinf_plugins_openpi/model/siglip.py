"""The SigLIP image tower: patches with learned positions, pre-LN blocks, and a projection to the VLM's width.

Torch and the standard library only. Axes: N images, P patches, D vision width, W VLM width. A module computes in the
dtype of its weights: patches and positions are float32 by contract (their unit is never cast), the blocks are not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from rlinf_plugins_openpi.model.dimensions import VisionDimensions

LAYER_NORM_EPS = 1e-6


class PatchEmbedding(nn.Module):
    """Embeds images as patch tokens with positions, in the dtype of its weights."""

    def __init__(self, dimensions: VisionDimensions) -> None:
        super().__init__()
        self.patch_size = dimensions.patch_size
        self.image_size = dimensions.image_size
        self.weight = nn.Parameter(torch.empty(dimensions.width, 3, dimensions.patch_size, dimensions.patch_size))
        self.bias = nn.Parameter(torch.empty(dimensions.width))
        self.position = nn.Parameter(torch.empty(dimensions.num_tokens, dimensions.width))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [N, height, width, 3], uint8 or float32 in [-1, 1] -> [N, P, D], patches row by row.

        A convolution with stride equal to kernel size is one matrix product; bytes are rearranged before conversion.
        """
        expected = (self.image_size, self.image_size, 3)
        if images.dtype not in (torch.uint8, torch.float32) or images.shape[1:] != expected:
            raise ValueError(
                f"images must be uint8, or float32 in [-1, 1], [N, {', '.join(map(str, expected))}]: "
                f"{images.dtype} {list(images.shape)}"
            )
        side, size = self.image_size // self.patch_size, self.patch_size
        patches = (
            images.reshape(-1, side, size, side, size, 3)
            .permute(0, 1, 3, 5, 2, 4)
            .reshape(-1, side * side, 3 * size * size)
        )
        pixels = patches.to(self.weight.dtype)
        if images.dtype == torch.uint8:
            pixels = pixels.div_(255.0).mul_(2.0).sub_(1.0)
        return F.linear(pixels, self.weight.flatten(1), self.bias) + self.position


class VisionBlock(nn.Module):
    """Pre-LN block: full multi-head attention, then a two-layer MLP with tanh-approximated GELU."""

    def __init__(self, dimensions: VisionDimensions) -> None:
        super().__init__()
        width = dimensions.width
        self.num_heads = dimensions.num_heads
        self.layer_norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.qkv = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.layer_norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.fc1 = nn.Linear(width, dimensions.mlp_dim)
        self.fc2 = nn.Linear(dimensions.mlp_dim, width)

    def forward(self, x_NPD: torch.Tensor) -> torch.Tensor:
        """[N, P, D] -> [N, P, D] in the dtype of the weights."""
        x = x_NPD.to(self.fc1.weight.dtype)
        q, k, v = self.qkv(self.layer_norm1(x)).unflatten(-1, (3, self.num_heads, -1)).transpose(1, 3).unbind(2)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out_proj(attended)
        out: torch.Tensor = x + self.fc2(F.gelu(self.fc1(self.layer_norm2(x)), approximate="tanh"))
        return out


class VisionHead(nn.Module):
    """Final norm and projection to the VLM's width."""

    def __init__(self, dimensions: VisionDimensions, output_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dimensions.width, eps=LAYER_NORM_EPS)
        self.projector = nn.Linear(dimensions.width, output_width)

    def forward(self, x_NPD: torch.Tensor) -> torch.Tensor:
        """[N, P, D] -> [N, P, W]."""
        tokens_NPW: torch.Tensor = self.projector(self.norm(x_NPD.to(self.projector.weight.dtype)))
        return tokens_NPW


class SigLIP(nn.Module):
    """The image tower. Its children are called as modules, so that each can be a unit of sharding."""

    def __init__(self, dimensions: VisionDimensions, output_width: int) -> None:
        super().__init__()
        self.patch_embedding = PatchEmbedding(dimensions)
        self.blocks = nn.ModuleList(VisionBlock(dimensions) for _ in range(dimensions.depth))
        self.head = VisionHead(dimensions, output_width)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [N, height, width, 3], uint8 or float32 in [-1, 1] -> image tokens [N, P, W]."""
        x: torch.Tensor = self.patch_embedding(images)
        for block in self.blocks:
            x = block(x)
        tokens_NPW: torch.Tensor = self.head(x)
        return tokens_NPW
