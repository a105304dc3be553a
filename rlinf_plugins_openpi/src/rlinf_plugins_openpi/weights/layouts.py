"""The known layouts of weights: openpi's PyTorch names, RLinf's, and those of openpi's JAX parameters.

A layout is a table from our names (see `names`) to slots in stored tensors. openpi's is the table in `names`, one
tensor each; lerobot's is the same with a prefix. RLinf's own port and the JAX reference stack, join and transpose
tensors, which a slot describes. The layout of a file is recognised by its keys. Importing this loads no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlinf_core import UserError
from rlinf_plugins_openpi.weights.hints import hint_for_tensors
from rlinf_plugins_openpi.weights.names import published_names

if TYPE_CHECKING:
    import torch

    from rlinf_plugins_openpi.model.dimensions import GemmaDimensions, Pi0Dimensions


@dataclass(frozen=True)
class Slot:
    """Where a parameter is stored: which part of which tensor, with which order of axes."""

    key: str
    at: tuple[tuple[int, int], ...] = ()
    """Leading indices as pairs (index, size of the axis): a layer of stacked layers, or gate and up in one tensor."""
    joined: bool = False
    """The single index in `at` has no axis of its own: the parts are concatenated along the first axis."""
    axes: tuple[int, ...] = ()
    """The permutation from the stored part's axes to the parameter's; empty: none."""
    heads: tuple[int, int] | None = None
    """(axis, number of heads): this axis of the parameter is stored as two axes, heads and head dim."""

    def stored_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the whole stored tensor for a parameter of this shape."""
        part = list(shape)
        if self.heads:
            axis, number = self.heads
            part[axis : axis + 1] = [number, part[axis] // number]
        if self.axes:
            part = [part[self.axes.index(axis)] for axis in range(len(part))]
        if self.joined:
            return (part[0] * self.at[0][1], *part[1:])
        return (*(number for _, number in self.at), *part)

    def take(self, stored: torch.Tensor) -> torch.Tensor:
        """Extract the parameter from the whole stored tensor."""
        part = stored
        if self.joined:
            which, number = self.at[0]
            part = part.chunk(number)[which]
        else:
            for which, _ in self.at:
                part = part[which]
        if self.axes:
            part = part.permute(self.axes)
        return part.flatten(self.heads[0], self.heads[0] + 1) if self.heads else part


@dataclass(frozen=True)
class Layout:
    """One way of storing the model."""

    label: str
    mark: re.Pattern[str]
    """Matches the start of keys that only this layout has; its first group is the prefix of all keys."""
    slots: Callable[[Pi0Dimensions], dict[str, Slot]]
    """Our names -> slots, keys without a prefix."""


def _openpi(dimensions: Pi0Dimensions) -> dict[str, Slot]:
    return {own: Slot(published) for own, published in published_names(dimensions).items()}


def _kinds(own: str, stored: str) -> Iterator[tuple[str, Slot]]:
    for kind in ("weight", "bias"):
        yield f"{own}.{kind}", Slot(f"{stored}.{kind}")


def _rlinf(dimensions: Pi0Dimensions) -> dict[str, Slot]:
    return dict(_rlinf_pairs(dimensions))


def _rlinf_pairs(dimensions: Pi0Dimensions) -> Iterator[tuple[str, Slot]]:
    """RLinf's port `openpi_rlinf`; checked against its converter `openpi_rlinf_to_openpi_pytorch`."""
    yield from _kinds("vision.patch_embedding", "img.stem")
    yield "vision.patch_embedding.position", Slot("img.pos_embedding", at=((0, 1),))
    for i in range(dimensions.vision.depth):
        own, block = f"vision.blocks.{i}.", f"img.encoder.layers.{i}."
        for ours, theirs in (("layer_norm1", "norm1"), ("layer_norm2", "norm2"), ("out_proj", "attn.out_proj")):
            yield from _kinds(own + ours, block + theirs)
        for which, projection in enumerate(("q_proj", "k_proj", "v_proj")):
            for kind in ("weight", "bias"):
                slot = Slot(f"{block}attn.in_proj_{kind}", at=((which, 3),), joined=True)
                yield f"{own}{projection}.{kind}", slot
        yield from _kinds(f"{own}fc1", f"{block}mlp.fc1")
        yield from _kinds(f"{own}fc2", f"{block}mlp.fc2")
    yield from _kinds("vision.head.norm", "img.encoder.norm")
    yield from _kinds("vision.head.projector", "img.head")
    yield "embedding.weight", Slot("llm.embedder.embedding.weight")
    for expert, adaptive in (("vlm", False), ("expert", dimensions.pi05)):
        number = 0 if expert == "vlm" else 1
        for i in range(dimensions.vlm.depth):
            own, layer = f"layers.{i}.{expert}.", f"llm.layers.{i}."
            for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
                yield f"{own}{projection}.weight", Slot(f"{layer}attn.{projection}.{number}.weight")
            mlp = f"{layer}mlps.{number}."
            for which, projection in enumerate(("gate_proj", "up_proj")):
                yield f"{own}{projection}.weight", Slot(f"{mlp}w_gating", at=((which, 2),), axes=(1, 0))
            yield f"{own}down_proj.weight", Slot(f"{mlp}w_linear", axes=(1, 0))
            yield from _rlinf_norm(f"{own}input_norm", f"{layer}pre_attention_norms.{number}", adaptive=adaptive)
            yield from _rlinf_norm(f"{own}post_attention_norm", f"{layer}pre_ffw_norms.{number}", adaptive=adaptive)
        yield from _rlinf_norm(f"{expert}_norm", f"llm.final_norms.{number}", adaptive=adaptive)
    for projection in _projections(dimensions):
        yield from _kinds(projection, projection)


def _rlinf_norm(own: str, stored: str, *, adaptive: bool) -> Iterator[tuple[str, Slot]]:
    if adaptive:
        yield from _kinds(f"{own}.dense", f"{stored}.ada_modulation")
    else:
        yield f"{own}.weight", Slot(f"{stored}.scale")


def _projections(dimensions: Pi0Dimensions) -> tuple[str, ...]:
    """The small projections, which have the same names in every layout."""
    return tuple(
        name[: -len(".bias")] for name in published_names(dimensions) if name.count(".") == 1 and "bias" in name
    )


def _jax(dimensions: Pi0Dimensions) -> dict[str, Slot]:
    slots = dict(_jax_vision(dimensions))
    slots["embedding.weight"] = Slot("PaliGemma/llm/embedder/input_embedding")
    slots |= _jax_gemma("vlm", "", dimensions.vlm, adaptive=False)
    slots |= _jax_gemma("expert", "_1", dimensions.expert, adaptive=dimensions.pi05)
    for projection in _projections(dimensions):
        slots |= _dense(projection, projection)
    return slots


def _dense(own: str, stored: str, at: tuple[tuple[int, int], ...] = ()) -> dict[str, Slot]:
    """A Flax `Dense`: its kernel is [in, out]."""
    return {
        f"{own}.weight": Slot(f"{stored}/kernel", at=at, axes=(1, 0)),
        f"{own}.bias": Slot(f"{stored}/bias", at=at),
    }


def _layer_norm(own: str, stored: str, at: tuple[tuple[int, int], ...] = ()) -> dict[str, Slot]:
    return {f"{own}.weight": Slot(f"{stored}/scale", at=at), f"{own}.bias": Slot(f"{stored}/bias", at=at)}


def _jax_vision(dimensions: Pi0Dimensions) -> Iterator[tuple[str, Slot]]:
    image, heads = "PaliGemma/img/", dimensions.vision.num_heads
    block = f"{image}Transformer/encoderblock/"
    attention = f"{block}MultiHeadDotProductAttention_0/"
    yield "vision.patch_embedding.weight", Slot(f"{image}embedding/kernel", axes=(3, 2, 0, 1))
    yield "vision.patch_embedding.bias", Slot(f"{image}embedding/bias")
    yield "vision.patch_embedding.position", Slot(f"{image}pos_embedding", at=((0, 1),))
    for i in range(dimensions.vision.depth):
        own, at = f"vision.blocks.{i}.", ((i, dimensions.vision.depth),)
        for number in (0, 1):
            yield from _layer_norm(f"{own}layer_norm{number + 1}", f"{block}LayerNorm_{number}", at).items()
            yield from _dense(f"{own}fc{number + 1}", f"{block}MlpBlock_0/Dense_{number}", at).items()
        for ours, theirs in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
            slot = Slot(f"{attention}{theirs}/kernel", at=at, axes=(1, 2, 0), heads=(0, heads))
            yield f"{own}{ours}.weight", slot
            yield f"{own}{ours}.bias", Slot(f"{attention}{theirs}/bias", at=at, heads=(0, heads))
        yield f"{own}out_proj.weight", Slot(f"{attention}out/kernel", at=at, axes=(2, 0, 1), heads=(1, heads))
        yield f"{own}out_proj.bias", Slot(f"{attention}out/bias", at=at)
    yield from _layer_norm("vision.head.norm", f"{image}Transformer/encoder_norm").items()
    yield from _dense("vision.head.projector", f"{image}head").items()


def _jax_gemma(expert: str, suffix: str, gemma: GemmaDimensions, *, adaptive: bool) -> dict[str, Slot]:
    llm = "PaliGemma/llm/"
    attention, mlp = f"{llm}layers/attn/", f"{llm}layers/mlp{suffix}/"
    slots: dict[str, Slot] = {}
    for i in range(gemma.depth):
        own, at = f"layers.{i}.{expert}.", ((i, gemma.depth),)
        slots[f"{own}q_proj.weight"] = Slot(
            f"{attention}q_einsum{suffix}/w", at=at, axes=(0, 2, 1), heads=(0, gemma.num_heads)
        )
        for which, projection in enumerate(("k_proj", "v_proj")):
            slots[f"{own}{projection}.weight"] = Slot(
                f"{attention}kv_einsum{suffix}/w", (*at, (which, 2)), axes=(0, 2, 1), heads=(0, gemma.num_kv_heads)
            )
        slots[f"{own}o_proj.weight"] = Slot(
            f"{attention}attn_vec_einsum{suffix}/w", at=at, axes=(2, 0, 1), heads=(1, gemma.num_heads)
        )
        for which, projection in enumerate(("gate_proj", "up_proj")):
            slots[f"{own}{projection}.weight"] = Slot(f"{mlp}gating_einsum", (*at, (which, 2)), axes=(1, 0))
        slots[f"{own}down_proj.weight"] = Slot(f"{mlp}linear", at=at, axes=(1, 0))
        slots |= _jax_norm(f"{own}input_norm", f"{llm}layers/pre_attention_norm{suffix}", at, adaptive=adaptive)
        slots |= _jax_norm(f"{own}post_attention_norm", f"{llm}layers/pre_ffw_norm{suffix}", at, adaptive=adaptive)
    return slots | _jax_norm(f"{expert}_norm", f"{llm}final_norm{suffix}", (), adaptive=adaptive)


def _jax_norm(own: str, stored: str, at: tuple[tuple[int, int], ...], *, adaptive: bool) -> dict[str, Slot]:
    if adaptive:
        return _dense(f"{own}.dense", f"{stored}/Dense_0", at)
    return {f"{own}.weight": Slot(f"{stored}/scale", at=at)}


WRAPPERS = r"^((?:model\.|module\.|_orig_mod\.|_fsdp_wrapped_module\.)*)"
"""Prefixes of wrapped modules: lerobot's and RLinf's own, DDP's, torch.compile's and FSDP's."""

OPENPI = Layout("openpi's PyTorch layout", re.compile(WRAPPERS + r"paligemma_with_expert\."), _openpi)
RLINF = Layout("RLinf's PyTorch layout (openpi_rlinf)", re.compile(WRAPPERS + r"(?:img|llm)\."), _rlinf)
JAX = Layout("openpi's JAX layout", re.compile(r"^((?:params/)?)PaliGemma/"), _jax)
LAYOUTS = (OPENPI, RLINF, JAX)
KNOWN = (
    "known are openpi's PyTorch layout (`paligemma_with_expert.…`; lerobot's is the same, usually with the prefix "
    "`model.`), RLinf's (`llm.…`, `img.…`), and openpi's JAX parameters (`PaliGemma/…`)"
)


@dataclass(frozen=True)
class FoundLayout:
    """The layout of some files, recognised by their keys."""

    layout: Layout
    prefix: str
    """The prefix of every key."""

    def __str__(self) -> str:
        return self.layout.label + (f" with the prefix {self.prefix!r}" if self.prefix else "")

    def slots(self, dimensions: Pi0Dimensions) -> dict[str, Slot]:
        """Our names -> slots, with the keys as in the files."""
        return {
            own: Slot(self.prefix + slot.key, slot.at, slot.joined, slot.axes, slot.heads)
            for own, slot in self.layout.slots(dimensions).items()
        }


def find_layout(keys: Collection[str], where: str) -> FoundLayout:
    """Recognise the layout of some keys.

    Args:
        keys: Names of stored tensors.
        where: The name of their source in errors.

    Raises:
        UserError: The keys match no known layout, or more than one.
    """
    found: dict[FoundLayout, str] = {}
    for key in keys:
        for layout in LAYOUTS:
            if match := layout.mark.search(key):
                found.setdefault(FoundLayout(layout, match[1]), key)
    if len(found) == 1:
        return next(iter(found))
    if found:
        both = "; ".join(f"{one} ({key})" for one, key in found.items())
        raise UserError(f"{where} holds weights in more than one layout: {both}. Name the files of one of them")
    first = ", ".join(sorted(keys)[:4]) or "none"
    hint = hint_for_tensors(keys, {})
    raise UserError(
        f"{where} holds {len(keys)} tensors in an unknown layout: {first}, …; {KNOWN}" + (f"; {hint}" if hint else "")
    )
