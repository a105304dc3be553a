"""Our tiny π0 or π0.5 and lerobot's module with equal weights, and a batch for both."""

import numpy as np
import torch
from tiny_lerobot import build, tiny_dimensions

from rlinf_plugins_openpi import Pi0Config, Pi05Config
from rlinf_plugins_openpi.lora.apply import add_openpi_lora
from rlinf_plugins_openpi.lora.config import OpenpiLoraConfig
from rlinf_plugins_openpi.model.parts import unpacked
from rlinf_plugins_openpi.model.pi0 import MAX_PERIOD, MIN_PERIOD, Pi0
from rlinf_plugins_openpi.weights.names import EMBEDDING, EMBEDDING_IN_FILES, published_names

CAMERAS, TEXT, BATCH = 2, 9, 3


def pair(size):
    """Ours and lerobot's with equal weights."""
    theirs = build(size)
    ours, generator = Pi0(size), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    names = published_names(size)
    state = theirs.state_dict() | {
        names[name]: value.detach() for name, value in unpacked(dict(ours.named_parameters()), size).items()
    }
    state[EMBEDDING_IN_FILES] = state[EMBEDDING]
    theirs.load_state_dict(state, strict=True)
    return ours, theirs


def adapted_pair(*, pi05, convention):
    """As `pair`, and adapters with random values in ours, also as PEFT has them: published module -> change."""
    size = tiny_dimensions(pi05=pi05)
    ours, theirs = pair(size)
    names = {o.removesuffix(".weight"): n.removesuffix(".weight") for o, n in published_names(size).items()}
    if convention == "openpi":
        lora = OpenpiLoraConfig(convention="openpi", rank_pattern={"vlm": 2, "expert": 3}, base_dtype="fp32")
        add_openpi_lora(ours, lora, names)
    else:
        kind = Pi05Config if pi05 else Pi0Config

        class Tiny(kind):
            @property
            def dimensions(self):
                return size

        lora = OpenpiLoraConfig(
            rank=3, alpha=4, targets=("vlm.attention", "expert"), rank_pattern={"k_proj": 2}, base_dtype="fp32"
        )
        Tiny(variant="dummy", lora=lora).add_lora(ours)
    generator, changes = torch.Generator().manual_seed(3), {}
    with torch.no_grad():
        for parameter in (p for name, p in ours.named_parameters() if "lora_" in name):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        for parameter in (p for name, p in ours.named_parameters() if "lora_" not in name):
            parameter.data = parameter.data.float()
    for module in ours.modules():
        if hasattr(module, "low_rank"):
            changes |= module.low_rank({name: p.detach() for name, p in module.named_parameters() if "lora_" in name})
    return ours, theirs, changes


def batch_of(size):
    """Observations of which one lacks the second camera and none has all the text there is room for."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    pixels = size.vision.image_size
    return {
        "images": torch.randint(0, 256, (BATCH, CAMERAS, pixels, pixels, 3), generator=generator, dtype=torch.uint8),
        "image_mask": torch.tensor([[True, True], [True, False], [True, True]]),
        "tokens": torch.randint(0, size.vocab_size, (BATCH, TEXT), generator=generator),
        "token_mask": torch.arange(TEXT) < torch.tensor([[7], [4], [8]]),
        "state": normal(BATCH, size.action_dim),
        "actions": normal(BATCH, size.action_horizon, size.action_dim),
        "noise": normal(BATCH, size.action_horizon, size.action_dim),
        "time": torch.tensor([0.9, 0.5, 0.013]),
    }


def theirs_of(batch, ours):
    """The batch as lerobot's modules take it: pictures on [-1, 1], one after another, channels first."""
    images = [image / 255 * 2 - 1 for image in batch["images"].permute(1, 0, 4, 2, 3).float()]
    prefix = (images, list(batch["image_mask"].T), batch["tokens"], batch["token_mask"])
    return prefix if ours.dimensions.pi05 else (*prefix, batch["state"])


def in_float64(time, width):
    """lerobot's time features, for both: then nothing but rounding is left between the two."""
    fraction = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64)
    period = MIN_PERIOD * (MAX_PERIOD / MIN_PERIOD) ** fraction
    angles = (1.0 / period * 2 * np.pi)[None] * time[:, None]
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()
