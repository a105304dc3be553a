"""What a folder holds instead of weights that can be read, and what to set instead. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from rlinf_core.untrusted.text import read_json

PICKLED = ("pytorch_model.bin", "model.pt", "pytorch_model.pt", "model.pth")
ADAPTER = "adapter_config.json"
"""The file that PEFT writes beside adapters."""
DEEPEST = 5
"""Levels of folders that are searched for weights."""
MOST_FOLDERS = 2000
"""Folders that are searched at most: somebody may have named their home."""
CONVERT = "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OTHER_FOLDER)"


def hint_for_folder(path: Path, marks: Collection[str], *, takes_files: bool) -> str:
    """A sentence about a folder without weights, to follow a message: `. It holds ...`; empty if nothing is known.

    Args:
        path: The folder that `policy.weights` names.
        marks: Names of files by which a folder with weights is recognised.
        takes_files: Whether `policy.weights` may name a file, and pickles are read.
    """
    if (path / ADAPTER).is_file():
        return _adapters(path / ADAPTER)
    if (path / "config.toml").is_file() and (path / "checkpoints").is_dir():
        return f". It is a run: export it with `rlinf export {path} --output FOLDER`, and name that folder"
    if takes_files and (files := [path / name for name in PICKLED if (path / name).is_file()]):
        return f". It holds {files[0].name}: name the file, policy.weights = {quoted(files[0])}"
    if any(path.glob("pytorch_model*.bin")):
        what = "It holds pickles (pytorch_model….bin): save them as safetensors where they come from"
        return f". {what}" + ("" if takes_files else f", with {CONVERT}")
    if takes_files and len(single := sorted(path.glob("*.safetensors"))) == 1:
        return f". It holds {single[0].name}: name the file, policy.weights = {quoted(single[0])}"
    if inside := folders_with(path, marks):
        more = f", the newest of {len(inside)} with weights" if len(inside) > 1 else ""
        return f". A folder inside holds weights{more}: set policy.weights = {quoted(inside[-1])}"
    if any((path.parent / name).is_file() for name in marks):
        return f". The folder above holds weights: set policy.weights = {quoted(path.parent)}"
    if any(path.glob("*.gguf")):
        return ". It holds quantised weights (GGUF): use the model in float32 or bfloat16 that they were made from"
    if any(path.glob("**/*.distcp")):
        return ". It holds a sharded training checkpoint: name a folder with weights exported from it"
    return ""


def folders_with(path: Path, marks: Collection[str]) -> list[Path]:
    """Folders below that hold one of some files, the one with the largest step last; links are not followed."""
    found = list(_walk(path, marks))
    return sorted(found, key=lambda one: ([int(number) for number in re.findall(r"\d+", str(one))], str(one)))


def _walk(path: Path, marks: Collection[str]) -> Iterator[Path]:
    for number, (folder, below, files) in enumerate(os.walk(path)):
        if any(name in files for name in marks):
            yield Path(folder)
        if number > MOST_FOLDERS:
            return
        below.sort()
        if len(Path(folder).relative_to(path).parts) >= DEEPEST:
            below.clear()


def quoted(path: Path) -> str:
    """A path as TOML has it."""
    return f'"{path}"'


def _adapters(path: Path) -> str:
    """PEFT's adapters are no weights: they need the model that they change."""
    try:
        base = str(read_json(path).get("base_model_name_or_path") or "their base model")
    except (OSError, ValueError, AttributeError):
        base = "their base model"
    return (
        f". It holds adapters of PEFT ({ADAPTER}) for {base}, not a whole model: name that model here, and this folder "
        f"in policy.lora.weights = {quoted(path.parent)}; `rlinf export --merge` of the run writes a whole model"
    )
