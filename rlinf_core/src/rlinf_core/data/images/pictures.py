"""Pictures from the bytes of files, as uint8 RGB.

Reading a PNG is undoing its compression and then the filter of each line. FFmpeg does the latter much faster than
Pillow, so that plain PNGs, as robots' recordings are, take two thirds of the time. What is not plain, or not right, is
left to Pillow, which has the last word about what is damaged.
"""

from __future__ import annotations

import io
import threading
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rlinf_core.data.images.decoders import MOST_PIXELS
from rlinf_core.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
"""Pillow knows forty more, one of which starts a program: they are no recordings of a camera."""
PLAIN_PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"


def decode(data: Any, what: str, *, deep: bool = False) -> NDArray[np.uint8]:
    """A picture from the bytes of a PNG or JPEG file.

    Args:
        data: The bytes; None where there are none.
        what: Begins error messages.
        deep: Take a channel of 16 or more bits too, of which only the size comes out right.

    Returns:
        uint8 [height, width, 3] RGB.

    Raises:
        UserError: There are no bytes, or they are no picture, or one of 16 bits a channel.
    """
    if data is None:
        raise UserError(
            f"{what} holds no picture, and the file that it may name is not in the dataset: write the dataset with "
            "embedded images"
        )
    if (size := plain_png(data)) is not None and 0 < size[0] * size[1] <= MOST_PIXELS:
        picture = _decode_png(data, size)
        if picture is not None:
            return picture
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise UserError(
                    f"{what} claims a picture of {image.width} x {image.height} pixels; up to {MOST_PIXELS} in all are "
                    "read. Record, convert or download it again"
                )
            if image.mode[0] in "IF" and not deep:  # Pillow cuts such numbers off at 255: all white.
                raise UserError(
                    f"{what} holds a picture of one channel in 16 or more bits, such as a depth map: only pictures of "
                    "8 bits a channel are read; name another column in data.images"
                )
            return np.asarray(image.convert("RGB"))
    except UserError:
        raise
    except Exception as e:  # Pillow raises whatever its parsers stumble over, by format.
        raise UserError(f"{what} holds a damaged picture: {e}. Record, convert or download it again") from e


def plain_png(data: Any) -> tuple[int, int] | None:
    """Height and width of a PNG of 8 bits a channel in RGB, not interlaced; None of anything else."""
    head = bytes(data[:29])
    if head[:16] != PLAIN_PNG or head[24:] != b"\x08\x02\0\0\0":  # 8 bits, RGB, the only methods there are.
        return None
    return int.from_bytes(head[20:24], "big"), int.from_bytes(head[16:20], "big")


class _Decoders(threading.local):
    """FFmpeg's PNG decoder, one a thread: making it takes as long as half a picture."""

    def __init__(self) -> None:
        self.png: Any = av.CodecContext.create("png", "r")
        self.png.thread_count = 1
        # Checksums are checked as Pillow does, and half a picture is none.
        self.png.options = {"err_detect": "crccheck+bitstream+buffer+explode"}


_decoders = _Decoders()


def _decode_png(data: Any, size: tuple[int, int]) -> NDArray[np.uint8] | None:
    """None if something is wrong with it."""
    packet = av.Packet(bytes(data))
    packet.is_keyframe = True  # Else FFmpeg takes it for changes to the picture before it.
    try:
        frames = _decoders.png.decode(packet)
    except av.FFmpegError:
        return None
    if len(frames) != 1 or frames[0].format.name != "rgb24" or (frames[0].height, frames[0].width) != size:
        return None
    picture: NDArray[np.uint8] = frames[0].to_ndarray()
    return picture
