"""Video decoders: torchcodec and PyAV behind one interface, `Decoder`. Each decodes in one thread.

torchcodec needs shared FFmpeg libraries, which most systems lack. PyAV's wheel contains them under names with a hash;
`lend_ffmpeg`, at the end of this file, makes them available to torchcodec under their plain names.
"""

from __future__ import annotations

import ctypes
import functools
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
from numpy.typing import NDArray

from rlinf_core.data.images.video_header import MOST_PIXELS, open_video
from rlinf_core.errors import UserError

Frame = NDArray[np.uint8]
"""[height, width, 3], RGB."""


class Decoder(Protocol):
    """An open video file."""

    memory: int
    """Estimated memory while it is open, in bytes."""

    def frames(self, times: Sequence[float], tolerance: float) -> list[Frame]:
        """One uint8 [height, width, 3] RGB frame per time; `times` ascend, in seconds from the file's start.

        Raises:
            UserError: The file has no frame within `tolerance` seconds of a time.
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

    def __init__(self, path: Path) -> None:
        self._path = path
        self._container = open_video(path)
        self._stream = self._container.streams.video[0]
        self._stream.codec_context.thread_count = 1
        self.memory = decoder_memory(self._stream.height, self._stream.width, self._stream.frames)
        self._decoded: Iterator[Any] = iter(())
        self._position = float("inf")
        """Time of the last decoded frame; infinity: seek before decoding."""
        self._reach = 0.0
        """Longest distance in seconds from a key frame to a time so far; up to it, decode on instead of seeking."""

    def frames(self, times: Sequence[float], tolerance: float) -> list[Frame]:
        """See `Decoder.frames`."""
        found: list[Frame] = []
        last: float | None = None
        for time in times:
            if last is None or time - last >= tolerance:
                frame = self._frame_at(time, tolerance)
                last = float(frame.pts * self._stream.time_base)
                found.append(frame.to_ndarray(format="rgb24"))
            else:
                found.append(found[-1])
        return found

    def _frame_at(self, time: float, tolerance: float) -> Any:
        nearest = "it has none"
        try:
            if not tolerance <= time - self._position <= max(self._reach, 3 * tolerance):
                self._seek(time)
            start = None
            for frame in self._decoded:
                if frame.pts is None:
                    continue
                self._position = float(frame.pts * self._stream.time_base)
                start = self._position if start is None else start
                if self._position >= time + tolerance:
                    break
                if self._position > time - tolerance:
                    self._reach = max(self._reach, self._position - start)
                    return frame
                nearest = f"the last one before it is at {self._position:.4f} s"
        except av.FFmpegError as e:
            nearest = f"decoding fails: {e}"
        self._position = float("inf")
        raise _no_frame(self._path, time, tolerance, nearest)

    def _seek(self, time: float) -> None:
        assert self._stream.time_base is not None
        # One tick earlier, because the requested time may exceed the frame's own by a rounding error.
        tick = max(round(time / self._stream.time_base) - 1, 0)
        self._container.seek(tick, stream=self._stream, backward=True)
        self._decoded = iter(self._container.decode(self._stream))

    def close(self) -> None:
        """Close the file."""
        self._container.close()


class TorchcodecDecoder:
    """Requests frames by index; torchcodec seeks by itself."""

    def __init__(self, path: Path) -> None:
        from torchcodec.decoders import VideoDecoder  # type: ignore[import-untyped,import-not-found,unused-ignore]

        self._path = path
        try:
            self._video = VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="approximate")
        except (OSError, RuntimeError, ValueError) as e:
            raise UserError(f"{path} cannot be opened as a video: {_first_line(e)}") from e
        about = self._video.metadata
        if not about.num_frames or not about.average_fps:
            raise UserError(f"{path} cannot be opened as a video: its number of frames or frame rate is unknown")
        if not 0 < (about.width or 0) * (about.height or 0) <= MOST_PIXELS:
            raise UserError(
                f"{path} cannot be opened as a video: its frames have {about.width} x {about.height} pixels"
            )
        self.memory = decoder_memory(about.height or 0, about.width or 0, about.num_frames)

    def frames(self, times: Sequence[float], tolerance: float) -> list[Frame]:
        """See `Decoder.frames`."""
        metadata = self._video.metadata
        last = metadata.num_frames - 1
        indices = [min(max(round(time * metadata.average_fps), 0), last) for time in times]
        try:
            found = self._video.get_frames_at(indices=indices)
        except (RuntimeError, IndexError, ValueError) as e:
            raise _no_frame(self._path, times[0], tolerance, f"decoding fails: {_first_line(e)}") from e
        for time, pts in zip(times, found.pts_seconds.tolist(), strict=True):
            if abs(time - pts) >= tolerance:
                raise _no_frame(self._path, time, tolerance, f"the nearest is at {pts:.4f} s")
        return list(found.data.numpy())

    def close(self) -> None:
        """Release the file; torchcodec closes it with its last reference."""
        del self._video


def _first_line(error: Exception) -> str:
    """Torchcodec's message without its request to report a bug."""
    return str(error).strip().partition("\n")[0].strip()


def _no_frame(path: Path, time: float, tolerance: float, nearest: str) -> UserError:
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
