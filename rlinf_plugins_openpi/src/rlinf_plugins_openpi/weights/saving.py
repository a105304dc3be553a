"""Write weights as safetensors in openpi's PyTorch layout, atomically and with one tensor in memory at a time."""

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
"""Bytes per element, by safetensors' dtype."""
METADATA = {"format": "pt", EMBEDDING: EMBEDDING_IN_FILES}
"""As in published files: the first name is a tied tensor, stored under the second name."""


class Entry(NamedTuple):
    """A tensor to write."""

    dtype: str
    """In safetensors' terms."""
    shape: tuple[int, ...]


def published_entries(entries: Mapping[str, Entry], dimensions: Pi0Dimensions) -> dict[str, Entry]:
    """The tensors of a published file, for tensors under the names of the tables.

    As in published files, the embedding has the name of the tied head. The expert's unused head is added, as zeros,
    because strict loaders such as openpi's and lerobot's require it.
    """
    head = Entry(entries["embedding.weight"].dtype, (dimensions.vocab_size, dimensions.expert.width))
    return {published_key(name, dimensions): entry for name, entry in entries.items()} | {UNUSED_HEAD: head}


def published_key(name: str, dimensions: Pi0Dimensions) -> str:
    """The key in a published file of a tensor of the tables."""
    return EMBEDDING_IN_FILES if name == "embedding.weight" else published_names(dimensions)[name]


def save_published(state: Mapping[str, torch.Tensor], path: str | Path, dimensions: Pi0Dimensions) -> None:
    """Write a model's parameters to one file in openpi's PyTorch layout, keeping their dtypes.

    Args:
        state: The model's own parameter names (or those of their parts) -> whole tensors on the CPU.
        path: The `.safetensors` file to write.
        dimensions: The sizes of the model.

    Raises:
        ValueError: `state` is not exactly the model's parameters.
        UserError: The disk has too little space.
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
    """Write a safetensors file tensor by tensor; safetensors' own writer needs all tensors at once.

    Args:
        path: The file; it is written under a temporary name and renamed when complete.
        entries: Every tensor's key, dtype and shape, in the order of the file.
        tensors: The tensors, in any order; they are cast to the dtypes of `entries`.
        zeros: Keys of tensors that are all zeros and not among `tensors`.
        metadata: Strings for the header.

    Raises:
        UserError: The disk has too little space.
        ValueError: `tensors` does not match `entries`.
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
            file.truncate(size)  # Bytes never written read as zeros, and take no space on most file systems.
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
    """The header of the file, and the offset of each tensor."""
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
