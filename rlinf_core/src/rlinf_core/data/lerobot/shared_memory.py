"""Share the numeric columns of a dataset between all ranks and loader workers of a machine.

Small datasets are copied to workers. Columns of more than `SHARED_FROM` bytes are written once, uncompressed, to the
cache (`rlinf_core.cache`), and every process memory-maps the files: copying a source to a worker then costs almost
nothing, and the next run opens the dataset without reading its data files. If the cache cannot be written, every
process has its own copy, as for small datasets.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlinf_core.cache import CacheEntry, cache_folder, cache_key, find_entry, read_entry, store_entry
from rlinf_core.errors import UserError

SHARED_FROM = 2**25
"""Size in bytes from which columns are shared."""
LAYOUT = 2
"""Version of the file layout; part of the key."""
KIND = "columns"
"""Their folder in the cache."""


class Columns(dict[str, NDArray[Any]]):
    """Column -> values of all frames; read-only, because both splits of a dataset share them."""

    entry: CacheEntry | None = None
    """What they are mapped from; None if they are in this process's memory."""

    def __init__(self, columns: Iterable[tuple[str, NDArray[Any]]] = ()) -> None:
        super().__init__(columns)
        for values in self.values():
            values.flags.writeable = False

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process maps the files. If somebody has removed them meanwhile, they are written again."""
        entry = self.entry
        if entry and entry.damage:
            entry = _stored(self, entry.manifest.stem)
        return (_copy, (entry.manifest,)) if entry else (Columns, (list(self.items()),))


def find_shared(key: object) -> Columns | None:
    """The columns that any process has shared under a key; None if there are none, or if they are damaged."""
    entry = find_entry(KIND, cache_key(LAYOUT, key))
    return _map(entry) if entry else None


def share(columns: Columns, key: object) -> Columns:
    """Return the columns, mapped from files if they are large; prints a note if the files cannot be written.

    Args:
        columns: The columns, in memory.
        key: Everything that they depend on; compared by its `repr`.
    """
    if _size(columns) < SHARED_FROM:
        return columns
    entry = _stored(columns, cache_key(LAYOUT, key))
    return _map(entry) if entry else columns


def _stored(columns: Columns, key: str) -> CacheEntry | None:
    """Write columns to the cache; a note says why they cannot be."""

    def write(folder: Path) -> dict[str, Any]:
        for number, values in enumerate(columns.values()):
            np.save(folder / f"{number}.npy", values)
        return {"names": list(columns)}

    try:
        return store_entry(KIND, key, write)
    except OSError as error:
        why = error if error.errno else f"{error}: the disk is full"  # NumPy's own error counts what it has written.
        print(
            f"note: the numeric columns of the dataset ({_size(columns) / 1e9:.1f} GB) cannot be written to "
            f"{cache_folder() / KIND} to be shared by all processes: {why}. Each process and loader worker keeps its "
            "own copy in memory; to share one per machine, make room there or set RLINF_CACHE to a folder with enough "
            "space",
            file=sys.stderr,
            flush=True,
        )
        return None


def _size(columns: Columns) -> int:
    return sum(values.nbytes for values in columns.values())


def _copy(manifest: Path) -> Columns:
    """The columns in another process, from the files that the first one has verified."""
    try:
        entry = read_entry(manifest)
        if entry is None or entry.damage:
            raise UserError(entry.damage if entry else f"{manifest} is missing")
        return _map(entry)
    except (OSError, ValueError, EOFError, UserError) as error:
        raise UserError(
            f"the cached columns of the dataset were removed or damaged while a process was starting: {error}. Start "
            "again: they are written again"
        ) from error


def _map(entry: CacheEntry) -> Columns:
    names = entry.facts["names"]
    files = [np.load(entry.file(f"{number}.npy"), mmap_mode="r").view(np.ndarray) for number in range(len(names))]
    columns = Columns(zip(names, files, strict=True))
    columns.entry = entry
    return columns


@dataclass(frozen=True)
class Runs:
    """Ascending positions, stored as runs of consecutive numbers: a few numbers per episode of a split."""

    firsts: NDArray[np.int64]
    """First position of each run."""
    offsets: NDArray[np.int64]
    """Number of positions in earlier runs."""
    count: int

    @staticmethod
    def of(positions: NDArray[np.int64]) -> Runs:
        """The runs of ascending positions."""
        starts = np.flatnonzero(np.diff(positions, prepend=-2) != 1)
        return Runs(positions[starts], starts, len(positions))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """The positions at some indices; raises `IndexError` for an index out of range."""
        if indices.size and not (indices.min() >= 0 and indices.max() < self.count):
            raise IndexError(f"index out of range: there are {self.count} rows")
        run = np.searchsorted(self.offsets, indices, side="right") - 1
        return self.firsts[run] + indices - self.offsets[run]

    def all(self) -> NDArray[np.int64]:
        """All positions, ascending."""
        return self[np.arange(self.count)]
