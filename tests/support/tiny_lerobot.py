"""lerobot's π0 and π0.5 in our test sizes; its configs offer only the published size."""

from policy_step.lerobot import build, of_size

from rlinf_plugins_openpi.model.dimensions import GemmaDimensions, Pi0Dimensions, VisionDimensions

__all__ = ["build", "of_size", "tiny_dimensions"]

# Eight heads: lerobot's joint attention has that number written into it.
GEMMA = GemmaDimensions(width=16, depth=2, mlp_dim=12, num_heads=8, num_kv_heads=1, head_dim=4)
EXPERT = GemmaDimensions(width=12, depth=2, mlp_dim=10, num_heads=8, num_kv_heads=1, head_dim=4)
VISION = VisionDimensions(width=8, depth=2, mlp_dim=6, num_heads=2, patch_size=56)


def tiny_dimensions(*, pi05, vocab_size=512):
    """Sizes that both can build, for images of 224 pixels."""
    return Pi0Dimensions(pi05, 8, 5, vocab_size, GEMMA, EXPERT, VISION)
