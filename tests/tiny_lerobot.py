"""lerobot's π0 and π0.5 in sizes of ours, which its configs do not offer: it builds one published size only."""

import contextlib
import copy
import importlib
import types

import torch

from rlinf_plugins_openpi.dimensions import GemmaDimensions, Pi0Dimensions, VisionDimensions

# Eight heads: lerobot's joint attention has that number written into it.
GEMMA = GemmaDimensions(width=16, depth=2, mlp_dim=12, num_heads=8, num_kv_heads=1, head_dim=4)
EXPERT = GemmaDimensions(width=12, depth=2, mlp_dim=10, num_heads=8, num_kv_heads=1, head_dim=4)
VISION = VisionDimensions(width=8, depth=2, mlp_dim=6, num_heads=2, patch_size=56)


def tiny_dimensions(*, pi05, vocab_size=512):
    """Sizes that both build, for pictures of 224 pixels."""
    return Pi0Dimensions(pi05, 8, 5, vocab_size, GEMMA, EXPERT, VISION)


@contextlib.contextmanager
def of_size(dimensions):
    """While this lasts, lerobot builds models of these sizes."""
    name = "pi05" if dimensions.pi05 else "pi0"
    modeling = importlib.import_module(f"lerobot.policies.{name}.modeling_{name}")
    sizes = {"gemma_2b": dimensions.vlm, "gemma_300m": dimensions.expert}

    def shrink(config):
        """The transformers config that lerobot wrote published sizes into."""
        config = copy.deepcopy(config)
        if hasattr(config, "vision_config"):
            vision, seen = dimensions.vision, config.vision_config
            seen.hidden_size, seen.num_hidden_layers, seen.intermediate_size = (
                vision.width,
                vision.depth,
                vision.mlp_dim,
            )
            seen.num_attention_heads, seen.patch_size = vision.num_heads, vision.patch_size
            seen.projection_dim = dimensions.vlm.width
            config.text_config.vocab_size = config.image_token_id = config._vocab_size = dimensions.vocab_size
        else:
            config.vocab_size = dimensions.vocab_size
        return config

    def shrunk(cls):
        return lambda config: cls(config=shrink(config))

    classes = ("PaliGemmaForConditionalGenerationWithPiGemma", "PiGemmaForCausalLM")
    patches = {cls: shrunk(getattr(modeling, cls)) for cls in classes}
    patches["get_gemma_config"] = lambda variant: types.SimpleNamespace(**vars(sizes[variant]))
    before = {key: getattr(modeling, key) for key in patches}
    try:
        vars(modeling).update(patches)
        yield modeling
    finally:
        vars(modeling).update(before)


def build(dimensions):
    """lerobot's core model, `PI0Pytorch` or `PI05Pytorch`, in float32 with whatever initial values."""
    with of_size(dimensions) as modeling:
        config = (modeling.PI05Config if dimensions.pi05 else modeling.PI0Config)(
            chunk_size=dimensions.action_horizon,
            n_action_steps=dimensions.action_horizon,
            max_state_dim=dimensions.action_dim,
            max_action_dim=dimensions.action_dim,
            device="cpu",
        )
        torch.manual_seed(0)
        return (modeling.PI05Pytorch if dimensions.pi05 else modeling.PI0Pytorch)(config)
