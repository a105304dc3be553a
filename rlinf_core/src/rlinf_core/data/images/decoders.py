"""Video decoders: torchcodec and PyAV behind one interface, `Decoder`. Each decodes in one thread.

torchcodec needs shared FFmpeg libraries, which most systems lack. PyAV's wheel contains them under names with a hash;
`lend_ffmpeg`, at the end of this file, makes them available to torchcodec under their plain names.
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
import platform
import re
import struct
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from numpy.typing import NDArray

from rlinf_core.data.images.video_header import (
    MOST_PIXELS,
    FrameTimes,
    Turn,
    VideoHeader,
    local_address,
    open_video,
    read_frame_times,
    video_stream,
)
from rlinf_core.errors import UserError

Frame = NDArray[np.uint8]
"""[height, width, 3], RGB."""
ROUNDING = 1e-4
"""Seconds by which a requested time may differ from the time of its frame through rounding: float32 rounds 500 seconds
by up to 3e-5. Frames are further apart: 2e-4 s would be 5000 frames per second."""
_UNTAGGED, _BT601 = 2, (5, 6)  # Numbers of colour matrices, see `VideoHeader.color_matrix`.


class Decoder(Protocol):
    """An open video file."""

    memory: int
    """Estimated memory while it is open, in bytes."""

    def frames(self, times: Sequence[float], tolerance: float) -> list[Frame]:
        """The nearest frame to each time, as upright uint8 [height, width, 3] RGB.

        Args:
            times: Ascending, in seconds of the file's own clock. The result does not depend on which are requested
                together or were before.
            tolerance: Largest distance in seconds.

        Raises:
            UserError: The nearest frame is further away than `tolerance`; the message says where it is.
        """
        ...

    def close(self) -> None:
        """Close the file."""
        ...


def decoder_memory(height: int, width: int, frames: int) -> int:
    """Estimated memory of an open decoder in bytes: 2 MB, reference frames, and the file's index.

    Measured with H.264, whose decoder needs most: 2.4 MB at 256 x 256, 3.7 at 480 x 640, 6.5 at 720 x 1280.
    """
    return 2_000_000 + 6 * height * width + 32 * frames


class PyavDecoder:
    """Seeks to the key frame at or before a time and decodes forward from there."""

    def __init__(self, path: Path, header: VideoHeader) -> None:
        self._path, self._header = path, header
        self._container = open_video(path)
        self._stream = video_stream(self._container)
        self._stream.codec_context.thread_count = 1
        self.memory = decoder_memory(header.height, header.width, header.frames)
        self._second = float(header.time_base)
        self._decoded: Iterator[Any] = iter(())
        self._before: Any = None
        self._after: Any = None
        """Two consecutive frames, the last that were decoded; None before the first and after the last one."""
        self._reach = 0.0
        """Longest distance in seconds from a key frame to a time so far; up to it, decode on instead of seeking."""
        self._colors: tuple[Any, ...] = ()
        self._converter = VideoReformatter()

    def frames(self, times: Sequence[float], tolerance: float) -> list[Frame]:
        """See `Decoder.frames`."""
        found: list[Frame] = []
        last: Any = None
        for time in times:
            try:
                frame = self._nearest(time, tolerance)
            except av.FFmpegError as e:
                self._before = self._after = None
                raise no_frame(self._path, time, tolerance, f"decoding fails: {e}") from e
            if frame is None:
                raise no_frame(self._path, time, tolerance, "it has none")
            if abs(self._time(frame) - time) > tolerance + ROUNDING:
                raise no_frame(self._path, time, tolerance, _nearest_at(self._time(frame), time))
            found.append(found[-1] if frame is last else self._rgb(frame))
            last = frame
        return found

    def _nearest(self, time: float, tolerance: float) -> Any:
        """The frame nearest to a time, whichever frames were decoded before; None if the file has no frame."""
        exact = max(self._second / 2, ROUNDING)
        key = None
        if not self._covers(time, exact, tolerance):
            self._seek(time, exact)
            key = self._after
        while self._after is not None and self._time(self._after) < time - exact:
            self._advance()
        pair = [frame for frame in (self._before, self._after) if frame is not None]
        nearest = min(pair, key=lambda frame: abs(self._time(frame) - time), default=None)
        if key is not None:
            self._reach = max(self._reach, self._time(nearest) - self._time(key))
        return nearest

    def _covers(self, time: float, exact: float, tolerance: float) -> bool:
        """Whether the nearest frame is one of the last two, or comes soon after them."""
        if self._before is None and self._after is None:
            return False
        first = self._time(self._after) - exact if self._before is None else self._time(self._before)
        if self._after is None:
            return time >= first
        return first <= time <= self._time(self._after) + max(self._reach, 3 * tolerance)

    def _seek(self, time: float, exact: float) -> None:
        """Decode the key frame at or before a time, or the file's first frame.

        With B-frames, FFmpeg may take a key frame that is shown after the time but stored before it; then seek earlier.
        """
        earliest, back = self._header.start, 0.0
        while True:
            target = max(time - back, earliest)
            self._container.seek(math.floor(target / self._second + 0.5), stream=self._stream, backward=True)
            self._decoded = iter(self._container.decode(self._stream))
            self._after = None
            self._advance()
            self._before = None
            if self._after is None or self._time(self._after) <= time + exact or target <= earliest:
                break
            back = max(2 * back, 1.0)

    def _advance(self) -> None:
        self._before, self._after = self._after, next((one for one in self._decoded if one.pts is not None), None)

    def _time(self, frame: Any) -> float:
        return float(frame.pts * self._second)

    def _rgb(self, frame: Any) -> Frame:
        """The upright image, by the colour matrix and range of the frame; untagged frames are BT.601, limited range."""
        name, matrix, full = frame.format.name, int(frame.colorspace), int(frame.color_range) == ColorRange.JPEG
        if self._colors != (name, matrix, full):
            self._colors, self._converter = (name, matrix, full), VideoReformatter()
        # Bicubic, as torchcodec, which upsamples the chroma of video with more than 8 bits; 8 bits have their own code.
        options = _yuv_options(name, matrix, full) | {"interpolation": Interpolation.BICUBIC}
        converted = self._converter.reformat(frame, format="rgb24", **options)
        image: Any = converted.to_ndarray()
        turn = self._header.turn
        upright: Frame = image if turn == Turn() else turn.apply(image)
        return upright

    def close(self) -> None:
        """Close the file."""
        self._before = self._after = None
        self._container.close()


@functools.cache
def _yuv_options(pixel_format: str, matrix: int, full: bool) -> dict[str, Any]:
    """Options that make PyAV convert by the tags of a frame; without any, it converts by BT.601.

    PyAV passes the colours on to FFmpeg only if those of source and target differ; those of an RGB target have no
    effect.
    """
    about = av.VideoFormat(pixel_format)
    is_yuv = not about.is_rgb and not about.has_palette and len(about.components) >= 3
    full = full or pixel_format.startswith("yuvj")
    if not is_yuv or (matrix in (*_BT601, _UNTAGGED) and not full):
        return {}
    source = Colorspace.ITU601 if matrix == _UNTAGGED else matrix
    target = Colorspace.ITU709 if source == Colorspace.ITU601 else Colorspace.ITU601
    ranges = {"src_color_range": ColorRange.JPEG if full else ColorRange.MPEG, "dst_color_range": ColorRange.MPEG}
    return {"src_colorspace": source, "dst_colorspace": target, **ranges}


class TorchcodecDecoder:
    """Requests frames by index; torchcodec seeks by itself.

    At first the index follows from the rate, as if it were constant, which needs no more than the header. The result
    says the time of each frame. If one of them is not the requested time, the exact times of all frames are read, and
    indices follow from them from then on.
    """

    def __init__(self, path: Path, header: VideoHeader) -> None:
        self._path, self._header = path, header
        self._times: FrameTimes | None = None
        self._pyav: PyavDecoder | None = None
        self._video = self._open(seek_mode="approximate")
        about = self._video.metadata
        if not 0 < (about.width or 0) * (about.height or 0) <= MOST_PIXELS:
            raise UserError(
                f"{path} cannot be opened as a video: its frames have {about.width} x {about.height} pixels"
            )
        self.memory = decoder_memory(header.height, header.width, header.frames)
        if not header.frames or not about.average_fps:
            self._read_times()

    def _open(self, **options: Any) -> Any:
        from torchcodec.decoders import VideoDecoder  # type: ignore[import-untyped,import-not-found,unused-ignore]

        options |= {"dimension_order": "NHWC", "num_ffmpeg_threads": 1, "stream_index": self._header.stream}
        try:
            return VideoDecoder(local_address(self._path), **options)
        except (OSError, RuntimeError, ValueError) as e:
            raise UserError(f"{self._path} cannot be opened as a video: {_first_line(e)}") from e

    def frames(self, times: Sequence[float], tolerance: float) -> list[Frame]:
        """See `Decoder.frames`."""
        found = self._by_rate(times) if self._times is None else None
        return self._by_times(times, tolerance) if found is None else found

    def _by_rate(self, times: Sequence[float]) -> list[Frame] | None:
        """The frames, if each is at the requested time; None otherwise."""
        rate, last = self._video.metadata.average_fps, self._header.frames - 1
        indices = [min(max(round((time - self._header.start) * rate), 0), last) for time in times]
        try:
            found = self._video.get_frames_at(indices=indices)
        except (RuntimeError, IndexError, ValueError):
            return None  # If it is not for the indices, it fails again.
        exact = max(float(self._header.time_base) / 2, ROUNDING)
        same = all(abs(time - at) <= exact for time, at in zip(times, found.pts_seconds.tolist(), strict=True))
        return list(found.data.numpy()) if same else None

    def _by_times(self, times: Sequence[float], tolerance: float) -> list[Frame]:
        """The nearest frames, by the exact times of all frames."""
        known = self._times or self._read_times()
        indices = known.nearest(times)
        expected = known.seconds[indices]
        for time, at in zip(times, expected.tolist(), strict=True):
            if abs(time - at) > tolerance + ROUNDING:
                raise no_frame(self._path, time, tolerance, _nearest_at(at, time))
        try:
            found = self._video.get_frames_at(indices=indices.tolist())
        except (RuntimeError, IndexError, ValueError) as e:
            raise no_frame(self._path, times[0], tolerance, f"decoding fails: {_first_line(e)}") from e
        if np.abs(found.pts_seconds.numpy() - expected).max() > ROUNDING:
            return self._by_pyav(times, tolerance)
        return list(found.data.numpy())

    def _by_pyav(self, times: Sequence[float], tolerance: float) -> list[Frame]:
        """Frames that torchcodec cannot seek to: those shown before an H.265 key frame but stored after it (x265 writes
        some per key frame, "open GOP") when it starts decoding at that key frame. It returns a later frame instead.
        """
        if self._pyav is None:
            self._pyav = PyavDecoder(self._path, self._header)
            self.memory += self._pyav.memory
        return self._pyav.frames(times, tolerance)

    def _read_times(self) -> FrameTimes:
        known = read_frame_times(self._path)
        ticks, keys = known.ticks.tolist(), known.is_key.tolist()
        lengths = [*np.diff(known.ticks).tolist(), 1]
        frames = [
            {"pts": tick, "duration": length, "key_frame": int(key)}
            for tick, length, key in zip(ticks, lengths, keys, strict=True)
        ]
        self._video = self._open(custom_frame_mappings=json.dumps({"frames": frames}))
        self.memory += 100 * len(frames)
        self._times = known
        return known

    def close(self) -> None:
        """Release the file; torchcodec closes it with its last reference."""
        del self._video
        if self._pyav is not None:
            self._pyav.close()


def _first_line(error: Exception) -> str:
    """Torchcodec's message without its request to report a bug."""
    return str(error).strip().partition("\n")[0].strip()


