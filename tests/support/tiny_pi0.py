"""π0 and π0.5 with a few hundred parameters, by our names and by those in other projects' files."""

import torch

from rlinf_plugins_openpi.model.dimensions import GemmaDimensions, Pi0Dimensions, VisionDimensions
from rlinf_plugins_openpi.model.parts import unpacked
from rlinf_plugins_openpi.model.pi0 import Pi0
from rlinf_plugins_openpi.weights.names import published_names

GEMMA = GemmaDimensions(width=8, depth=2, mlp_dim=6, num_heads=2, num_kv_heads=1, head_dim=4)
EXPERT = GemmaDimensions(width=4, depth=2, mlp_dim=6, num_heads=2, num_kv_heads=1, head_dim=4)
VISION = VisionDimensions(width=8, depth=2, mlp_dim=6, num_heads=2, patch_size=2, image_size=4)
PI0 = Pi0Dimensions(False, 4, 3, 16, GEMMA, EXPERT, VISION)
PI05 = Pi0Dimensions(True, 4, 3, 16, GEMMA, EXPERT, VISION)


def state_of(dimensions):
    """The model's own parameter names -> tensors, no two alike."""
    torch.manual_seed(0)
    return {name: torch.randn_like(parameter) for name, parameter in Pi0(dimensions).named_parameters()}


def shapes_of(dimensions):
    return {name: tuple(tensor.shape) for name, tensor in state_of(dimensions).items()}


def published_state(dimensions):
    """openpi's names -> tensors."""
    names = published_names(dimensions)
    return {names[name]: tensor for name, tensor in unpacked(state_of(dimensions), dimensions).items()}


def rlinf_state(dimensions):
    """The names of RLinf's own port -> tensors, built by hand from the published ones."""
    published = published_state(dimensions)
    tower = "paligemma_with_expert.paligemma.model.vision_tower.vision_model."
    experts = ("paligemma_with_expert.paligemma.model.language_model.", "paligemma_with_expert.gemma_expert.model.")
    state = {key: tensor for key, tensor in published.items() if "paligemma" not in key}

    def move(theirs, key):
        for kind in ("weight", "bias"):
            if f"{key}.{kind}" in published:
                state[f"{theirs}.{kind}"] = published[f"{key}.{kind}"]

    def move_norm(theirs, key):
        if f"{key}.dense.weight" in published:
            move(f"{theirs}.ada_modulation", f"{key}.dense")
        else:
            state[f"{theirs}.scale"] = published[f"{key}.weight"]

    move("img.stem", f"{tower}embeddings.patch_embedding")
    state["img.pos_embedding"] = published[f"{tower}embeddings.position_embedding.weight"][None]
    for i in range(dimensions.vision.depth):
        layer, block = f"{tower}encoder.layers.{i}.", f"img.encoder.layers.{i}."
        for theirs, key in (
            ("norm1", "layer_norm1"),
            ("norm2", "layer_norm2"),
            ("attn.out_proj", "self_attn.out_proj"),
        ):
            move(block + theirs, layer + key)
        for number in (1, 2):
            move(f"{block}mlp.fc{number}", f"{layer}mlp.fc{number}")
        for kind in ("weight", "bias"):
            state[f"{block}attn.in_proj_{kind}"] = torch.cat(
                [published[f"{layer}self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            )
    move("img.encoder.norm", f"{tower}post_layernorm")
    move("img.head", "paligemma_with_expert.paligemma.model.multi_modal_projector.linear")
    state["llm.embedder.embedding.weight"] = published[f"{experts[0]}embed_tokens.weight"]
    for number, expert in enumerate(experts):
        for i in range(dimensions.vlm.depth):
            key, layer = f"{expert}layers.{i}.", f"llm.layers.{i}."
            for letter in "qkvo":
                state[f"{layer}attn.{letter}_proj.{number}.weight"] = published[f"{key}self_attn.{letter}_proj.weight"]
            gate, up, down = (published[f"{key}mlp.{which}_proj.weight"].T for which in ("gate", "up", "down"))
            state[f"{layer}mlps.{number}.w_gating"] = torch.stack([gate, up])
            state[f"{layer}mlps.{number}.w_linear"] = down.contiguous()
            move_norm(f"{layer}pre_attention_norms.{number}", f"{key}input_layernorm")
            move_norm(f"{layer}pre_ffw_norms.{number}", f"{key}post_attention_layernorm")
        move_norm(f"llm.final_norms.{number}", f"{expert}norm")
    return state
