"""Cases of `benchmarks/training_step.py`: sizes of the model, and observations like those of well-known datasets.

NumPy and the standard library, so that every side, in whatever environment, makes the same samples.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from rlinf_plugins_openpi.model.dimensions import (
    CAMERAS,
    IMAGE_SIZE,
    GemmaDimensions,
    Pi0Dimensions,
    VisionDimensions,
)
from rlinf_plugins_openpi.model.flops import training_flops

ACTION_DIM = 32


class Case(NamedTuple):
    """Shapes of the observations of one dataset."""

    pi05: bool
    images: int
    """Cameras that every sample has; the policies have three."""
    text: int
    """Tokens of a prompt."""
    horizon: int
    like: str

    @property
    def room(self) -> int:
        """Tokens to which peers pad every prompt."""
        return 200 if self.pi05 else 48


CASES = {
    "two_of_three": Case(True, 2, 57, 10, "LIBERO"),
    "three_of_three": Case(True, 3, 85, 50, "ALOHA"),
    "one_of_three": Case(True, 1, 40, 10, "MetaWorld"),
    "same_tokens": Case(True, 3, 200, 10, "nothing absent, no padding"),
    "pi0_two_of_three": Case(False, 2, 17, 50, "LIBERO"),
}
"""Token counts of LIBERO, ALOHA and MetaWorld are estimates: PaliGemma's tokenizer splits numbers into digits."""

SIZES = {
    "small": Pi0Dimensions(
        pi05=True,
        action_dim=ACTION_DIM,
        action_horizon=10,
        # A 0.27th of the VLM's other parameters, as at real size. Embedding rows cost only a look-up and their update.
        vocab_size=4096,
        vlm=GemmaDimensions(width=256, depth=4, mlp_dim=1024, num_heads=8, num_kv_heads=1, head_dim=32),
        expert=GemmaDimensions(width=128, depth=4, mlp_dim=512, num_heads=8, num_kv_heads=1, head_dim=32),
        vision=VisionDimensions(width=128, depth=4, mlp_dim=512, num_heads=4),
    ),
    # Eight heads: that number is hard-coded in lerobot's and openpi's joint attention.
    "minimal": Pi0Dimensions(
        pi05=True,
        action_dim=ACTION_DIM,
        action_horizon=10,
        vocab_size=512,
        vlm=GemmaDimensions(width=16, depth=2, mlp_dim=12, num_heads=8, num_kv_heads=1, head_dim=4),
        expert=GemmaDimensions(width=12, depth=2, mlp_dim=10, num_heads=8, num_kv_heads=1, head_dim=4),
        vision=VisionDimensions(width=8, depth=2, mlp_dim=6, num_heads=2, patch_size=56),
    ),
    "base": Pi0Dimensions.of("base", pi05=True, action_dim=ACTION_DIM, action_horizon=10),
}
"""`small` is for comparisons on CPUs, `base` the published size, `minimal` for tests of the benchmark itself."""


def dimensions(size: str, case: Case, *, vocabulary: int | None = None) -> Pi0Dimensions:
    """The model's sizes for a case; `vocabulary` replaces the size's own."""
    sized = replace(SIZES[size], pi05=case.pi05, action_horizon=case.horizon)
    return sized if vocabulary is None else replace(sized, vocab_size=vocabulary)


def make_samples(
    case: Case, sized: Pi0Dimensions, count: int, *, seed: int = 0, spread: float = 0.0
) -> list[dict[str, Any]]:
    """Encoded samples, as our pipeline hands them to `collate.stack`, of random numbers.

    Args:
        case: What is there.
        sized: The model's sizes.
        count: How many.
        seed: Of the random numbers.
        spread: Standard deviation of the prompts' lengths, in tokens; 0: all have the case's length.
    """
    random = np.random.default_rng(seed)
    names = CAMERAS[: case.images]
    lengths = np.clip(np.rint(random.normal(case.text, spread, count)), 1, case.room).astype(int)

    def one(length: int) -> dict[str, Any]:
        chunk = (case.horizon, sized.action_dim)
        return {
            "images": {name: random.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8) for name in names},
            "tokens": np.where(np.arange(case.room) < length, random.integers(1, sized.vocab_size, case.room), 0),
            "token_mask": np.arange(case.room) < length,
            "state": random.standard_normal(sized.action_dim, dtype=np.float32),
            "actions": random.standard_normal(chunk, dtype=np.float32),
            "actions_is_pad": np.zeros(case.horizon, dtype=np.bool_),
            "noise": random.standard_normal(chunk, dtype=np.float32),
            "time": np.float32(random.uniform(0.001, 1.0)),
        }

    return [one(int(length)) for length in lengths]


def useful_flops(samples: list[dict[str, Any]], sized: Pi0Dimensions) -> float:
    """Useful operations of training on these samples."""
    return sum(
        training_flops(sized, images=len(sample["images"]), text=int(sample["token_mask"].sum())) for sample in samples
    )


def padded(samples: list[dict[str, Any]], slots: int) -> dict[str, Any]:
    """Samples stacked in the peers' format: `slots` cameras, missing ones black and masked; prompts padded.

    Returns:
        `images`: a list of float32 [B, 3, height, width] on [-1, 1]; `image_masks`: a list of bool [B]; `tokens`,
        `token_mask`, `state`, `actions`, `noise` and `time` with the samples' axis first.
    """
    names = CAMERAS[:slots]
    black = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    pictures = [np.stack([sample["images"].get(name, black) for sample in samples]) for name in names]
    stacked = {
        key: np.stack([sample[key] for sample in samples])
        for key in ("tokens", "token_mask", "state", "actions", "noise", "time")
    }
    return stacked | {
        "images": [picture.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1 for picture in pictures],
        "image_masks": [np.array([name in sample["images"] for sample in samples]) for name in names],
    }
