"""Read frames that `rlinf cache` has decoded, instead of videos and compressed images. Imports no torch.

A part of a cache contains the frames of consecutive positions. `raw` parts are memory-mapped and equal the decoded
frames bit for bit; a `jpeg` part starts with the offsets of its images. `manifest` selects the cache.

If the policy's first transform resizes, the cache stores resized frames: fewer bytes, and no resizing while training.
That is exact if resizing does not change images of its output size (`Transform.resizes`) and no earlier transform
touches images (`manifest.resizing_to_keep`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlinf_core.contract.datasets import LeRobotDatasetConfig
from rlinf_core.contract.policy import PolicyConfig
from rlinf_core.data.frame_cache.manifest import Cache, Format, Frame, Manifest, caches_of, find_cache, read_manifest
from rlinf_core.data.images.pictures import decode
from rlinf_core.data.lerobot.source import LeRobotSource
from rlinf_core.data.sample import Row
from rlinf_core.errors import UserError


class CachedColumn:
    """The frames of one column; files are mapped on first use."""

    def __init__(self, cache: Cache, manifest: Manifest, positions: NDArray[np.int64]) -> None:
        self._cache, self._manifest, self._positions = cache, manifest, positions
        self._stops = np.cumsum([part.frames for part in manifest.parts])
        self._open: dict[int, Any] = {}

    def frames(self, positions: NDArray[np.int64]) -> list[Frame]:
        """The frames at positions of the dataset, uint8 [height, width, 3]; raw ones are read-only views of a file."""
        places = np.searchsorted(self._positions, positions)
        parts = np.searchsorted(self._stops, places, side="right")
        within = places - (self._stops - [part.frames for part in self._manifest.parts])[parts]
        read = self._raw if self._cache.format == "raw" else self._jpeg
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

    def close(self) -> None:
        """Unmap the files that no frame uses."""
        self._open.clear()

    def _file(self, part: int) -> Path:
        return self._cache.folder / self._manifest.parts[part].file

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}


class CachedSource:
    """The rows of a `LeRobotSource` with images from a cache; implements `ColumnSource`."""

    def __init__(self, source: LeRobotSource, columns: dict[str, CachedColumn], format: Format) -> None:
        self.format = format
        self._source, self._columns = source, columns
        self.without_images, self.columns, self.describe = source.without_images, source.columns, source.describe
        self.fingerprint, self.names_of = source.fingerprint, source.names_of
        self.tasks, self.step_seconds = source.tasks, source.step_seconds
        self.named_splits, self.other_prompts = source.named_splits, source.other_prompts
        self.row_files, self.image_files_by_name = source.row_files, source.image_files_by_name
        self.image_versions = source.image_versions

    def __len__(self) -> int:
        return len(self._source)

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        """Rows with their images; raw ones are read-only."""
        rows = self._source.without_images(indices)
        positions = self._source.positions_of(indices)
        for name, column in self._columns.items():
            for row, frame in zip(rows, column.frames(positions), strict=True):
                row[name] = frame
        return rows

    @property
    def episodes(self) -> NDArray[np.int64]:
        """[n], the dataset's episode number of each row."""
        return self._source.episodes

    def close(self) -> None:
        """Close the cache's files; they are opened again when rows are read."""
        for column in self._columns.values():
            column.close()


def open_cached(source: LeRobotSource, dataset: LeRobotDatasetConfig, policy: PolicyConfig) -> CachedSource:
    """The rows of a source with images from the cache that `data.cache` asks for.

    Raises:
        UserError: No complete cache contains its frames; the message names the command that creates one.
    """
    assert dataset.cache
    caches = caches_of(source.metadata, dataset, policy, dataset.cache)
    cache, reasons = find_cache(caches, [source])
    if cache is None:
        others = caches.other_kinds()
        if not reasons:
            reasons = [f"there is no cache of {source.metadata.name} in {caches.above}"]
            reasons += [f"it has caches as {', '.join(others)} (data.cache, data.cache_quality)"] if others else []
        options = f"--format {dataset.cache}" + f" --quality {caches.quality}" * (dataset.cache == "jpeg")
        options += f" --output {dataset.cache_dir}" if dataset.cache_dir else ""
        raise UserError(
            f'data.cache = "{dataset.cache}", but {"; ".join(reasons)}: run `rlinf cache` with '
            f"this config and {options}, or remove data.cache"
        )
    columns = {}
    for column in source.images:
        manifest = read_manifest(cache.manifest(column))
        assert manifest is not None
        columns[column] = CachedColumn(cache, manifest, cache.positions)
    return CachedSource(source, columns, dataset.cache)
