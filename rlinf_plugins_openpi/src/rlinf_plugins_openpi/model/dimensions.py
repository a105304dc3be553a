"""The sizes of π0 and π0.5. Variants differ only in these numbers.

Standard library only, so that configs can name a variant without loading torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Variant = Literal["base", "dummy"]

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
"""The cameras of the policies, in the model's order."""

IMAGE_SIZE = 224
"""Height and width in pixels, for which the image tower has positions."""


@dataclass(frozen=True)
class GemmaDimensions:
    """One Gemma-style transformer."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: rotary embedding rotates pairs")


@dataclass(frozen=True)
class VisionDimensions:
    """A SigLIP image tower with square images and square patches; both sizes are in pixels."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    patch_size: int = 14
    image_size: int = 224

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"vision width ({self.width}) must be a multiple of num_heads ({self.num_heads})")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size ({self.image_size}) must be a multiple of patch_size ({self.patch_size})")

    @property
    def num_tokens(self) -> int:
        """Number of tokens per image."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class Pi0Dimensions:
    """A whole π0 (`pi05=False`) or π0.5 (`pi05=True`)."""

    pi05: bool
    action_dim: int
    """Width A of state and actions in the model, including padding."""
    action_horizon: int
    """Actions H in a chunk."""
    vocab_size: int
    vlm: GemmaDimensions
    """The expert that reads images and text."""
    expert: GemmaDimensions
    """The expert that reads noisy actions."""
    vision: VisionDimensions

    def __post_init__(self) -> None:
        for field in ("depth", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(self.vlm, field) != getattr(self.expert, field):
                raise ValueError(
                    f"the two experts attend jointly: {field} must be equal, not {self.vlm}, {self.expert}"
                )
        if self.expert.width % 2 or self.expert.width < 4:
            raise ValueError(
                f"expert width ({self.expert.width}) must be even and at least 4: half are sines, half cosines"
            )

    @classmethod
    def of(cls, variant: Variant, *, pi05: bool, action_dim: int, action_horizon: int) -> Pi0Dimensions:
        """The dimensions of a named variant.

        Args:
            variant: `"base"`: the published size, 3.3 billion parameters; `"dummy"`: trains from scratch on a CPU.
            pi05: π0.5 rather than π0.
            action_dim: Width of state and actions, including padding.
            action_horizon: Actions in a chunk.

        Raises:
            KeyError: No such variant.
        """
        sizes = VARIANTS[variant]
        return cls(pi05, action_dim, action_horizon, sizes.vocab_size, sizes.vlm, sizes.expert, sizes.vision)


class VariantSizes(NamedTuple):
    """The sizes that a variant sets; the rest of `Pi0Dimensions` comes from the policy's config."""

    vocab_size: int
    vlm: GemmaDimensions
    expert: GemmaDimensions
    vision: VisionDimensions


VARIANTS: dict[Variant, VariantSizes] = {
    # PaliGemma 3B at 224 px (Gemma 2B, SigLIP So400m/14) and openpi's 300 M action expert.
    "base": VariantSizes(
        vocab_size=257_152,
        vlm=GemmaDimensions(width=2048, depth=18, mlp_dim=16_384, num_heads=8, num_kv_heads=1, head_dim=256),
        expert=GemmaDimensions(width=1024, depth=18, mlp_dim=4096, num_heads=8, num_kv_heads=1, head_dim=256),
        vision=VisionDimensions(width=1152, depth=27, mlp_dim=4304, num_heads=16),
    ),
    # Chosen by trial on examples/data/metaworld_3tasks: wider towers or 14-pixel patches learn no better in equal time.
    "dummy": VariantSizes(
        vocab_size=512,
        vlm=GemmaDimensions(width=64, depth=3, mlp_dim=256, num_heads=4, num_kv_heads=1, head_dim=16),
        expert=GemmaDimensions(width=64, depth=3, mlp_dim=256, num_heads=4, num_kv_heads=1, head_dim=16),
        vision=VisionDimensions(width=64, depth=3, mlp_dim=256, num_heads=4, patch_size=28),
    ),
}
"""The published sizes, and a small variant for tests and the quickstart."""
