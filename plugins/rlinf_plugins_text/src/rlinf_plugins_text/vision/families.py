"""What sets the families of vision-language models apart: facts that `config.json` does not state. Imports no torch.

A family is known by its `model_type`. The model's own code computes; this says which tokens stand for an image, which
tokens see which, how the parts are called, and which names weights have on the hub.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Part = Literal["vision_tower", "projector", "language_model"]
"""A part of the model that `policy.freeze` names."""
Names = tuple[tuple[str, tuple[str, ...]], ...]
"""Beginning of a parameter's name in the module -> its beginnings in files, that of files on the hub first."""


@dataclass(frozen=True)
class Family:
    """The facts of a family."""

    parts: Mapping[Part, tuple[str, ...]]
    """Part -> beginnings of the names of its parameters."""
    entry_tokens: Callable[[Mapping[str, Any]], int]
    """Tokens that stand for one entry of `pixel_values`, from `config.json`; 0: the grid says it."""
    placeholder: tuple[str, ...] = ("image_token_id", "image_token_index")
    """Keys of `config.json`, one of which holds the token that chat templates write for an image."""
    around: tuple[str, str] | None = None
    """Keys of the tokens before and after an image, which a text outside of a chat template has to have."""
    attention: Literal["causal", "image_blocks", "prefix"] = "causal"
    """`image_blocks`: the tokens of an image see one another. `prefix`: those of images and prompt do."""
    grid_positions: bool = False
    """Whether the tokens of an image have positions in time, height and width (M-RoPE)."""
    names: Names = ()
    """How files name parameters; empty: as the module does."""


DEFAULT_SIDE = {"llava": 336}
"""Height and width of images in pixels, if `config.json` leaves them out."""


def _grid(_: Mapping[str, Any]) -> int:
    return 0


def _gemma(table: Mapping[str, Any]) -> int:
    return int(table.get("mm_tokens_per_image", 256))


def _patches(table: Mapping[str, Any]) -> int:
    vision: Mapping[str, int] = table.get("vision_config") or {}
    side = vision.get("image_size", DEFAULT_SIDE.get(str(table.get("model_type")), 224))
    patches = side // vision.get("patch_size", 14)
    return patches * patches


def _llava(table: Mapping[str, Any]) -> int:
    return _patches(table) + bool(table.get("vision_feature_select_strategy", "default") == "full")


def _shuffled(table: Mapping[str, Any]) -> int:
    vision = table.get("vision_config") or {}
    side = int(vision.get("image_size", 224)) // int(vision.get("patch_size", 32))
    return int(side**2 / int(table.get("scale_factor", 2)) ** 2)


_QWEN_NAMES: Names = (
    ("model.visual.", ("visual.", "model.visual.")),
    ("model.language_model.", ("model.", "model.language_model.")),
)
_LLAVA_NAMES: Names = (
    ("model.vision_tower.", ("vision_tower.", "model.vision_tower.")),
    ("model.multi_modal_projector.", ("multi_modal_projector.", "model.multi_modal_projector.")),
    (
        "model.language_model.",
        ("language_model.model.", "model.language_model.", "model.language_model.model."),
    ),
    ("lm_head.", ("language_model.lm_head.", "lm_head.")),
)
_QWEN_PARTS: Mapping[Part, tuple[str, ...]] = {
    "vision_tower": ("model.visual.",),
    "projector": ("model.visual.merger.", "model.visual.deepstack_merger_list."),
    "language_model": ("model.language_model.", "lm_head."),
}
_LLAVA_PARTS: Mapping[Part, tuple[str, ...]] = {
    "vision_tower": ("model.vision_tower.",),
    "projector": ("model.multi_modal_projector.",),
    "language_model": ("model.language_model.", "lm_head."),
}
_IDEFICS_PARTS: Mapping[Part, tuple[str, ...]] = {
    "vision_tower": ("model.vision_model.",),
    "projector": ("model.connector.",),
    "language_model": ("model.text_model.", "lm_head."),
}
_WRAPPED = ("vision_start_token_id", "vision_end_token_id")
_QWEN = Family(_QWEN_PARTS, _grid, around=_WRAPPED, grid_positions=True, names=_QWEN_NAMES)

FAMILIES: Mapping[str, Family] = {
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": Family(_QWEN_PARTS, _grid, around=_WRAPPED, grid_positions=True),
    "gemma3": Family(
        _LLAVA_PARTS,
        _gemma,
        placeholder=("boi_token_index", "boi_token_id"),
        attention="image_blocks",
        names=_LLAVA_NAMES,
    ),
    "paligemma": Family(_LLAVA_PARTS, _patches, attention="prefix", names=_LLAVA_NAMES),
    "llava": Family(_LLAVA_PARTS, _llava, names=_LLAVA_NAMES),
    "smolvlm": Family(_IDEFICS_PARTS, _shuffled),
    "idefics3": Family(_IDEFICS_PARTS, _shuffled),
}
"""`model_type` -> its family."""
_IDS = {
    "image_token_id": {"qwen2_vl": 151655, "qwen2_5_vl": 151655, "qwen3_vl": 151655, "smolvlm": 128257}
    | {"idefics3": 128257},
    "image_token_index": {"gemma3": 262144, "paligemma": 256000, "llava": 32000},
    "boi_token_index": {"gemma3": 255999},
    "vision_start_token_id": {"qwen2_vl": 151652, "qwen2_5_vl": 151652, "qwen3_vl": 151652},
    "vision_end_token_id": {"qwen2_vl": 151653, "qwen2_5_vl": 151653, "qwen3_vl": 151653},
}
"""Ids that an architecture uses if its `config.json` leaves them out."""


def token_of(table: Mapping[str, Any], *keys: str) -> int | None:
    """The token that one of some keys of a `config.json` names, or the architecture's own; None: neither."""
    given = next((table[key] for key in keys if isinstance(table.get(key), int)), None)
    kind = str(table.get("model_type"))
    return given if given is not None else next((_IDS[k][kind] for k in keys if kind in _IDS.get(k, {})), None)


def part_of(name: str, family: Family) -> Part | None:
    """The part that a parameter of the module belongs to, by the longest beginning of its name."""
    found = [(len(begin), part) for part, begins in family.parts.items() for begin in begins if name.startswith(begin)]
    return max(found)[1] if found else None


def names_in_files(name: str, family: Family) -> list[str]:
    """The names that a parameter may have in weight files, that of files on the hub first."""
    for begin, others in family.names:
        if name.startswith(begin):
            return [other + name.removeprefix(begin) for other in others]
    return [name]


def text_table(table: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a `config.json` that describes the language model: all of it, with `text_config` on top."""
    inner = table.get("text_config")
    return {**table, **inner} if isinstance(inner, Mapping) else table
