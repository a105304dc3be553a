"""What a folder or file holds instead of weights of π0 or π0.5, and what to do about it. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from rlinf_core.contract.weights.folder import folders_with
from rlinf_core.contract.weights.folder import hint_for_folder as hint_for_any_folder

MARKS = ("model.safetensors", "model.safetensors.index.json", "full_weights.pt")
"""Files by which a folder with weights is recognised."""
JAX_MARK = "manifest.ocdbt"
QUANTIZED = re.compile(r"\.(qweight|qzeros|scales|weight_scale\w*|SCB|absmax|quant_map|g_idx)$|quant_state|_packed$")
"""Names of tensors that quantisation adds: GPTQ, AWQ, bitsandbytes, compressed-tensors."""
OLD_LEROBOT = re.compile(r"paligemma\.(language_model\.model|vision_tower|multi_modal_projector)\.")
"""Names of PaliGemma's parts in transformers before 4.52, which lerobot's files had before lerobot 0.4."""
NORMALIZER = re.compile(r"^(un)?normalize_(inputs|targets|outputs)\.buffer_")
"""Statistics, which lerobot kept in the file of the weights before 0.4."""


def hint_for_folder(path: Path) -> str:
    """A sentence about a folder without weights, to follow a message; empty if nothing is known."""
    if (path / JAX_MARK).is_file() or (path / "params" / JAX_MARK).is_file():
        return f". It holds openpi's JAX parameters: convert them with `rlinf convert {path} --output FOLDER`"
    hint = hint_for_any_folder(path, MARKS, takes_files=True)
    if not hint and (inside := folders_with(path, (JAX_MARK,))):
        more = f", the newest of {len(inside)}" if len(inside) > 1 else ""
        return f". JAX parameters of openpi are in {inside[-1]}{more}: run `rlinf convert {inside[-1]} --output FOLDER`"
    return hint


def hint_for_tensors(keys: Collection[str], dtypes: Mapping[str, str]) -> str:
    """What other software made of the weights, by the names and dtypes of the tensors; empty if unknown."""
    kinds = {dtype for dtype in dtypes.values() if dtype.startswith(("I", "U", "F8", "F4"))}
    if found := next((key for key in keys if QUANTIZED.search(key)), None) or (kinds and "their dtypes"):
        what = ", ".join(sorted(kinds)) or found
        return f"this looks like a quantised model ({what}): use the one in float32 or bfloat16 that it was made from"
    if any(OLD_LEROBOT.search(key) for key in keys):
        return (
            "this looks like lerobot before 0.4, which had other names: use the newer checkpoint (lerobot/pi0_base, "
            "lerobot/pi05_base), or load and save it with lerobot 0.3.3, which renames them"
        )
    if any(NORMALIZER.search(key) for key in keys):
        return (
            "this looks like lerobot before 0.4, which kept statistics in the file: move them out with lerobot's "
            "src/lerobot/processor/migrate_policy_normalization.py"
        )
    known = re.compile(r"^(.+?)\.(?:paligemma_with_expert\.|PaliGemma/|action_out_proj\.)")
    if prefix := next((match[1] for key in sorted(keys) if (match := known.match(key))), ""):
        return f"its names have the unknown prefix {prefix!r}: save the model itself, not what holds it"
    return ""
