"""Small videos as recorders write them: any codec, pixel format, colour tags, frame times and orientation."""

from fractions import Fraction

import av
import numpy as np
import pytest

BITS = 16


def numbered(number, height=64, width=64):
    """An image of 4 x 4 black or white tiles, the bits of a number."""
    tiles = np.where((number >> np.arange(BITS).reshape(4, 4)) & 1, 225, 25).astype(np.uint8)
    image = np.repeat(np.repeat(tiles, height // 4, 0), width // 4, 1)
    return np.repeat(image[..., None], 3, -1)


def number_in(image):
    """The number in an image of any size."""
    h, w = image.shape[0] // 4, image.shape[1] // 4
    tiles = image[: 4 * h, : 4 * w].reshape(4, h, 4, w, 3).mean((1, 3, 4)) > 125
    return int((tiles.reshape(-1) << np.arange(BITS)).sum())


def write_video(
    path,
    frames,
    *,
    size=(64, 64),
    rate=10,
    codec="libx264",
    pixel_format="yuv420p",
    options=None,
    ticks=None,
    matrix=None,
    tags=None,
    container=None,
    muxing=None,
):
    """Write a video; skips the test if this FFmpeg lacks the encoder.

    Args:
        path: The file.
        frames: How many numbered images, or images [height, width, 3], or one (y, u, v) per frame.
        size: Height and width.
        rate: Frames per second.
        codec: An FFmpeg encoder.
        pixel_format: Of the encoder.
        options: Of the encoder.
        ticks: Time of each frame in milliseconds; None: by the rate.
        matrix: (a, b, c, d) of the track's display matrix.
        tags: `colorspace` and `color_range` of the stream.
        container: FFmpeg's name; None: by the file's ending.
        muxing: Options of the container.
    """
    try:
        av.Codec(codec, "w")
    except av.FFmpegError:
        pytest.skip(f"this FFmpeg has no encoder {codec}")
    images = [numbered(i, *size) for i in range(frames)] if isinstance(frames, int) else frames
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format=container, options=muxing or {}) as file:
        stream = file.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *size, pixel_format
        base = Fraction(1, 1000) if ticks else Fraction(1, rate)
        stream.codec_context.time_base = base
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        for i, image in enumerate(images):
            frame = solid(image, size, pixel_format) if isinstance(image, tuple) else as_frame(image)
            for name, value in (tags or {}).items():
                setattr(frame, name, value)
            frame.pts, frame.time_base = ticks[i] if ticks else i, base
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    if matrix:
        turn(path, matrix)
    return path


def as_frame(image):
    """An image as the encoder takes it."""
    return av.VideoFrame.from_ndarray(image, format="rgb24") if image.dtype == np.uint8 else deep_frame(image)


def deep_frame(image):
    """uint16 [height, width] as a 12-bit grey frame."""
    frame = av.VideoFrame(image.shape[1], image.shape[0], "gray12le")
    plane = np.zeros((image.shape[0], frame.planes[0].line_size // 2), "<u2")
    plane[:, : image.shape[1]] = image
    frame.planes[0].update(plane.tobytes())
    return frame


def solid(yuv, size, pixel_format):
    """A frame of one colour, its components of 8 bits scaled to those of the format."""
    frame = av.VideoFrame(size[1], size[0], pixel_format)
    bits = frame.format.components[0].bits
    for plane, value in zip(frame.planes, yuv, strict=True):
        one = bytes([value]) if bits == 8 else (value << (bits - 8)).to_bytes(2, "little")
        plane.update(one * (plane.buffer_size // len(one)))
    return frame


def turn(path, matrix):
    """Write a display matrix into the track header of an MP4 file, as phones do."""
    data, fixed = bytearray(path.read_bytes()), 1 << 16
    at = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (round(value * fixed) for value in matrix)
    for i, value in enumerate((a, b, 0, c, d, 0, 0, 0, 1 << 30)):
        data[at + 4 * i : at + 4 * i + 4] = value.to_bytes(4, "big", signed=True)
    path.write_bytes(data)
