"""Which published tensors each of the model's parameters is made of. Standard library only.

What the model multiplies with the same input it holds as one matrix (queries, keys and values; gate and up; all
modulations), and what no loss reaches it keeps apart. Files hold neither: `weights.names` and `weights.layouts` know
one name a published tensor, and this is the one table from parameters to those.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from rlinf_plugins_openpi.model.dimensions import GemmaDimensions, Pi0Dimensions


class Part(NamedTuple):
    """A published tensor among those that lie one below the other in a parameter."""

    name: str
    """In the tables of `weights`."""
    rows: int


def parameter_parts(dimensions: Pi0Dimensions) -> dict[str, tuple[Part, ...]]:
    """The parameters that are not a published tensor under its own name -> what they are made of, from the top."""
    return dict(_all(dimensions))


@cache
def _all(dimensions: Pi0Dimensions) -> tuple[tuple[str, tuple[Part, ...]], ...]:
    return tuple(_pairs(dimensions))


def unpacked(state: Mapping[str, Tensor], dimensions: Pi0Dimensions) -> dict[str, Tensor]:
    """A tensor for each published one, by the names of the tables; views of those given by parameter name."""
    table, out = parameter_parts(dimensions), {}
    for name, tensor in state.items():
        if name not in table:
            out[name] = tensor
            continue
        first = 0
        for part in table[name]:
            out[part.name] = tensor[first : first + part.rows]
            first += part.rows
    return out


def unpacked_shapes(shapes: Mapping[str, tuple[int, ...]], dimensions: Pi0Dimensions) -> dict[str, tuple[int, ...]]:
    """As `unpacked`, of shapes alone."""
    table = parameter_parts(dimensions)
    out: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        out |= {part.name: (part.rows, *shape[1:]) for part in table[name]} if name in table else {name: shape}
    return out


def _pairs(dimensions: Pi0Dimensions) -> Iterator[tuple[str, tuple[Part, ...]]]:
    vision = dimensions.vision
    for i in range(vision.depth):
        block = f"vision.blocks.{i}."
        for kind in ("weight", "bias"):
            yield f"{block}qkv.{kind}", _stack(block, kind, dict.fromkeys(("q_proj", "k_proj", "v_proj"), vision.width))
    last = dimensions.vlm.depth - 1
    for i in range(dimensions.vlm.depth):
        for expert, sizes in (("vlm", dimensions.vlm), ("expert", dimensions.expert)):
            if (block := f"layers.{i}.{expert}.") == f"layers.{last}.vlm.":
                kv = {name: rows for name, rows in _qkv(sizes).items() if name != "q_proj"}
                yield f"{block}kv.weight", _stack(block, "weight", kv)
            else:
                yield f"{block}qkv.weight", _stack(block, "weight", _qkv(sizes))
                yield f"{block}gate_up.weight", _stack(block, "weight", _gate_up(sizes))
    yield from _prefix_end(dimensions.vlm, f"layers.{last}.vlm.")
    if dimensions.pi05:
        norms = [
            f"layers.{i}.expert.{norm}." for i in range(last + 1) for norm in ("input_norm", "post_attention_norm")
        ]
        for kind in ("weight", "bias"):
            rows = 3 * dimensions.expert.width
            yield (
                f"modulation.{kind}",
                tuple(Part(f"{norm}dense.{kind}", rows) for norm in (*norms, "expert_norm.")),
            )


def _prefix_end(sizes: GemmaDimensions, block: str) -> Iterator[tuple[str, tuple[Part, ...]]]:
    """What the prefix's last layer keeps apart."""
    yield "prefix_end.q_proj.weight", _stack(block, "weight", {"q_proj": _qkv(sizes)["q_proj"]})
    yield "prefix_end.gate_up.weight", _stack(block, "weight", _gate_up(sizes))
    for name in ("o_proj", "post_attention_norm", "down_proj"):
        yield f"prefix_end.{name}.weight", _stack(block, "weight", {name: sizes.width})
    yield "prefix_end.norm.weight", (Part("vlm_norm.weight", sizes.width),)


def _stack(block: str, kind: str, rows: Mapping[str, int]) -> tuple[Part, ...]:
    return tuple(Part(f"{block}{name}.{kind}", number) for name, number in rows.items())


def _qkv(sizes: GemmaDimensions) -> dict[str, int]:
    q, kv = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    return {"q_proj": q, "k_proj": kv, "v_proj": kv}


def _gate_up(sizes: GemmaDimensions) -> dict[str, int]:
    return dict.fromkeys(("gate_proj", "up_proj"), sizes.mlp_dim)
