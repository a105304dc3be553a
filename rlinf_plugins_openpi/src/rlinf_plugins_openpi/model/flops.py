"""The useful operations of a π0 or π0.5 sample: those that any implementation has to do.

Standard library only, so that `rlinf plan` needs no torch. Counted are matrix products and attention, with two
operations per multiply-add, for real tokens and only where they reach the loss: no missing cameras, no padding, no
language-model head, and only keys and values in the VLM's last layer. The backward pass counts twice the forward pass,
but once where the input is data. Norms, activations, the softmax and recomputation are not counted.

Letters: E width of the action expert, H action horizon, A action width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rlinf_plugins_openpi.model.dimensions import GemmaDimensions, Pi0Dimensions, VisionDimensions


class ForwardFlops(NamedTuple):
    """Operations of one sample's forward pass."""

    vision: float
    """The image tower and its projection to the VLM's width."""
    vlm: float
    """The VLM's matrices."""
    attention: float
    """Attention of the prefix to itself, and of the suffix to prefix and suffix."""
    expert: float
    """The action expert's matrices, including the norms' modulations and the small projections."""


def forward_flops(dimensions: Pi0Dimensions, *, images: int, text: int) -> ForwardFlops:
    """Operations of one sample's forward pass, by part.

    Args:
        dimensions: The sizes of the model, including the action horizon.
        images: Number of cameras in the sample.
        text: Tokens of its prompt, without padding.
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
    # Backward has a product for the weights and one for the input; pixels, actions, state and time need no gradient.
    return 3 * sum(forward_flops(dimensions, images=images, text=text)) - 2.0 * _on_data(dimensions, images)


def _layer(gemma: GemmaDimensions) -> int:
    """Multiply-adds per token in one layer's matrices: queries and output, keys and values, gate, up and down."""
    heads = 2 * gemma.num_heads + 2 * gemma.num_kv_heads
    return gemma.width * (heads * gemma.head_dim + 3 * gemma.mlp_dim)


def _vision(vision: VisionDimensions, output_width: int) -> int:
    """Multiply-adds per image: patches, blocks with their attention, projection."""
    width, tokens = vision.width, vision.num_tokens
    block = 4 * width * width + 2 * width * vision.mlp_dim + 2 * tokens * width
    return _patches(vision) + tokens * (vision.depth * block + width * output_width)


def _patches(vision: VisionDimensions) -> int:
    return vision.num_tokens * 3 * vision.patch_size**2 * vision.width


def _conditioning(dimensions: Pi0Dimensions) -> int:
    """Multiply-adds that embed actions, time and state, modulate the norms, and project tokens to the velocity."""
    width, horizon = dimensions.expert.width, dimensions.action_horizon
    ends = 2 * horizon * dimensions.action_dim * width  # [A -> E] and back, for every action.
    if not dimensions.pi05:
        return ends + dimensions.action_dim * width + 3 * horizon * width * width  # State; [2E -> E -> E].
    norms = 2 * dimensions.expert.depth + 1
    return ends + 2 * width * width + 3 * norms * width * width  # [E -> E -> E]; scale, shift and gate per norm.


def _on_data(dimensions: Pi0Dimensions, images: int) -> int:
    """Multiply-adds of the matrices whose input is data."""
    width, action = dimensions.expert.width, dimensions.action_dim
    rest = width * width if dimensions.pi05 else action * width  # Time, or state.
    return images * _patches(dimensions.vision) + dimensions.action_horizon * action * width + rest
