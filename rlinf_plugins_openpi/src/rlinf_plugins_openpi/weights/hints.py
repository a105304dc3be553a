"""What a folder or file holds instead of weights that can be read, and what to do about it. Imports no torch.

Each hint is a sentence that starts with `. `, to follow a message; empty if there is nothing to say.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from rlinf_core.untrusted import read_json

MARKS = ("model.safetensors", "model.safetensors.index.json", "full_weights.pt", "manifest.ocdbt")
"""Files by which a folder with weights is recognised."""
PICKLED = ("pytorch_model.bin", "model.pt", "pytorch_model.pt", "model.pth")
ADAPTER = "adapter_config.json"
"""The file that PEFT writes beside adapters."""
DEEPEST = 5
"""Levels of folders that are searched for weights."""
MOST_FOLDERS = 2000
"""Folders that are searched at most: somebody may have named their home."""
QUANTIZED = re.compile(r"\.(qweight|qzeros|scales|weight_scale\w*|SCB|absmax|quant_map|g_idx)$|quant_state|_packed$")
"""Names of tensors that quantisation adds: GPTQ, AWQ, bitsandbytes, compressed-tensors."""
OLD_LEROBOT = re.compile(r"paligemma\.(language_model\.model|vision_tower|multi_modal_projector)\.")
"""Names of PaliGemma's parts in transformers before 4.52, which lerobot's files had before lerobot 0.4."""
NORMALIZER = re.compile(r"^(un)?normalize_(inputs|targets|outputs)\.buffer_")
"""Statistics, which lerobot kept in the file of the weights before 0.4."""


def hint_for_folder(path: Path) -> str:
    """What a folder without weights holds, and what `policy.weights` should be."""
    if (path / ADAPTER).is_file():
        return _adapters(path / ADAPTER)
    if (path / "config.toml").is_file() and (path / "checkpoints").is_dir():
        return f". It is a run: export it with `rlinf export {path} --output FOLDER`, and name that folder"
    if pickled := next((path / name for name in PICKLED if (path / name).is_file()), None):
        return f". It holds {pickled.name}: name the file, policy.weights = {quoted(pickled)}"
    if any(path.glob("pytorch_model*.bin")):
        return (
            ". It holds weights as several pickles (pytorch_model-….bin): load them where they come from and save them "
            "as safetensors"
        )
    single = sorted(path.glob("*.safetensors"))
    if len(single) == 1:
        return f". It holds {single[0].name}: name the file, policy.weights = {quoted(single[0])}"
    if inside := [*_with_weights(path)]:
        newest = max(inside, key=_by_step)
        more = f", the newest of {len(inside)} with weights" if len(inside) > 1 else ""
        if newest.name == "params":  # `rlinf convert` takes the folder above, too.
            return f". JAX parameters of openpi are in {newest}{more}: run `rlinf convert {newest} --output FOLDER`"
        return f". A folder inside holds weights{more}: set policy.weights = {quoted(newest)}"
    if any((path.parent / name).is_file() for name in MARKS):
        return f". The folder above holds weights: set policy.weights = {quoted(path.parent)}"
    if any(path.glob("**/*.distcp")):
        return ". It holds a sharded training checkpoint: name a folder with weights exported from it"
    return ""


def quoted(path: Path) -> str:
    """A path as TOML has it."""
    return f'"{path}"'


def _adapters(path: Path) -> str:
    """PEFT's adapters are no weights: they need the model that they change."""
    try:
        table = read_json(path)
        base = str(table.get("base_model_name_or_path") or "their base model")
    except (OSError, ValueError, AttributeError):
        base = "their base model"
    return (
        f". It holds adapters of PEFT ({ADAPTER}) for {base}, not a whole model: load that model with them, call "
        "merge_and_unload(), save the result with save_pretrained(OTHER_FOLDER), and name OTHER_FOLDER"
    )


def _with_weights(path: Path) -> Iterator[Path]:
    """Folders below that hold weights; symbolic links are not followed."""
    for number, (folder, below, files) in enumerate(os.walk(path)):
        if any(name in files for name in MARKS):
            yield Path(folder)
        if number > MOST_FOLDERS:
            return
        below.sort()
        if len(Path(folder).relative_to(path).parts) >= DEEPEST:
            below.clear()


def _by_step(path: Path) -> tuple[list[int], str]:
    """Order by the numbers in the path: checkpoints are numbered by steps."""
    return [int(number) for number in re.findall(r"\d+", str(path))], str(path)


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
