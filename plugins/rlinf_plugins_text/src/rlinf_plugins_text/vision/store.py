"""The images of a dataset's texts, in the cache beside their tokens. Imports no torch.

Files stay where they are and are read when a sample needs them. Images that the data hold themselves are copied into
one file of the cache, each once, because rows of parquet and JSON files cannot be read one by one.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlinf_core import UserError
from rlinf_core.cache import CacheEntry
from rlinf_plugins_text.vision.images import Reference, pixels_of

USES, FILES, BYTES, NAMES = "image_uses", "image_files", "image_bytes", "image_names"
"""Arrays: for each image of a text its number, first token and end, int64 [uses, 3]; for each image height, width,
place in `image_bytes` or -1, and bytes, int64 [images, 4]. Then the bytes, and a JSON list of the files' names."""


@dataclass(frozen=True)
class ImageStore:
    """The images, by number."""

    entry: CacheEntry

    def uses(self, begin: int, end: int) -> NDArray[np.int64]:
        """The uses that are wholly among the tokens from `begin` to `end`, [uses, 3]: image, first token, end."""
        first = np.searchsorted(self._uses[:, 1], begin)
        last = np.searchsorted(self._uses[:, 2], end, side="right")
        return np.array(self._uses[first : max(first, last)])

    @property
    def spans(self) -> NDArray[np.int64]:
        """First token and end of each use, in order: [uses, 2]."""
        return self._uses[:, 1:]

    def size(self, number: int) -> tuple[int, int]:
        """Height and width."""
        height, width = self._files[number, :2].tolist()
        return height, width

    def pixels(self, number: int) -> NDArray[np.uint8]:
        """Decode an image: uint8 [height, width, 3].

        Raises:
            UserError: It cannot be read, or its file has changed since the texts were tokenized.
        """
        height, width, place, size = self._files[number].tolist()
        if place >= 0:
            with self.entry.file(BYTES).open("rb") as file:
                file.seek(place)
                reference = Reference(None, file.read(size))
        else:
            reference = Reference(Path(self._names[number]))
        data = reference.read()
        pixels = pixels_of(data, reference)
        if len(data) != size or pixels.shape[:2] != (height, width):
            raise UserError(
                f"{reference} has changed since its text was tokenized ({size} bytes, {width} x {height} pixels then; "
                f"{len(data)} bytes, {pixels.shape[1]} x {pixels.shape[0]} now): delete {self.entry.manifest}, and "
                "start a new run"
            )
        return pixels

    def files(self) -> Mapping[str, Path]:
        """The files of images, by name."""
        return {name: Path(name) for name in self._names if name}

    @functools.cached_property
    def _uses(self) -> NDArray[np.int64]:
        return self._array(USES)

    @functools.cached_property
    def _files(self) -> NDArray[np.int64]:
        return self._array(FILES)

    @functools.cached_property
    def _names(self) -> list[str]:
        names: list[str] = json.loads(self.entry.file(f"{NAMES}.json").read_text(encoding="utf-8"))
        return names

    def _array(self, name: str) -> NDArray[np.int64]:
        path = self.entry.file(f"{name}.npy")
        try:
            mapped: NDArray[np.int64] = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise UserError(
                f"{path}, which lists images in the cache, was removed or damaged ({error}): start again"
            ) from error
        return mapped

    def __getstate__(self) -> dict[str, Any]:
        return {"entry": self.entry}  # Each process maps its own.
