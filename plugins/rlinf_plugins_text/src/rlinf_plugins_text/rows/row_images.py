"""The images of a row: those of content parts, and those of its column `images` in the order in which texts use them.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlinf_core import UserError
from rlinf_plugins_text.rows.dataset import TextDatasetConfig
from rlinf_plugins_text.rows.shapes import IMAGE, decoded, transposed, without_nulls
from rlinf_plugins_text.vision.images import ImageFolders, Reference

PLACEHOLDER = "<image>"
"""What a text has in place of the next image of the column, as LLaMA-Factory, ms-swift and LLaVA have it."""
BESIDE_IMAGES = ("type", "detail", "text", "min_pixels", "max_pixels")
"""Keys of content parts that do not hold the image itself."""
COLUMN, OTHER_COLUMN = "images", "image"
"""The column, and its name in many datasets with one image per row."""


def images_column(row: Mapping[str, Any], config: TextDatasetConfig) -> str:
    """The column with a row's images."""
    column = config.column(COLUMN)
    return OTHER_COLUMN if column == COLUMN and row.get(column) is None and OTHER_COLUMN in row else column


@dataclass
class RowImages:
    """Collects the images of a row, in the order in which they are in its text."""

    folders: ImageFolders
    column: str
    given: list[Any]
    """The values of the column that no text has used yet."""
    found: list[Reference] = field(default_factory=list)

    @classmethod
    def of(cls, row: Mapping[str, Any], config: TextDatasetConfig, folders: ImageFolders) -> RowImages:
        """The images of a row. Raises `UserError` if its column holds something else than images."""
        column = images_column(row, config)
        value = row.get(column)
        if isinstance(value, str) and value.lstrip()[:1] == "[":
            value = decoded(value, repr(column))
        value = transposed(without_nulls(value))
        if value is None or (isinstance(value, str | bytes | list) and not value):
            return cls(folders, column, [])
        return cls(folders, column, list(value) if isinstance(value, list | tuple) else [value])

    def of_part(self, part: Mapping[str, Any], name: str) -> str:
        """What stands for the image of a content part, which may be the column's next one."""
        held = {key: value for key, value in part.items() if key not in BESIDE_IMAGES and value is not None}
        if not held:
            return self._next(name)
        self.found.append(self.folders.find(held, name))
        return IMAGE

    def placed(self, text: str, name: str) -> str:
        """A text in which `IMAGE` stands for each placeholder, if the row has a column with images."""
        if IMAGE in text:
            raise UserError(f"{name} contains U+{ord(IMAGE):04X}, a private-use character that stands for images here")
        if not (self.given or self.found) or PLACEHOLDER not in text:
            return text
        first, *rest = text.split(PLACEHOLDER)
        return first + "".join(self._next(name) + piece for piece in rest)

    def before(self) -> str:
        """What stands for all images of the column if no text has a place for them: they come first.

        Raises:
            UserError: Some have a place, others have none.
        """
        if not self.given:
            return ""
        if self.found:
            raise UserError(
                f"{self.column!r} has {len(self.found) + len(self.given)} images, but the text has a place for only "
                f"{len(self.found)}: write {PLACEHOLDER} where each image is"
            )
        return "".join(self._next(repr(self.column)) for _ in range(len(self.given)))

    def _next(self, name: str) -> str:
        if not self.given:
            raise UserError(
                f"{name}: there is no image for it: the column {self.column!r} has {len(self.found) or 'no'} images"
            )
        value = self.given.pop(0)
        self.found.append(self.folders.find(value, f"image {len(self.found)} of {self.column!r}"))
        return IMAGE
