"""How much computing a sample of π0 or π0.5 is worth: what any implementation must do, whatever it does besides.

Standard library only, so that a plan can be made without torch. Counted are matrix products and attention, two
operations a multiply-add, over tokens that exist and only where they reach the loss: no camera that the sample lacks,
no padding, no language-model head, and of the VLM's last layer keys and values alone. The backward pass counts twice
the forward pass, but once where the input is data; norms, activations and the softmax count nothing, and neither does
what is computed anew to save memory.

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
    # Backward, a product for the weights and one for the input each: pixels, actions, state and time need none.
    return 3 * sum(forward_flops(dimensions, images=images, text=text)) - 2.0 * _on_data(dimensions, images)


def _layer(gemma: GemmaDimensions) -> int:
    """Multiply-adds of a token in one layer's matrices: queries and output, keys and values, gate, up and down."""
    heads = 2 * gemma.num_heads + 2 * gemma.num_kv_heads
    return gemma.width * (heads * gemma.head_dim + 3 * gemma.mlp_dim)


def _vision(vision: VisionDimensions, output_width: int) -> int:
    """Multiply-adds of an image: patches, blocks with their attention, projection."""
    width, tokens = vision.width, vision.num_tokens
    block = 4 * width * width + 2 * width * vision.mlp_dim + 2 * tokens * width
    return _patches(vision) + tokens * (vision.depth * block + width * output_width)


def _patches(vision: VisionDimensions) -> int:
    return vision.num_tokens * 3 * vision.patch_size**2 * vision.width


def _conditioning(dimensions: Pi0Dimensions) -> int:
    """Multiply-adds that turn actions, time and state into tokens, steer the norms and turn tokens into velocity."""
    width, horizon = dimensions.expert.width, dimensions.action_horizon
    ends = 2 * horizon * dimensions.action_dim * width  # [A -> E] and back, for every action.
    if not dimensions.pi05:
        return ends + dimensions.action_dim * width + 3 * horizon * width * width  # State; [2E -> E -> E].
    norms = 2 * dimensions.expert.depth + 1
    return ends + 2 * width * width + 3 * norms * width * width  # [E -> E -> E]; a scale, shift and gate a norm.


def _on_data(dimensions: Pi0Dimensions, images: int) -> int:
    """Multiply-adds of the matrices whose input is data."""
    width, action = dimensions.expert.width, dimensions.action_dim
    rest = width * width if dimensions.pi05 else action * width  # Time, or state.
    return images * _patches(dimensions.vision) + dimensions.action_horizon * action * width + rest
