"""Model folders as `save_pretrained` of transformers writes them, local or on the hub. Imports no torch."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlinf_core import UserError
from rlinf_core.contract.weights.folder import CONVERT, hint_for_folder
from rlinf_core.hub import NotInRepositoryError, Snapshot, full_name, local_path, open_snapshot, parse_hub_id
from rlinf_core.untrusted.text import path_inside, read_json
from rlinf_plugins_text.rows.tokenizer import FILES
from rlinf_plugins_text.vision.processor import FILES as PROCESSOR_FILES

CONFIG, GENERATION = "config.json", "generation_config.json"
LISTED = 6
"""An error lists at most this many names per problem."""
HEAD, EMBEDDINGS = "lm_head.weight", ("embed_tokens.weight", "wte.weight")
"""The head's parameter, and how the names of embeddings end."""
COMPARED = 2**24
"""Bytes compared at a time."""
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def find_folder(text: str, setting: str) -> Path:
    """The folder that a setting names; for a model on the hub, downloaded without the weights.

    Raises:
        UserError: The folder does not exist, or the hub does not have it, denies access or does not answer.
    """
    path = local_path(text, setting)
    if path is not None:
        if not path.is_dir():
            raise UserError(f"{setting}: {path} is a file; name the folder that holds {CONFIG}")
        return path
    snapshot = _snapshot(text, setting)
    _fetch(snapshot, (CONFIG, GENERATION, *FILES, *PROCESSOR_FILES))
    return snapshot.folder


def find_weights(text: str) -> Path:
    """The folder that `policy.weights` names; for a model on the hub, downloaded with the weights."""
    path = local_path(text, "policy.weights")
    if path is not None:
        return find_folder(text, "policy.weights")
    snapshot = _snapshot(text, "policy.weights")
    _fetch(snapshot, (INDEX,))
    index = snapshot.folder / INDEX
    snapshot.fetch(_shards(index) if index.exists() else (SINGLE,))
    weight_files(snapshot.folder, text)
    return snapshot.folder


def weight_files(folder: Path, name: str) -> list[Path]:
    """The safetensors files of a folder; empty for a model on the hub whose weights are not downloaded yet.

    Raises:
        UserError: A local folder lacks some or all of them.
    """
    on_hub = local_path(name, "policy.weights") is None
    names = _shards(folder / INDEX) if (folder / INDEX).exists() else [SINGLE]
    missing = [one for one in names if not (folder / one).exists()]
    if missing and on_hub:
        return []
    if missing:
        hint = hint_for_folder(folder, (SINGLE, INDEX), takes_files=False) if SINGLE in missing else ""
        hint = hint or f". Convert weights in another format with {CONVERT}"
        raise UserError(f"policy.weights: {folder} lacks {listed(missing)}{hint}")
    return [folder / one for one in names]


def config_table(folder: Path, setting: str) -> dict[str, Any]:
    """The `config.json` of a folder. Raises `UserError` if it cannot be read."""
    path = folder / CONFIG
    try:
        table = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{setting}: {path} cannot be read: {error}") from error
    if not isinstance(table, dict):
        raise UserError(f"{setting}: {path} must hold a JSON object")
    return table


def generation_table(folder: Path | None) -> dict[str, Any]:
    """The `generation_config.json` of a folder; empty if it has none. Raises `UserError` if it cannot be read."""
    if folder is None or not (path := folder / GENERATION).exists():
        return {}
    try:
        table = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"policy.weights: {path} cannot be read: {error}") from error
    if not isinstance(table, dict):
        raise UserError(f"policy.weights: {path} must hold a JSON object")
    return table


def listed(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:LISTED]) + f" and {len(names) - LISTED} more" * (len(names) > LISTED)


def index_table(index: Path) -> dict[str, str]:
    """The tensors in an index -> their files. Raises `UserError` if it is not an index."""
    _shards(index)
    places: dict[str, str] = read_json(index)["weight_map"]
    return places


def check_head(files: Sequence[Path], table: Mapping[str, Any]) -> None:
    """Raise `UserError` if the weights have a head of their own although `config.json` ties it, or the other way round.

    Args:
        files: Safetensors files; empty: not downloaded yet.
        table: The `config.json` with `policy.config` applied. What it leaves out is the architecture's to say.
    """
    tied = table.get("tie_word_embeddings")
    tensors: dict[str, _Bytes] = {}
    for path in files if isinstance(tied, bool) else ():
        tensors |= _headers(path)
    embedding = next((tensors[name] for name in tensors if name.endswith(EMBEDDINGS)), None)
    if embedding is None:  # Other names, or unreadable: the model's own check reports them.
        return
    head = tensors.get(HEAD)
    if tied and head is not None and not head.equals(embedding):
        raise UserError(
            f"policy.weights: {head.path} has a head ({HEAD}) that differs from the embedding, but {CONFIG} ties them. "
            "Set policy.config = { tie_word_embeddings = false }"
        )
    if not tied and head is None and not any("lm_head" in name for name in tensors) and not _has_other_head(tensors):
        raise UserError(
            f"policy.weights: {embedding.path.parent} has no head ({HEAD}), but {CONFIG} does not tie it to the "
            "embedding. Set policy.config = { tie_word_embeddings = true }"
        )


@dataclass(frozen=True)
class _Bytes:
    """Where a tensor is in a file."""

    path: Path
    begin: int
    end: int
    what: tuple[str, tuple[int, ...]]
    """Dtype and shape."""

    def equals(self, other: _Bytes) -> bool:
        """Whether both hold the same bytes."""
        if self.what != other.what:
            return False
        with self.path.open("rb") as one, other.path.open("rb") as two:
            one.seek(self.begin)
            two.seek(other.begin)
            for place in range(self.begin, self.end, COMPARED):
                size = min(COMPARED, self.end - place)
                if one.read(size) != two.read(size):
                    return False
        return True


def _has_other_head(tensors: Mapping[str, _Bytes]) -> bool:
    """Whether a matrix outside of the decoder's layers may be a head by another name."""
    return any(name.startswith(("embed_out.", "output.", "score.", "head.")) for name in tensors)


def _headers(path: Path) -> dict[str, _Bytes]:
    """The tensors of a safetensors file; none if its header cannot be read."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                return {}
            header = json.loads(file.read(length))
        start = 8 + length
        found = {}
        for name, tensor in header.items():
            if name != "__metadata__":
                begin, end = tensor["data_offsets"]
                what = tensor["dtype"], tuple(tensor["shape"])
                found[name] = _Bytes(path, start + begin, start + end, what)
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return {}


def _shards(index: Path) -> list[str]:
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        for name in names:
            path_inside(index.parent, name)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"policy.weights: {index} cannot be read: {type(error).__name__}: {error}") from error
    if not names:
        raise UserError(f"policy.weights: {index} lists no weight files")
    return names


def _snapshot(text: str, setting: str) -> Snapshot:
    repository, revision = parse_hub_id(text)
    for file in (CONFIG, "tokenizer.json"):  # A repository may hold only a tokenizer.
        try:
            return open_snapshot(repository, revision, "model", setting, file)
        except NotInRepositoryError:
            continue
    raise UserError(f"{setting}: the model {full_name(repository, revision)} on the hub has no {CONFIG}")


def _fetch(snapshot: Snapshot, files: Iterable[str]) -> None:
    """Download those of the files that the model has; without a network, the ones in the cache are used."""
    if snapshot.silence is None:
        snapshot.fetch(files)
