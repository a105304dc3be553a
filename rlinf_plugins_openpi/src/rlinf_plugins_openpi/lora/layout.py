"""Where openpi's LoRA is, by arithmetic: layers, shapes and names of its JAX parameters. Imports no torch.

Axes: N query heads, K key heads, D width, H head dim, F MLP width, r rank. The reference is openpi's JAX sources
(`models/lora.py`, `models/gemma.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rlinf_plugins_openpi.model.dimensions import GemmaDimensions, Pi0Dimensions

LLM = "PaliGemma/llm/layers/"
_LANGUAGE = {
    "vlm": re.compile(r"embedding\.|prefix_end\.|vlm_norm\.|layers\.\d+\.vlm\."),
    "expert": re.compile(r"layers\.\d+\.expert\.|expert_norm\.|modulation\."),
}
"""The parameters of each expert's language model, by the model's own names and those of the tables of `weights`."""


class Pair(NamedTuple):
    """The matrices A and B of some rows of a layer, as one pair of arrays."""

    layer: str
    """The model's own name of the linear layer."""
    name: str
    """`q`, `kv`, `out`, `gating` or `linear`, as in the reference."""
    first: int
    """The first of the layer's rows that it changes."""
    matrices: tuple[str, ...]
    """The published matrices that it changes, by the names of the tables of `weights`."""
    a: tuple[int, ...]
    b: tuple[int, ...]
    scale: float
    summed: bool
    """Heads are summed, in A's product and again in B: the attention's output."""
    array: str
    """The array of the reference, without `lora_a`; the layers of the model are stacked on its first axis."""
    depth: int
    """The index of this layer there."""

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """The parameters in the layer -> shapes."""
        return {f"lora_a_{self.name}": self.a, f"lora_b_{self.name}": self.b}


def trained_whole(name: str, ranks: Mapping[str, int]) -> bool:
    """Whether openpi's filter trains a parameter whole: all but the language models that have adapters."""
    return not any(rank and _LANGUAGE[expert].match(name) for expert, rank in ranks.items())


def pairs(dimensions: Pi0Dimensions, ranks: Mapping[str, int], scales: Mapping[str, float]) -> list[Pair]:
    """All pairs of a model.

    Args:
        dimensions: The model's sizes.
        ranks: Expert (`vlm`, `expert`) -> rank; 0: no adapters.
        scales: Expert -> the factor of its attention's adapters. Those of the MLP have none.
    """
    experts = (("vlm", dimensions.vlm, ""), ("expert", dimensions.expert, "_1"))
    return [
        pair
        for expert, sizes, suffix in experts
        if ranks[expert]
        for depth in range(sizes.depth)
        for pair in _block(sizes, expert, depth, suffix, ranks[expert], scales[expert])
    ]


def _block(sizes: GemmaDimensions, expert: str, depth: int, suffix: str, rank: int, scale: float) -> Iterator[Pair]:
    block = f"layers.{depth}.{expert}."
    # Of the VLM's last layer, only keys and values reach the loss; the model has the rest in a module of its own.
    split = expert == "vlm" and depth + 1 == sizes.depth
    rest = "prefix_end." if split else block
    width, heads, kv, dim = sizes.width, sizes.num_heads, sizes.num_kv_heads, sizes.head_dim
    attention, mlp = f"{LLM}attn/", f"{LLM}mlp{suffix}/"

    def pair(
        layer: str, name: str, first: int, matrices: tuple[str, ...], a: tuple[int, ...], b: tuple[int, ...], array: str
    ) -> Pair:
        factor = 1.0 if array.startswith(mlp) else scale
        own = tuple(f"{block}{one}" for one in matrices)
        return Pair(layer, name, first, own, a, b, factor, name == "out", array, depth)

    query = f"{rest}q_proj" if split else f"{block}qkv"
    keys = f"{block}kv" if split else f"{block}qkv"
    yield pair(query, "q", 0, ("q_proj",), (heads, width, rank), (heads, rank, dim), f"{attention}q_einsum{suffix}/")
    yield pair(
        keys,
        "kv",
        0 if split else heads * dim,
        ("k_proj", "v_proj"),
        (2, kv, width, rank),
        (2, kv, rank, dim),
        f"{attention}kv_einsum{suffix}/",
    )
    yield pair(
        f"{rest}o_proj",
        "out",
        0,
        ("o_proj",),
        (heads, dim, rank),
        (heads, rank, width),
        f"{attention}attn_vec_einsum{suffix}/",
    )
    hidden = sizes.mlp_dim
    yield pair(
        f"{rest}gate_up",
        "gating",
        0,
        ("gate_proj", "up_proj"),
        (2, width, rank),
        (2, rank, hidden),
        f"{mlp}gating_einsum_",
    )
    yield pair(f"{rest}down_proj", "linear", 0, ("down_proj",), (hidden, rank), (rank, width), f"{mlp}linear_")
