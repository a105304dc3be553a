"""The table between our tensor names and the published ones, those of openpi's PyTorch checkpoints.

The relation is one to one and keeps shapes. Our names are the model's parameter names. Where the model merges several
published tensors into one parameter (see `model.parts`), each part has a name of its own here.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlinf_plugins_openpi.model.dimensions import Pi0Dimensions

PALIGEMMA = "paligemma_with_expert.paligemma."
EXPERT = "paligemma_with_expert.gemma_expert."
EMBEDDING = f"{PALIGEMMA}model.language_model.embed_tokens.weight"
EMBEDDING_IN_FILES = f"{PALIGEMMA}lm_head.weight"
"""The embedding's other name: safetensors stores tied weights once, in published files under this name."""
UNUSED_HEAD = f"{EXPERT}lm_head.weight"
UNUSED = frozenset({UNUSED_HEAD})
"""In published files but not in the model: a token head [vocabulary, expert width] that no loss reaches."""


def part_of(name: str) -> str:
    """The part of the model that a published module or parameter belongs to."""
    if name.startswith((f"{PALIGEMMA}model.vision_tower", f"{PALIGEMMA}model.multi_modal_projector")):
        return "vision"
    if name.startswith(PALIGEMMA):
        return "vlm"
    return "expert" if name.startswith(EXPERT) else "projections"


def published_names(dimensions: Pi0Dimensions) -> dict[str, str]:
    """Our names -> published names, in the order of use."""
    return dict(_all(dimensions))


@cache
def _all(dimensions: Pi0Dimensions) -> tuple[tuple[str, str], ...]:
    return tuple(_pairs(dimensions))


def _pairs(dimensions: Pi0Dimensions) -> Iterator[tuple[str, str]]:
    tower = f"{PALIGEMMA}model.vision_tower.vision_model."
    yield "vision.patch_embedding.weight", f"{tower}embeddings.patch_embedding.weight"
    yield "vision.patch_embedding.bias", f"{tower}embeddings.patch_embedding.bias"
    yield "vision.patch_embedding.position", f"{tower}embeddings.position_embedding.weight"
    for i in range(dimensions.vision.depth):
        own, published = f"vision.blocks.{i}.", f"{tower}encoder.layers.{i}."
        yield from _linear(f"{own}layer_norm1", f"{published}layer_norm1")
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{own}{projection}", f"{published}self_attn.{projection}")
        yield from _linear(f"{own}layer_norm2", f"{published}layer_norm2")
        yield from _linear(f"{own}fc1", f"{published}mlp.fc1")
        yield from _linear(f"{own}fc2", f"{published}mlp.fc2")
    yield from _linear("vision.head.norm", f"{tower}post_layernorm")
    yield from _linear("vision.head.projector", f"{PALIGEMMA}model.multi_modal_projector.linear")
    yield "embedding.weight", EMBEDDING
    for i in range(dimensions.vlm.depth):
        yield from _gemma_block(f"layers.{i}.vlm.", f"{PALIGEMMA}model.language_model.layers.{i}.", adaptive=False)
        yield from _gemma_block(f"layers.{i}.expert.", f"{EXPERT}model.layers.{i}.", adaptive=dimensions.pi05)
    yield from _gemma_norm("vlm_norm", f"{PALIGEMMA}model.language_model.norm", adaptive=False)
    yield from _gemma_norm("expert_norm", f"{EXPERT}model.norm", adaptive=dimensions.pi05)
    pi05 = ("time_mlp_in", "time_mlp_out")
    pi0 = ("state_proj", "action_time_mlp_in", "action_time_mlp_out")
    for projection in ("action_in_proj", "action_out_proj", *(pi05 if dimensions.pi05 else pi0)):
        yield from _linear(projection, projection)


def _linear(own: str, published: str) -> Iterator[tuple[str, str]]:
    for kind in ("weight", "bias"):
        yield f"{own}.{kind}", f"{published}.{kind}"


def _gemma_norm(own: str, published: str, *, adaptive: bool) -> Iterator[tuple[str, str]]:
    if adaptive:
        yield from _linear(f"{own}.dense", f"{published}.dense")
    else:
        yield f"{own}.weight", f"{published}.weight"


def _gemma_block(own: str, published: str, *, adaptive: bool) -> Iterator[tuple[str, str]]:
    yield from _gemma_norm(f"{own}input_norm", f"{published}input_layernorm", adaptive=adaptive)
    for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
        yield f"{own}{projection}.weight", f"{published}self_attn.{projection}.weight"
    yield from _gemma_norm(f"{own}post_attention_norm", f"{published}post_attention_layernorm", adaptive=adaptive)
    for projection in ("gate_proj", "up_proj", "down_proj"):
        yield f"{own}{projection}.weight", f"{published}mlp.{projection}.weight"
