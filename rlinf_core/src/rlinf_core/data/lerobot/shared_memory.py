"""Share the numeric columns of a dataset between all ranks and loader workers of a machine.

Small datasets are copied to workers. Columns of more than `SHARED_FROM` bytes are written once, uncompressed, to the
cache folder (`RLINF_CACHE`), and every process memory-maps the files: copying a source to a worker then costs almost
nothing, and the next run opens the dataset without reading its data files. If the folder cannot be written, every
process has its own copy, as for small datasets.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlinf_core.data.images.parquet import cache_folder
from rlinf_core.errors import UserError

SHARED_FROM = 2**25
"""Size in bytes from which columns are shared."""
LAYOUT = 1
"""Version of the file layout; part of the key."""


class Columns(dict[str, NDArray[Any]]):
    """Column -> values of all frames; read-only, because both splits of a dataset share them."""

    folder: Path | None = None
    """The folder that they are mapped from; None if they are in this process's memory."""

    def __init__(self, columns: Iterable[tuple[str, NDArray[Any]]] = ()) -> None:
        super().__init__(columns)
        for values in self.values():
            values.flags.writeable = False

    def __reduce__(self) -> tuple[Any, ...]:
        return (_map, (self.folder,)) if self.folder else (Columns, (list(self.items()),))


def find_shared(key: object) -> Columns | None:
    """The columns that any process has shared under a key; None if there are none."""
    folder = _folder(key)
    return _map(folder) if folder.is_dir() else None


def share(columns: Columns, key: object) -> Columns:
    """Return the columns, mapped from files if they are large; prints a note if the files cannot be written.

    Args:
        columns: The columns, in memory.
        key: Everything that they depend on; compared by its `repr`.
    """
    size = sum(values.nbytes for values in columns.values())
    if size < SHARED_FROM:
        return columns
    folder = _folder(key)
    aside = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        aside.mkdir(parents=True)
        for number, values in enumerate(columns.values()):
            np.save(aside / f"{number}.npy", values)
        (aside / "names.json").write_text(json.dumps(list(columns)))
        with contextlib.suppress(FileExistsError):
            if not folder.is_dir():  # Another rank may have written the same files.
                aside.rename(folder)
    except OSError as e:
        if not folder.is_dir():
            print(
                f"note: the numeric columns of the dataset ({size / 1e9:.1f} GB) cannot be written to {folder.parent} "
                f"to be shared by all processes: {e}. Each process and loader worker keeps its own copy in memory; to "
                "share one per machine, make room there or set RLINF_CACHE to a folder with enough space",
                file=sys.stderr,
                flush=True,
            )
            return columns
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return _map(folder)


def _folder(key: object) -> Path:
    digest = hashlib.blake2b(repr((LAYOUT, key)).encode(), digest_size=16).hexdigest()
    return cache_folder() / "columns" / digest


def _map(folder: Path) -> Columns:
    try:
        names = json.loads((folder / "names.json").read_text())
        files = [np.load(folder / f"{number}.npy", mmap_mode="r").view(np.ndarray) for number in range(len(names))]
    except (OSError, ValueError) as e:
        raise UserError(f"{folder} cannot be read: {e}. Delete this folder; it is written again when needed") from e
    columns = Columns(zip(names, files, strict=True))
    columns.folder = folder
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
