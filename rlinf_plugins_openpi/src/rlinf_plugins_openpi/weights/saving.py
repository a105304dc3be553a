"""Writing weights: safetensors in openpi's PyTorch layout, one tensor in memory at a time, aside and then renamed."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rlinf_core import UserError
from rlinf_plugins_openpi.model.parts import unpacked
from rlinf_plugins_openpi.weights.files import DTYPES
from rlinf_plugins_openpi.weights.names import EMBEDDING, EMBEDDING_IN_FILES, UNUSED_HEAD, published_names

if TYPE_CHECKING:
    import torch

    from rlinf_plugins_openpi.model.dimensions import Pi0Dimensions

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""The bytes of an element of a dtype in safetensors' words."""
METADATA = {"format": "pt", EMBEDDING: EMBEDDING_IN_FILES}
"""As published files have it: the second name holds what the first one, a tied tensor, would."""


class Entry(NamedTuple):
    """A tensor to be written."""

    dtype: str
    """In safetensors' words."""
    shape: tuple[int, ...]


def published_entries(entries: Mapping[str, Entry], dimensions: Pi0Dimensions) -> dict[str, Entry]:
    """What a published file holds, for tensors under the names of the tables.

    The embedding is stored as published files store it, under the name of the tied head, and the expert's unused head
    is there, as zeros: strict loaders, openpi's and lerobot's, ask for it.
    """
    head = Entry(entries["embedding.weight"].dtype, (dimensions.vocab_size, dimensions.expert.width))
    return {published_key(name, dimensions): entry for name, entry in entries.items()} | {UNUSED_HEAD: head}


def published_key(name: str, dimensions: Pi0Dimensions) -> str:
    """The key of a tensor of the tables in a published file."""
    return EMBEDDING_IN_FILES if name == "embedding.weight" else published_names(dimensions)[name]


def save_published(state: Mapping[str, torch.Tensor], path: str | Path, dimensions: Pi0Dimensions) -> None:
    """Write a model's parameters to one file in openpi's PyTorch layout, in the dtypes they have.

    Args:
        state: The model's own parameter names (or those of their parts) -> whole tensors on the CPU.
        path: The `.safetensors` file to write.
        dimensions: The model's.

    Raises:
        ValueError: `state` does not hold exactly the model's parameters.
        UserError: The disk is too small.
    """
    names, state = published_names(dimensions), unpacked(state, dimensions)
    if state.keys() != names.keys():
        raise ValueError(f"not the parameters of this model: {sorted(state.keys() ^ names.keys())}")
    entries = {name: Entry(DTYPES[str(tensor.dtype)], tuple(tensor.shape)) for name, tensor in state.items()}
    tensors = ((EMBEDDING_IN_FILES if key == EMBEDDING else key, state[name]) for name, key in names.items())
    write_safetensors(Path(path), published_entries(entries, dimensions), tensors, zeros={UNUSED_HEAD})


def write_safetensors(
    path: Path,
    entries: Mapping[str, Entry],
    tensors: Iterable[tuple[str, torch.Tensor]],
    zeros: Iterable[str] = (),
    metadata: Mapping[str, str] = METADATA,
) -> None:
    """Write a safetensors file without holding it: safetensors' own writer wants all tensors at once.

    Args:
        path: The file; it appears when it is complete.
        entries: Every tensor's key, dtype and shape, in the order of the file.
        tensors: The tensors, in any order, cast to the dtypes of `entries`.
        zeros: Keys that are all zeros and not among `tensors`.
        metadata: Texts for the header.

    Raises:
        UserError: The disk is too small.
        ValueError: `tensors` are not those of `entries`.
    """
    header, starts = _header(entries, metadata)
    size = len(header) + sum(BYTES[entry.dtype] * math.prod(entry.shape) for entry in entries.values())
    if (free := shutil.disk_usage(path.parent).free) < size:
        raise UserError(f"{path} needs {size / 1e9:.1f} GB, and {path.parent} has {free / 1e9:.1f} GB left")
    aside = path.with_name(f".{path.name}.tmp")
    unwritten = entries.keys() - set(zeros)
    try:
        with aside.open("wb") as file:
            file.write(header)
            file.truncate(size)  # What is not written is zeros, and takes no space on most file systems.
            for key, tensor in tensors:
                if key not in unwritten or tuple(tensor.shape) != tuple(entries[key].shape):
                    raise ValueError(f"{key} {list(tensor.shape)} is not to be written")
                unwritten.remove(key)
                file.seek(starts[key])
                file.write(_bytes(tensor, entries[key].dtype))
            if unwritten:
                raise ValueError(f"no tensors for {sorted(unwritten)}")
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _header(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The head of the file and where every tensor starts."""
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    ends, end = {}, 0
    for key, entry in entries.items():
        start, end = end, end + BYTES[entry.dtype] * math.prod(entry.shape)
        ends[key] = start
        table[key] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {key: len(header) + start for key, start in ends.items()}


def _bytes(tensor: torch.Tensor, dtype: str) -> memoryview:
    import torch

    kind = next(name for name, ours in DTYPES.items() if ours == dtype).removeprefix("torch.")
    flat = tensor.detach().to(getattr(torch, kind)).contiguous().flatten()
    return memoryview(flat.view(torch.uint8).numpy())
