"""How the model's parameters are divided: the published tensors each is made of, and what `policy.freeze` freezes.

The model merges matrices that are multiplied with the same input (queries, keys and values; gate and up; all
modulations), and keeps parameters that no loss reaches in a module of their own. Published files do neither.
`weights.names` and `weights.layouts` have one name per published tensor; the table here leads from parameters to these
names. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from rlinf_plugins_openpi.model.dimensions import GemmaDimensions, Pi0Dimensions


Frozen = Literal["nothing", "vision", "vlm", "all_but_expert"]

_FROZEN: dict[Frozen, re.Pattern[str]] = {
    "nothing": re.compile(r"$^"),
    "vision": re.compile(r"vision\."),
    "vlm": re.compile(r"(vision|embedding|prefix_end)\.|layers\.\d+\.vlm\."),
    "all_but_expert": re.compile(r"(?!layers\.\d+\.expert\.|expert_norm\.|modulation\.)"),
}


def is_frozen(name: str, frozen: Frozen) -> bool:
    """Whether a parameter (by the model's own name) is frozen: no gradient, no optimizer state, no moving average.

    `vision` is the image tower with its projection, `vlm` also the language model; `all_but_expert` trains only the
    layers and norms of the action expert, not the projections of states, actions and time.
    """
    return _FROZEN[frozen].match(name) is not None


class Part(NamedTuple):
    """One of the published tensors that a parameter stacks along its first axis."""

    name: str
    """The name in the tables of `weights`."""
    rows: int


def parameter_parts(dimensions: Pi0Dimensions) -> dict[str, tuple[Part, ...]]:
    """Parameters that do not correspond to one published tensor of the same name -> their parts, first rows first."""
    return dict(_all(dimensions))


@cache
def _all(dimensions: Pi0Dimensions) -> tuple[tuple[str, tuple[Part, ...]], ...]:
    return tuple(_pairs(dimensions))


def unpacked(state: Mapping[str, Tensor], dimensions: Pi0Dimensions) -> dict[str, Tensor]:
    """Split parameters into published tensors, by the names of the tables; the parts are views."""
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
    """As `unpacked`, for shapes."""
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


def linear_layers(dimensions: Pi0Dimensions, *, every: bool = False) -> list[str]:
    """The linear layers that a loss reaches, or every one, by the names of the tables, without `.weight`.

    The adaptive norms' matrices are left out: one product computes all of them (`gemma.Modulation`).
    """
    layers = [
        f"vision.blocks.{i}.{name}"
        for i in range(dimensions.vision.depth)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    ]
    layers.append("vision.head.projector")
    last = dimensions.vlm.depth - 1
    for i in range(dimensions.vlm.depth):
        for expert in ("vlm", "expert"):
            own = ("k_proj", "v_proj") if (expert, i) == ("vlm", last) and not every else _LANGUAGE_MATRICES
            layers += [f"layers.{i}.{expert}.{name}" for name in own]
    pi05, pi0 = ("time_mlp_in", "time_mlp_out"), ("state_proj", "action_time_mlp_in", "action_time_mlp_out")
    return [*layers, "action_in_proj", "action_out_proj", *(pi05 if dimensions.pi05 else pi0)]


_LANGUAGE_MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _prefix_end(sizes: GemmaDimensions, block: str) -> Iterator[tuple[str, tuple[Part, ...]]]:
    """The parameters of the prefix's last layer that no loss reaches."""
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
