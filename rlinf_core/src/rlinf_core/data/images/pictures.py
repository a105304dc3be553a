"""Decode image files to upright uint8 RGB.

Decoding a PNG means inflating it and then undoing the filter of each line. FFmpeg does the latter much faster than
Pillow, so that plain PNGs, which robot recordings contain, take two thirds of the time. Other images, and those that
FFmpeg rejects, are decoded by Pillow, which decides whether an image is damaged. Images are turned as their EXIF data
say, as lerobot does: phones store images as the sensor sees them.
"""

from __future__ import annotations

import io
import threading
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from rlinf_core.data.images.video_header import MOST_PIXELS
from rlinf_core.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
"""Pillow supports forty more, one of which starts a program; cameras record none of them."""
TILE_WIDTH, TILE_HEIGHT = 322, 323
"""Tags of TIFF."""
TURNING_TEXTS = (b"Raw profile type ", b"XML:com.adobe.xmp")
PLAIN_PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"


def decode(data: Any, what: str, *, any_format: bool = False) -> NDArray[np.uint8]:
    """Decode the bytes of an image file.

    Args:
        data: The bytes; None if there are none.
        what: Start of error messages.
        any_format: Also accept depth maps and transparency; only the size of the result is then correct.

    Returns:
        uint8 [height, width, 3] RGB, upright.

    Raises:
        UserError: There are no bytes, or they are not an image, or it has one channel of 16 bits, or is transparent
            somewhere.
    """
    if data is None:
        raise UserError(
            f"{what} contains no image, and the dataset has no file that it names: write the dataset with embedded "
            "images"
        )
    if (size := plain_png(data)) is not None and 0 < size[0] * size[1] <= MOST_PIXELS:
        decoded = _decode_png(data, size)
        if decoded is not None:
            return decoded
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            for width, height in (image.size, _tile(image)):
                if width * height > MOST_PIXELS:
                    raise UserError(
                        f"{what} claims an image of {width} x {height} pixels; at most {MOST_PIXELS} pixels are read. "
                        "Record, convert or download it again"
                    )
            if not any_format:
                _check_format(image, bytes(data[24:26]), what)
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
            return np.asarray((ImageOps.exif_transpose(image) if turned else image).convert("RGB"))
    except UserError:
        raise
    except Exception as e:  # Pillow raises different errors for each format.
        why = f"it is not {', '.join(FORMATS[:-1])} or {FORMATS[-1]}" if isinstance(e, UnidentifiedImageError) else e
        raise UserError(f"{what} contains a damaged image: {why}. Record, convert or download it again") from e


def _tile(image: Image.Image) -> tuple[int, int]:
    """Width and height of a TIFF's tiles, which are unpacked whole, however small the image is; 0 for other images."""
    tags = getattr(image, "tag_v2", {})
    return int(tags.get(TILE_WIDTH, 0)), int(tags.get(TILE_HEIGHT, 0))


def _check_format(image: Image.Image, png: bytes, what: str) -> None:
    """Raise `UserError` if the conversion to RGB would lose what the image is about.

    Args:
        image: The image.
        png: Bits per channel and colour type, if it is a PNG.
        what: Start of error messages.
    """
    grey_types = (0, 4)  # Without and with alpha; Pillow cuts the latter to 8 bits.
    deep_png = image.format == "PNG" and png[0] == 16 and png[1] in grey_types
    if image.mode[0] in "IF" or deep_png:  # Pillow would clip them at 255: all white.
        raise UserError(
            f"{what} contains an image with one channel of 16 or more bits, such as a depth map: only images "
            "with 8 bits per channel are read; name another column in data.images"
        )
    has_alpha = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
    if has_alpha and np.asarray(image.convert("RGBA"))[..., 3].min(initial=255) < 255:
        raise UserError(
            f"{what} contains an image that is transparent somewhere (mode {image.mode}), which RGB cannot express: "
            "name another column in data.images, or convert the images to RGB"
        )


def plain_png(data: Any) -> tuple[int, int] | None:
    """Height and width of a non-interlaced RGB PNG with 8 bits per channel that needs no turning; None for all else."""
    head = bytes(data[:29])
    eight_bit_rgb_not_interlaced = b"\x08\x02\0\0\0"
    if head[:16] != PLAIN_PNG or head[24:] != eight_bit_rgb_not_interlaced or _may_be_turned(data):
        return None
    return int.from_bytes(head[20:24], "big"), int.from_bytes(head[16:20], "big")


def _may_be_turned(data: Any) -> bool:
    """Whether a PNG has a chunk in which Pillow looks for an orientation: EXIF, or EXIF or XMP as text."""
    png = memoryview(data)
    at, size = 8, len(png)
    while at + 8 <= size:
        kind = bytes(png[at + 4 : at + 8])
        if kind == b"eXIf":
            return True
        if kind in (b"tEXt", b"zTXt", b"iTXt") and bytes(png[at + 8 : at + 26]).startswith(TURNING_TEXTS):
            return True
        at += 12 + int.from_bytes(png[at : at + 4], "big")
    return False


class _Decoders(threading.local):
    """FFmpeg's PNG decoder, one per thread: creating it takes half as long as decoding an image."""

    def __init__(self) -> None:
        self.png: Any = av.CodecContext.create("png", "r")
        self.png.thread_count = 1
        # Verify checksums as Pillow does, and reject truncated images.
        self.png.options = {"err_detect": "crccheck+bitstream+buffer+explode"}


_decoders = _Decoders()


def _decode_png(data: Any, size: tuple[int, int]) -> NDArray[np.uint8] | None:
    """Decode with FFmpeg; None if it rejects the image."""
    packet = av.Packet(bytes(data))
    packet.is_keyframe = True  # Otherwise FFmpeg takes it for a difference to the previous image.
    try:
        frames = _decoders.png.decode(packet)
    except av.FFmpegError:
        return None
    if len(frames) != 1 or frames[0].format.name != "rgb24" or (frames[0].height, frames[0].width) != size:
        return None
    decoded: NDArray[np.uint8] = frames[0].to_ndarray()
    return decoded
