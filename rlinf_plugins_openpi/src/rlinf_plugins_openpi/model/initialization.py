"""Initial values of π0's parameters, as a function of name, shape and a random generator.

Torch and the standard library only. The distributions are those of openpi's JAX sources (`models/gemma.py`,
`models/siglip.py`, `models/pi0.py`) and flax's defaults; `initial_value` documents the one deviation.
"""

from __future__ import annotations

import math

import torch

TRUNCATED_STD = 0.87962566103423978
"""Standard deviation of a unit normal truncated at ±2, by which flax corrects truncated draws."""


def initial_value(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """The initial value of one parameter.

    - Biases, Gemma's norm weights (used as 1 + weight) and the adaptive norms' modulations are zero, LayerNorm weights
      one; the biases of SigLIP's MLP are normal(1e-6).
    - SigLIP's attention and MLP are Glorot-uniform, its positions normal(1/sqrt(width)).
    - The token embedding is normal(0.01) (flax's default).
    - All other matrices, including the patch embedding, are LeCun-normal, truncated at two standard deviations.
    - So is the image projector, unlike in the reference, where it is zero because PaliGemma is always loaded. From
      zero, the image tower would have no gradient at first, and RMSNorm would multiply the projector's gradient by
      1/sqrt(1e-6).

    Args:
        name: The parameter's name in the module.
        shape: Its whole shape; matrices are [output, input]. For a merged matrix, the shape of one part.
        generator: The only source of randomness.

    Returns:
        Float32 tensor on the CPU.
    """
    if len(shape) == 1:
        return _vector(name, shape, generator)
    if name.startswith("modulation."):
        return torch.zeros(shape, device="cpu")
    if name == "embedding.weight":
        return _normal(shape, 0.01, generator)
    if name.endswith(".position"):
        return _normal(shape, shape[-1] ** -0.5, generator)
    if name.startswith("vision.blocks."):
        bound = math.sqrt(6.0 / (shape[0] + shape[1]))
        return torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator)
    std = math.prod(shape[1:]) ** -0.5 / TRUNCATED_STD
    value = torch.empty(shape, device="cpu")
    return torch.nn.init.trunc_normal_(value, std=std, a=-2.0 * std, b=2.0 * std, generator=generator)


def _vector(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if name.endswith((".fc1.bias", ".fc2.bias")):
        return _normal(shape, 1e-6, generator)
    layer_norm = name.endswith((".layer_norm1.weight", ".layer_norm2.weight", "vision.head.norm.weight"))
    return torch.ones(shape, device="cpu") if layer_norm else torch.zeros(shape, device="cpu")


def _normal(shape: tuple[int, ...], std: float, generator: torch.Generator) -> torch.Tensor:
    return torch.empty(shape, device="cpu").normal_(0.0, std, generator=generator)
