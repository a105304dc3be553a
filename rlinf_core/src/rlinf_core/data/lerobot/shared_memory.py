"""Numbers of all frames of a dataset, in memory once for all ranks and loader workers of a machine.

Small datasets are simply copied to workers. Columns of more than `SHARED_FROM` bytes are written to the cache folder
(`RLINF_CACHE`) once, uncompressed, and every process maps the files: what they hold is shared, a copy of a source in a
worker costs next to nothing, and the next run opens the dataset without reading its data files. Where the folder
cannot be written, every process has a copy of its own, as of small datasets.
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
"""Bytes of columns above which they are shared."""
LAYOUT = 1
"""Of the files; part of their key."""


class Columns(dict[str, NDArray[Any]]):
    """Column -> its values in all frames; read-only, as both splits of a dataset share them."""

    folder: Path | None = None
    """Where they are mapped from; None: they are in this process's own memory."""

    def __init__(self, columns: Iterable[tuple[str, NDArray[Any]]] = ()) -> None:
        super().__init__(columns)
        for values in self.values():
            values.flags.writeable = False

    def __reduce__(self) -> tuple[Any, ...]:
        return (_map, (self.folder,)) if self.folder else (Columns, (list(self.items()),))


def find_shared(key: object) -> Columns | None:
    """The columns that some process has shared under a key; None if none has."""
    folder = _folder(key)
    return _map(folder) if folder.is_dir() else None


def share(columns: Columns, key: object) -> Columns:
    """The same columns, mapped from files if they are large and the files can be written, which is said if not.

    Args:
        columns: As they were read.
        key: What they are read from and how; its `repr` says all.
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
            if not folder.is_dir():  # Another rank may have been faster: theirs are the same.
                aside.rename(folder)
    except OSError as e:
        if not folder.is_dir():
            print(
                f"note: the numbers of the dataset ({size / 1e9:.1f} GB) cannot be written to {folder.parent}, from "
                f"where all processes would map them: {e}. Each process and loader worker has its own copy in memory; "
                "for one a machine, make room there or set RLINF_CACHE to a folder with enough space",
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
        raise UserError(f"{folder} cannot be read: {e}. Delete this folder: it is made anew when it is needed") from e
    columns = Columns(zip(names, files, strict=True))
    columns.folder = folder
    return columns


@dataclass(frozen=True)
class Runs:
    """Ascending positions as runs of neighbours: the rows of a split, in a few numbers an episode."""

    firsts: NDArray[np.int64]
    """The position each run begins with."""
    offsets: NDArray[np.int64]
    """How many positions are in the runs before it."""
    count: int

    @staticmethod
    def of(positions: NDArray[np.int64]) -> Runs:
        """The runs of ascending positions."""
        starts = np.flatnonzero(np.diff(positions, prepend=-2) != 1)
        return Runs(positions[starts], starts, len(positions))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions by their number in ascending order; raises `IndexError` if there are not that many."""
        if indices.size and not (indices.min() >= 0 and indices.max() < self.count):
            raise IndexError(f"there are {self.count} rows, from 0")
        run = np.searchsorted(self.offsets, indices, side="right") - 1
        return self.firsts[run] + indices - self.offsets[run]

    def all(self) -> NDArray[np.int64]:
        """All positions, ascending."""
        return self[np.arange(self.count)]
