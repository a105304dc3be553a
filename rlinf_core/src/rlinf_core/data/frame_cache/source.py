"""Frames that `rlinf cache` has decoded once, read in place of videos and compressed pictures.

A part of a cache holds the frames of neighbouring positions one after the other. `raw` parts are mapped into memory and
are the frames to the bit; a `jpeg` part begins with the offsets of its pictures. Which cache it is: see
`frame_cache_folders`.

Where the policy begins by resizing, what is kept is resized: fewer bytes, and nothing left to compute. That is exact if
resizing leaves what has its size alone (`Transform.resizes`) and nothing before it touches images (`resizing_to_keep`).
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlinf_core.contract.datasets import LeRobotDatasetConfig
from rlinf_core.contract.policy import PolicyConfig
from rlinf_core.data.frame_cache.manifest import Format, Frame, Manifest, Place, caches_of, find_cache, read_manifest
from rlinf_core.data.images.pictures import decode
from rlinf_core.data.lerobot.source import LeRobotSource
from rlinf_core.data.sample import Row
from rlinf_core.errors import UserError


class CachedColumn:
    """The frames of a column; files are mapped on first use."""

    def __init__(self, place: Place, manifest: Manifest, positions: NDArray[np.int64]) -> None:
        self._place, self._manifest, self._positions = place, manifest, positions
        self._stops = np.cumsum([part.frames for part in manifest.parts])
        self._open: dict[int, Any] = {}

    def frames(self, positions: NDArray[np.int64]) -> list[Frame]:
        """The frames at positions of the dataset, uint8 [height, width, 3]; raw ones are read-only views of a file."""
        places = np.searchsorted(self._positions, positions)
        parts = np.searchsorted(self._stops, places, side="right")
        within = places - (self._stops - [part.frames for part in self._manifest.parts])[parts]
        read = self._raw if self._place.format == "raw" else self._jpeg
        return [read(part, frame) for part, frame in zip(parts.tolist(), within.tolist(), strict=True)]

    def _raw(self, part: int, frame: int) -> Frame:
        if part not in self._open:
            shape = (self._manifest.parts[part].frames, *self._manifest.size, 3)
            self._open[part] = np.asarray(np.memmap(self._file(part), np.uint8, "r", shape=shape))
        found: Frame = self._open[part][frame]
        return found

    def _jpeg(self, part: int, frame: int) -> Frame:
        if part not in self._open:
            data, frames = np.memmap(self._file(part), np.uint8, "r"), self._manifest.parts[part].frames
            self._open[part] = np.frombuffer(data, np.int64, frames + 1), memoryview(data)
        offsets, data = self._open[part]
        return decode(data[offsets[frame] : offsets[frame + 1]], f"{self._file(part)}: frame {frame}")

    def _file(self, part: int) -> Path:
        return self._place.folder / self._manifest.parts[part].file

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}


class CachedSource:
    """The rows of a `LeRobotSource` with pictures from a cache; follows `ColumnSource`."""

    def __init__(self, source: LeRobotSource, columns: dict[str, CachedColumn], format: Format) -> None:
        self.format = format
        self._source, self._columns = source, columns
        self.without_images, self.columns, self.describe = source.without_images, source.columns, source.describe
        self.fingerprint = source.fingerprint

    def __len__(self) -> int:
        return len(self._source)

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        """Rows with their pictures; raw ones are read-only."""
        rows = self._source.without_images(indices)
        positions = self._source.positions_of(indices)
        for name, column in self._columns.items():
            for row, frame in zip(rows, column.frames(positions), strict=True):
                row[name] = frame
        return rows

    @property
    def episodes(self) -> NDArray[np.int64]:
        """[n], the dataset's own episode number of each row."""
        return self._source.episodes


def open_cached(source: LeRobotSource, dataset: LeRobotDatasetConfig, policy: PolicyConfig) -> CachedSource:
    """The rows of a source with pictures from the cache that `data.cache` asks for.

    Raises:
        UserError: There is none that is complete and has its frames; it names the command that makes it.
    """
    assert dataset.cache
    caches = caches_of(source.metadata, dataset, policy, dataset.cache)
    place, reasons = find_cache(caches, [source])
    if place is None:
        others = caches.other_kinds()
        if not reasons:
            reasons = [f"there is no cache of {source.metadata.name} in {caches.above}"]
            reasons += [f"there is {', '.join(others)} of it (data.cache, data.cache_quality)"] if others else []
        options = f"--format {dataset.cache}" + f" --quality {caches.quality}" * (dataset.cache == "jpeg")
        options += f" --output {dataset.cache_dir}" if dataset.cache_dir else ""
        raise UserError(
            f'data.cache = "{dataset.cache}", but {"; ".join(reasons)}: run `rlinf cache` with '
            f"this config and {options}, or leave data.cache out"
        )
    columns = {}
    for column in source.images:
        manifest = read_manifest(place.manifest(column))
        assert manifest is not None
        columns[column] = CachedColumn(place, manifest, place.positions)
    return CachedSource(source, columns, dataset.cache)