def _nearest_at(at: float, time: float) -> str:
    return f"the nearest is at {at:.4f} s, {abs(at - time):.4f} s away"


def no_frame(path: Path, time: float, tolerance: float, nearest: str) -> UserError:
    """The error for a time without a frame; `nearest` says what there is instead."""
    return UserError(
        f"{path} has no frame within {tolerance:.4f} s of {time:.4f} s ({nearest}): the dataset's timestamps do not "
        "match its video, or the file is damaged; download, record or convert that episode again"
    )


MACHINES = {"x86_64": 62, "aarch64": 183}
"""`platform.machine()` -> machine number in an ELF header."""
_BUNDLED = re.compile(r"(lib(?:av|sw|postproc)\w*)-[0-9a-f]{8}\.so\.(\d+)[.\d]*")
"""File name of a library in PyAV's wheel: its name, and the major version at the end of its plain name."""


@functools.cache
def lend_ffmpeg() -> tuple[str, ...]:
    """Load PyAV's FFmpeg libraries in this process under their plain names, once.

    Returns:
        These names; empty if PyAV has no bundled libraries.

    Raises:
        OSError: A library could not be loaded.
    """
    folder = Path(av.__file__).parents[1] / "av.libs"
    machine = MACHINES.get(platform.machine())
    if sys.platform != "linux" or machine is None or not folder.is_dir():
        return ()
    found = {f"{match[1]}.so.{match[2]}": path for path in folder.iterdir() if (match := _BUNDLED.fullmatch(path.name))}
    with tempfile.TemporaryDirectory(prefix="rlinf_ffmpeg_") as aliases:
        for name, path in sorted(found.items()):
            alias = Path(aliases) / name
            alias.write_bytes(alias_library(name, path.name, machine))
            ctypes.CDLL(str(alias))  # Stays loaded; its file is not needed any more.
    return tuple(sorted(found))


