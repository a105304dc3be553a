"""Images as data have them: found by name or by bytes, measured, decoded. Imports no torch.

Files are read only inside the dataset's folder (`data.image_folder`), and nothing is fetched from addresses. Decoding
is bounded: an image that claims more than `MOST_PIXELS` is refused before its pixels are unpacked.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from rlinf_core import UserError
from rlinf_core.untrusted.text import check_file

MOST_PIXELS = 100_000_000
"""The largest image that is decoded."""
MOST_BYTES = 1 << 28
"""The largest image file that is read."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""Pillow reads forty more, one of which starts a program."""
TURNED = frozenset({5, 6, 7, 8})
"""Orientations in EXIF that swap height and width."""
SHOWN = 80
"""Characters of a name that a message shows."""
HELD = ("image", "image_url", "path", "url", "base64", "bytes", "file_name")
"""Keys of an object that may hold an image."""


@dataclass(frozen=True)
class Reference:
    """An image: a file, or the bytes of one."""

    path: Path | None
    data: bytes = b""

    def read(self) -> bytes:
        """The bytes of the file. Raises `UserError` if it cannot be read."""
        if self.path is None:
            return self.data
        try:
            check_file(self.path)
            if (size := self.path.stat().st_size) > MOST_BYTES:
                raise UserError(f"{self} has {size:,} bytes; at most {MOST_BYTES:,} are read")
            return self.path.read_bytes()
        except OSError as error:
            raise UserError(f"{self} cannot be read: {error.strerror or error}") from error

    def __str__(self) -> str:
        return f"the image {self.path}" if self.path is not None else "an image in the data"


@dataclass(frozen=True)
class ImageFolders:
    """Where the files of a dataset's images may be.

    Args:
        folders: Searched in this order; empty: there are none, as for a dataset on the hub.
        given: Whether `data.image_folder` names them.
    """

    folders: Sequence[Path]
    given: bool = False

    def find(self, value: Any, name: str) -> Reference:
        """The image that a value of the data stands for.

        Args:
            value: A file name, a `file:` or `data:` URL, bytes, a `PIL` image, or an object with one of them.
            name: What holds it, for messages.

        Raises:
            UserError: It is something else, an address on the network, or a file that is missing or elsewhere.
        """
        if isinstance(value, bytes | bytearray | memoryview):
            return Reference(None, bytes(value))
        if isinstance(value, Image.Image):  # From `datasets`, which has decoded it.
            out = io.BytesIO()
            value.save(out, "PNG")
            return Reference(None, out.getvalue())
        if isinstance(value, Mapping):
            return self._in_object(value, name)
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{name} must be a file name, a data: URL or bytes, not {type(value).__name__}")
        scheme = value.partition(":")[0].lower()
        if scheme == "data":
            return Reference(None, _from_data_url(value, name))
        if scheme in ("http", "https", "s3", "gs", "ftp"):
            raise UserError(
                f"{name} is an address ({value[:SHOWN]}): nothing is fetched while training. Download the images, and "
                "put their file names into the data"
            )
        return Reference(self._file(_local(value, name) if scheme == "file" else value, name))

    def _in_object(self, value: Mapping[str, Any], name: str) -> Reference:
        """The image of a content part, an `image_url`, or a struct with `bytes` and `path`."""
        held = {key: value[key] for key in HELD if value.get(key) is not None}
        if (data := held.get("bytes")) is not None:  # `path` beside bytes is where they came from.
            return self.find(data, name)
        if "base64" in held:
            return Reference(None, _decoded(str(held["base64"]), name))
        if not held:
            raise UserError(f"{name} has no image: one of {', '.join(HELD)} must hold it")
        return self.find(next(iter(held.values())), name)

    def _file(self, text: str, name: str) -> Path:
        given = Path(os.path.normpath(text.replace("\\", "/")))
        way_out = "set data.image_folder to a folder that contains it" if not self.given else "see data.image_folder"
        if not self.folders:
            raise UserError(f"{name} is the file {text[:SHOWN]!r}, but the dataset is not a folder: {way_out}")
        if "\0" in text or ".." in PurePosixPath(given.as_posix()).parts:
            raise UserError(f"{name}: {text[:SHOWN]!r} is outside of {self.folders[0]}: {way_out}")
        if given.is_absolute():
            if not any(given.is_relative_to(folder) for folder in self.folders):
                raise UserError(f"{name}: {text[:SHOWN]!r} is outside of {self.folders[0]}: {way_out}")
            paths = [given]
        else:
            paths = [folder / given for folder in self.folders]
        found = next((path for path in paths if path.is_file()), None)
        if found is None:
            where = " or ".join(dict.fromkeys(str(path) for path in paths))
            raise UserError(f"{name}: there is no image {where}" + ("" if given.is_absolute() else f"; {way_out}"))
        return found


def size_of(data: bytes, what: object) -> tuple[int, int]:
    """Height and width of an image, upright, from its header. Raises `UserError` if it is no image, or too large."""
    with _opened(data, what) as image:
        width, height = image.size
        return (width, height) if image.getexif().get(ExifTags.Base.Orientation) in TURNED else (height, width)


def pixels_of(data: bytes, what: object) -> NDArray[np.uint8]:
    """Decode an image as transformers does: upright, converted to RGB. Transparency is dropped.

    Returns:
        uint8 [height, width, 3].

    Raises:
        UserError: It is damaged, too large, or has more than 8 bits per channel.
    """
    with _opened(data, what) as image:
        if image.mode[0] in "IF":  # The conversion would clip them at 255: all white.
            raise UserError(f"{what} has one channel of 16 or more bits, such as a depth map: convert it to 8 bits")
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))


@contextmanager
def _opened(data: bytes, what: object) -> Iterator[Image.Image]:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if (pixels := image.size[0] * image.size[1]) > MOST_PIXELS or not pixels:
                raise UserError(
                    f"{what} claims {image.size[0]} x {image.size[1]} pixels; at most {MOST_PIXELS:,} are read: make "
                    "it smaller, or remove the row"
                )
            yield image
    except UserError:
        raise
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit, which is higher.
        raise UserError(f"{what} claims too many pixels: {error}; make it smaller, or remove the row") from error
    except Exception as error:  # Pillow raises different errors for each format.
        why = f"it is not one of {', '.join(FORMATS)}" if "cannot identify" in str(error) else error
        raise UserError(f"{what} is damaged: {why}. Replace it, or remove the row") from error


def _local(url: str, name: str) -> str:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise UserError(f"{name}: {url[:SHOWN]!r} is a file of another machine")
    return unquote(parts.path)


def _from_data_url(url: str, name: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise UserError(f"{name} is a data: URL without base64: data:image/png;base64,... is read")
    return _decoded(body, name)


def _decoded(text: str, name: str) -> bytes:
    if len(text) > MOST_BYTES * 4 // 3:
        raise UserError(f"{name} is an image of more than {MOST_BYTES:,} bytes")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{name} is not valid base64: {error}") from error
