"""Collects the images of a dataset while its texts are tokenized, and writes what `vision.store` reads.

Only headers are read here: the size of an image decides how many tokens it has. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlinf_core import UserError
from rlinf_core.hub import local_path
from rlinf_plugins_text.rows.dataset import TextDatasetConfig
from rlinf_plugins_text.rows.expansion import Expander, Size
from rlinf_plugins_text.rows.files import all_files
from rlinf_plugins_text.rows.formats import Example
from rlinf_plugins_text.rows.row_images import RowImages
from rlinf_plugins_text.rows.tokenizer import TextTokenizer
from rlinf_plugins_text.rows.tokens import Tokens
from rlinf_plugins_text.vision.images import ImageFolders, Reference, size_of
from rlinf_plugins_text.vision.processor import Vision
from rlinf_plugins_text.vision.store import BYTES, FILES, NAMES, USES


class SeenImages:
    """The images so far.

    Args:
        config: The `[data]` table.
        vision: The model's.
        folder: Where the files are written.
    """

    def __init__(self, config: TextDatasetConfig, vision: Vision, folder: Path) -> None:
        self._config, self._vision, self._folder = config, vision, folder
        self._folders = image_folders(config)
        self._expander = Expander(vision)
        self._numbers: dict[Any, int] = {}
        self._files: list[tuple[int, int, int, int]] = []
        self._names: list[str] = []
        self._uses: list[tuple[int, int, int]] = []
        self._bytes = (folder / BYTES).open("wb")

    @property
    def count(self) -> int:
        """Number of different images."""
        return len(self._files)

    def of_row(self, row: Mapping[str, Any]) -> RowImages:
        """The images of a row, which its text uses up."""
        return RowImages.of(row, self._config, self._folders)

    def prefix(self, tokenizer: TextTokenizer) -> str | None:
        """What begins the prompt of a prefix model; None for other models."""
        if self._vision.family.attention != "prefix":
            return None
        return tokenizer.special_tokens.get("bos_token", "")

    def add(self, example: Example) -> None:
        """Note the images of a text. Raises `UserError` if one cannot be read."""
        for image in example.images:
            self._number(image)

    def expand(self, places: Sequence[str], examples: Sequence[Example]) -> list[Example]:
        """The texts with what the processor writes for their images.

        Raises:
            UserError: A text has another number of placeholders than images; the message begins with its place.
        """
        sizes = [[self._size(image) for image in example.images] for example in examples]
        self._expander.learn([size for some in sizes for size in some])
        expanded = []
        for place, example, some in zip(places, examples, sizes, strict=True):
            try:
                expanded.append(self._expander.expand(example, some))
            except UserError as error:
                raise UserError(f"{place}: {error}") from error
        return expanded

    def place(self, example: Example, tokens: Tokens, begin: int) -> None:
        """Note which tokens stand for the images of a text that begins at token `begin` of the dataset."""
        for image, (first, last) in zip(example.images, tokens.images, strict=True):
            self._uses.append((self._number(image), begin + first, begin + last))

    def save(self) -> bytes:
        """Write the files; returns what of them a digest of the dataset has to cover."""
        self._bytes.close()
        uses = np.array(self._uses, np.int64).reshape(-1, 3)
        files = np.array(self._files, np.int64).reshape(-1, 4)
        np.save(self._folder / f"{USES}.npy", uses)
        np.save(self._folder / f"{FILES}.npy", files)
        (self._folder / f"{NAMES}.json").write_text(json.dumps(self._names), encoding="utf-8")
        digests = hashlib.blake2b(digest_size=16)
        for key in self._numbers:
            digests.update(key if isinstance(key, bytes) else b"file")
        return uses.tobytes() + files.tobytes() + digests.digest()

    def _size(self, image: Reference) -> Size:
        height, width, _, _ = self._files[self._number(image)]
        return height, width

    def _number(self, image: Reference) -> int:
        """The number of an image; equal ones have the same."""
        key = str(image.path) if image.path is not None else hashlib.blake2b(image.data, digest_size=16).digest()
        if (number := self._numbers.get(key)) is not None:
            return number
        data = image.read()
        height, width = size_of(data, image)
        place = -1
        if image.path is None:
            place = self._bytes.tell()
            self._bytes.write(data)
        self._files.append((height, width, place, len(data)))
        self._names.append(str(image.path) if image.path is not None else "")
        self._numbers[key] = len(self._files) - 1
        return self._numbers[key]


def image_folders(config: TextDatasetConfig) -> ImageFolders:
    """Where the images of a dataset may be: `data.image_folder`, or the folders of its files."""
    if config.image_folder:
        folder = Path(config.image_folder).expanduser().absolute()
        if not folder.is_dir():
            raise UserError(f"data.image_folder: there is no folder {folder}")
        return ImageFolders((folder,), given=True)
    path = local_path(config.repo_id, "data.repo_id")
    if path is None:
        return ImageFolders(())
    own = path if path.is_dir() else path.parent
    return ImageFolders(tuple(dict.fromkeys(one.absolute() for one in (own, *(f.parent for f in all_files(config))))))