def alias_library(name: str, needed: str, machine: int) -> bytes:
    """An ELF shared library without code whose `SONAME` is `name` and which depends on the library `needed`.

    Layout: file header; three program headers (load the whole file; dynamic section; non-executable stack, as without
    this header an executable one is assumed); dynamic section; symbol table with only the empty first symbol; string
    table. 64 bits, little endian.
    """
    strings = b"\0" + name.encode() + b"\0" + needed.encode() + b"\0"
    dynamic_at = 64 + 3 * 56
    symbols_at = dynamic_at + 7 * 16
    strings_at = symbols_at + 24
    dynamic = {
        14: 1,  # DT_SONAME, offset in the string table
        1: len(name) + 2,  # DT_NEEDED, likewise
        5: strings_at,  # DT_STRTAB
        10: len(strings),  # DT_STRSZ
        6: symbols_at,  # DT_SYMTAB
        11: 24,  # DT_SYMENT, bytes per symbol
        0: 0,  # DT_NULL
    }
    size = strings_at + len(strings)
    shared_object, read_write = 3, 6
    header = b"\x7fELF\2\1\1" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", shared_object, machine, 1, 0, 64, 0, 0, 64, 56, 3, 0, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, read_write, 0, 0, 0, size, size, 0x10000)  # aligned for the largest pages
    section = struct.pack("<IIQQQQQQ", 2, read_write, dynamic_at, dynamic_at, dynamic_at, 7 * 16, 7 * 16, 8)
    stack = struct.pack("<IIQQQQQQ", 0x6474E551, read_write, 0, 0, 0, 0, 0, 16)
    entries = b"".join(struct.pack("<qQ", tag, value) for tag, value in dynamic.items())
    return header + load + section + stack + entries + bytes(24) + strings
