"""Videos as GIFs, for trackers that show no other moving images."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import av
from PIL import Image

MOST_FRAMES = 100
"""Frames of a GIF; longer videos are thinned out."""
WIDEST = 320
"""Columns of a GIF in pixels."""


def as_gif(path: Path) -> tuple[bytes, int, int]:
    """A video as a GIF of the same duration, without sound.

    Args:
        path: The video.

    Returns:
        The GIF, its height and its width.

    Raises:
        ValueError: It is not a video, or has no frame.
    """
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            rate = Fraction(stream.average_rate or 10)
            every = max(1, -(-(stream.frames or 0) // MOST_FRAMES))
            frames: list[Image.Image] = []
            for number, frame in enumerate(container.decode(stream)):
                if number % every == 0 and len(frames) < MOST_FRAMES:
                    frames.append(_small(Image.fromarray(frame.to_ndarray(format="rgb24"))))
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(f"it is not a video that can be decoded: {error}") from error
    if not frames:
        raise ValueError("the video has no frame")
    out = io.BytesIO()
    milliseconds = max(20, round(1000 * every / rate))
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
    return out.getvalue(), frames[0].height, frames[0].width


def _small(image: Image.Image) -> Image.Image:
    if image.width <= WIDEST:
        return image
    return image.resize((WIDEST, max(1, round(image.height * WIDEST / image.width))))
