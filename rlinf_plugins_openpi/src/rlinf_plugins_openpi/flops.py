"""How much computing a sample of π0 or π0.5 is worth: what any implementation must do, whatever it does besides.

Standard library only, so that a plan can be made without torch. Counted are matrix products and attention, two operations
a multiply-add, over tokens that exist and only where they reach the loss: no camera that the sample lacks, no padding,
no language-model head, and of the VLM's last layer keys and values alone. The backward pass counts twice the forward
pass; norms, activations and the softmax count nothing, recomputed activations neither.

Letters: P prefix tokens (images and text), T suffix tokens, W and E the widths of VLM and expert, N query heads and K
key heads of D numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rlinf_plugins_openpi.dimensions import GemmaDimensions, Pi0Dimensions, VisionDimensions

BACKWARD = 2
"""Operations of the backward pass for each of the forward pass: one product for the inputs, one for the weights."""


class ForwardFlops(NamedTuple):
    """Operations of one sample's forward pass."""

    vision: float
    """The image tower and its projection to the VLM's width."""
    vlm: float
    """The VLM's matrices."""
    attention: float
    """The prefix's attention to itself, the suffix's to the prefix and itself."""
    expert: float
    """The action expert's matrices, the norms' modulations and the small projections among them."""


def forward_flops(dimensions: Pi0Dimensions, *, images: int, text: int) -> ForwardFlops:
    """Operations of one sample's forward pass, by part.

    Args:
        dimensions: The model's sizes; the action horizon counts.
        images: Cameras that the sample has.
        text: Tokens of its prompt, padding not counted.
    """
    vlm, expert, depth = dimensions.vlm, dimensions.expert, dimensions.vlm.depth
    prefix = images * dimensions.vision.num_tokens + text
    suffix = dimensions.action_horizon + (0 if dimensions.pi05 else 1)
    keys_values = 2 * vlm.width * vlm.num_kv_heads * vlm.head_dim
    pairs = (depth - 1) * prefix * prefix + depth * suffix * (prefix + suffix)
    return ForwardFlops(
        vision=2.0 * images * _vision(dimensions.vision, vlm.width),
        vlm=2.0 * prefix * ((depth - 1) * _layer(vlm) + keys_values),
        attention=2.0 * pairs * 2 * vlm.num_heads * vlm.head_dim,
        expert=2.0 * (suffix * depth * _layer(expert) + _conditioning(dimensions)),
    )


def training_flops(dimensions: Pi0Dimensions, *, images: int, text: int) -> float:
    """Operations of one sample's forward and backward pass with all parameters trained; arguments as above."""
    return (1 + BACKWARD) * sum(forward_flops(dimensions, images=images, text=text))


def _layer(gemma: GemmaDimensions) -> int:
    """Multiply-adds of a token in one layer's matrices: queries and output, keys and values, gate, up and down."""
    heads = 2 * gemma.num_heads + 2 * gemma.num_kv_heads
    return gemma.width * (heads * gemma.head_dim + 3 * gemma.mlp_dim)


def _vision(vision: VisionDimensions, output_width: int) -> int:
    """Multiply-adds of an image: patches, blocks with their attention, projection."""
    width, tokens = vision.width, vision.num_tokens
    block = 4 * width * width + 2 * width * vision.mlp_dim + 2 * tokens * width
    return tokens * (3 * vision.patch_size**2 * width + vision.depth * block + width * output_width)


def _conditioning(dimensions: Pi0Dimensions) -> int:
    """Multiply-adds of what turns actions, time and state into tokens, steers the norms and turns tokens into velocity."""
    width, action, horizon = dimensions.expert.width, dimensions.action_dim, dimensions.action_horizon
    ends = 2 * horizon * action * width
    if not dimensions.pi05:
        return ends + action * width + horizon * (2 * width * width + width * width)
    norms = 2 * dimensions.expert.depth + 1
    return ends + 2 * width * width + norms * 3 * width * width
