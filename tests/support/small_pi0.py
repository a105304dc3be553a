"""A π0 or π0.5 with small images, grouped heads and a few layers, and batches of samples that differ in length."""

import torch

from rlinf_plugins_openpi.model.dimensions import GemmaDimensions, Pi0Dimensions, VisionDimensions
from rlinf_plugins_openpi.model.packing import pack
from rlinf_plugins_openpi.model.pi0 import Pi0

VLM = GemmaDimensions(width=16, depth=3, mlp_dim=24, num_heads=4, num_kv_heads=2, head_dim=8)
EXPERT = GemmaDimensions(width=12, depth=3, mlp_dim=20, num_heads=4, num_kv_heads=2, head_dim=8)
VISION = VisionDimensions(width=8, depth=2, mlp_dim=12, num_heads=2, patch_size=4, image_size=8)


def build(pi05, dtype=torch.float32):
    model = Pi0(Pi0Dimensions(pi05, 6, 3, 32, VLM, EXPERT, VISION))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def batch_of(cameras, texts, dtype=torch.float32, seed=1):
    """A batch of samples with these cameras (booleans) and prompts of these lengths, padded to the longest."""
    generator, size = torch.Generator().manual_seed(seed), len(texts)

    def normal(*shape):
        return torch.randn(size, *shape, generator=generator).to(dtype)

    return {
        "images": torch.randint(0, 256, (size, len(cameras[0]), 8, 8, 3), dtype=torch.uint8, generator=generator),
        "image_mask": torch.tensor(cameras),
        "tokens": torch.randint(0, 32, (size, max(texts) + 2), generator=generator),
        "token_mask": torch.arange(max(texts) + 2) < torch.tensor(texts)[:, None],
        "state": normal(6),
        "actions": normal(3, 6),
        "noise": normal(3, 6),
        "time": torch.rand(size, generator=generator).to(dtype),
    }


def with_packing(batch, multiple):
    masks = (batch["image_mask"], batch["token_mask"])
    return {**batch, "packing": pack(*masks, image_tokens=VISION.num_tokens, multiple=multiple)}
