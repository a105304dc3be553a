"""The shape of every tensor in the tables of `names`, from the model's sizes alone. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlinf_plugins_openpi.model.dimensions import GemmaDimensions, Pi0Dimensions

Shape = tuple[int, ...]


def table_shapes(dimensions: Pi0Dimensions) -> dict[str, Shape]:
    """The names of the tables -> shapes."""
    return dict(_all(dimensions))


@cache
def _all(dimensions: Pi0Dimensions) -> tuple[tuple[str, Shape], ...]:
    return (*_vision(dimensions), *_language(dimensions), *_projections(dimensions))


def _linear(name: str, rows: int, columns: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (rows, columns)
    yield f"{name}.bias", (rows,)


def _layer_norm(name: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _vision(dimensions: Pi0Dimensions) -> Iterator[tuple[str, Shape]]:
    sizes = dimensions.vision
    width, patch = sizes.width, sizes.patch_size
    yield "vision.patch_embedding.weight", (width, 3, patch, patch)
    yield "vision.patch_embedding.bias", (width,)
    yield "vision.patch_embedding.position", (sizes.num_tokens, width)
    for i in range(sizes.depth):
        block = f"vision.blocks.{i}."
        for norm in ("layer_norm1", "layer_norm2"):
            yield from _layer_norm(block + norm, width)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(block + projection, width, width)
        yield from _linear(f"{block}fc1", sizes.mlp_dim, width)
        yield from _linear(f"{block}fc2", width, sizes.mlp_dim)
    yield from _layer_norm("vision.head.norm", width)
    yield from _linear("vision.head.projector", dimensions.vlm.width, width)


def _language(dimensions: Pi0Dimensions) -> Iterator[tuple[str, Shape]]:
    yield "embedding.weight", (dimensions.vocab_size, dimensions.vlm.width)
    for expert, sizes, adaptive in (
        ("vlm", dimensions.vlm, False),
        ("expert", dimensions.expert, dimensions.pi05),
    ):
        for i in range(sizes.depth):
            yield from _block(f"layers.{i}.{expert}.", sizes, adaptive=adaptive)
        yield from _norm(f"{expert}_norm", sizes.width, adaptive=adaptive)


def _block(name: str, sizes: GemmaDimensions, *, adaptive: bool) -> Iterator[tuple[str, Shape]]:
    heads, kv = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    for norm in ("input_norm", "post_attention_norm"):
        yield from _norm(name + norm, sizes.width, adaptive=adaptive)
    for projection, rows in (("q_proj", heads), ("k_proj", kv), ("v_proj", kv)):
        yield f"{name}{projection}.weight", (rows, sizes.width)
    yield f"{name}o_proj.weight", (sizes.width, heads)
    for projection in ("gate_proj", "up_proj"):
        yield f"{name}{projection}.weight", (sizes.mlp_dim, sizes.width)
    yield f"{name}down_proj.weight", (sizes.width, sizes.mlp_dim)


def _norm(name: str, width: int, *, adaptive: bool) -> Iterator[tuple[str, Shape]]:
    if adaptive:
        yield from _linear(f"{name}.dense", 3 * width, width)
    else:
        yield f"{name}.weight", (width,)


def _projections(dimensions: Pi0Dimensions) -> Iterator[tuple[str, Shape]]:
    width, actions = dimensions.expert.width, dimensions.action_dim
    yield from _linear("action_in_proj", width, actions)
    yield from _linear("action_out_proj", actions, width)
    if dimensions.pi05:
        yield from _linear("time_mlp_in", width, width)
    else:
        yield from _linear("state_proj", width, actions)
        yield from _linear("action_time_mlp_in", width, 2 * width)
    yield from _linear("time_mlp_out" if dimensions.pi05 else "action_time_mlp_out", width, width)
