"""Frames of video files at given times, as uint8 RGB.

Decoding dominates the cost of reading robot data, so decoders stay open between calls (bounded in number and bytes),
requests to one file are served in the order of time, a frame that is asked for twice is decoded once, and only the
frames asked for are converted to RGB. torchcodec decodes where it loads (with the FFmpeg that PyAV brings along it does
on Linux, see `ffmpeg_libraries`), else PyAV. One thread a decoder: loader workers are the parallelism, and in processes
without any, as both decoders release Python's lock while they work, files are decoded by several threads.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

import av
import numpy as np
from numpy.typing import NDArray

from rlinf_core.data.ffmpeg_libraries import lend_ffmpeg
from rlinf_core.errors import UserError

DecoderName = Literal["torchcodec", "pyav"]
Frame = NDArray[np.uint8]
"""[height, width, 3], RGB."""
MOST_PIXELS = 2**26
"""Of a picture: a few bytes can claim any size."""


class Decoder(Protocol):
    """An open video file."""

    memory: int
    """What it takes while it is open, in bytes, about."""

    def frames(self, times: Sequence[float], tolerance: float) -> list[Frame]:
        """One uint8 [height, width, 3] RGB frame for each of the ascending `times`, in seconds from the file's start.

        Raises:
            UserError: The file has no frame within `tolerance` seconds of a time.
        """
        ...

    def close(self) -> None:
        """Close the file."""
        ...


@functools.cache
def decoder_name() -> DecoderName:
    """The decoder this process uses unless told otherwise: torchcodec if it loads, else PyAV."""
    return "pyav" if torchcodec_failure() else "torchcodec"


@functools.cache
def torchcodec_failure() -> str:
    """Why torchcodec does not load in this process; empty if it does."""
    lent = ""
    try:
        lend_ffmpeg()
    except OSError as e:  # torchcodec may still find an FFmpeg of the system's.
        lent = f"PyAV's FFmpeg cannot be lent to it: {e}; "
    try:
        import torchcodec.decoders  # type: ignore[import-untyped,import-not-found,unused-ignore]  # noqa: F401
    except (ImportError, OSError, RuntimeError) as e:  # Not installed, or FFmpeg's shared libraries are not found.
        return lent + str(e).strip().partition("\n")[0]
    return ""


class VideoReader:
    """Reads frames of many files, keeping those most recently used open.

    A process makes its own: decoders cannot be pickled, so a copy in another process starts with none open.
    """

    def __init__(
        self,
        capacity: int = 128,
        decoder: DecoderName | None = None,
        *,
        memory: int = 2**29,
        threads: int | None = None,
    ) -> None:
        """Open nothing yet.

        Args:
            capacity: Most files to keep open; a process may have 1024 of all kinds.
            decoder: Which one; None: the best that loads.
            memory: Most bytes that open decoders may take together, by their own estimate.
            threads: Files to decode at the same time; None: 1 in loader workers, else a few.
        """
        self._capacity, self._memory = capacity, memory
        self._decoder, self._threads = decoder, threads
        self._open: OrderedDict[Path, Decoder] = OrderedDict()
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    @property
    def decoder(self) -> DecoderName:
        """The decoder in use."""
        if self._decoder == "torchcodec" and torchcodec_failure():
            raise UserError(
                f'data.decoder = "torchcodec", but torchcodec does not load: {torchcodec_failure()}. Install FFmpeg '
                '(`apt-get install ffmpeg`), or set data.decoder to "pyav" or "auto"'
            )
        return self._decoder or decoder_name()

    def frames(self, path: Path, times: Sequence[float], tolerance: float) -> list[Frame]:
        """One frame for each time, in the order of `times`.

        Args:
            path: A video file.
            times: Seconds from the start of the file, in any order.
            tolerance: Seconds a frame may lie off its time; half a frame finds the nearest one.

        Raises:
            UserError: The file cannot be read, or holds no frame near a time; it names file and time.
        """
        order = np.argsort(times, kind="stable")
        decoder = self._take(path)
        try:
            found = decoder.frames([times[i] for i in order], tolerance)
        finally:
            self._give_back(path, decoder)
        frames = [found[0]] * len(found)
        for i, frame in zip(order, found, strict=True):
            frames[i] = frame
        return frames

    def frames_of_files(self, wanted: Sequence[tuple[Path, Sequence[float]]], tolerance: float) -> list[list[Frame]]:
        """`frames` of several files, which differ; several at the same time where threads are allowed."""
        threads = self._threads or _threads()
        if threads == 1 or len(wanted) == 1:
            return [self.frames(path, times, tolerance) for path, times in wanted]
        self._pool = self._pool or ThreadPoolExecutor(threads, "rlinf-video")
        return list(self._pool.map(lambda one: self.frames(one[0], one[1], tolerance), wanted))

    def _take(self, path: Path) -> Decoder:
        """The decoder of a file, which is this thread's until it gives it back."""
        with self._lock:
            decoder = self._open.pop(path, None)
        if decoder is None:
            decoder = TorchcodecDecoder(path) if self.decoder == "torchcodec" else PyavDecoder(path)
        return decoder

    def _give_back(self, path: Path, decoder: Decoder) -> None:
        with self._lock:
            self._open[path] = decoder
            while len(self._open) > self._capacity or (
                len(self._open) > 1 and sum(one.memory for one in self._open.values()) > self._memory
            ):
                self._open.popitem(last=False)[1].close()

    def __getstate__(self) -> dict[str, Any]:
        return {"capacity": self._capacity, "decoder": self._decoder, "memory": self._memory, "threads": self._threads}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _threads() -> int:
    """Loader workers, and whatever else a process has started beside itself, get one."""
    return 1 if multiprocessing.parent_process() else min(4, os.cpu_count() or 1)


def decoder_memory(height: int, width: int, frames: int) -> int:
    """Bytes that an open decoder takes, about: 2 MB, reference frames, and the file's index.

    Measured with H.264, whose decoder takes most: 2.4 MB at 256 x 256, 3.7 at 480 x 640, 6.5 at 720 x 1280.
    """
    return 2_000_000 + 6 * height * width + 32 * frames


def open_video(path: Path) -> Any:
    """PyAV's container of a file whose first video stream can be decoded.

    Raises:
        UserError: The file is no such video, or its pictures claim more than `MOST_PIXELS`.
    """
    try:
        container = av.open(str(path), metadata_errors="replace")  # What is written beside the pictures is no matter.
    except (av.FFmpegError, ValueError) as e:
        raise UserError(f"{path} cannot be opened as a video: {e}") from e
    stream: Any = container.streams.video[0] if container.streams.video else None
    why = ""
    if stream is None or stream.codec_context is None:
        why = "it has no stream of pictures that can be decoded"
    elif stream.time_base is None or not 0 < stream.width * stream.height <= MOST_PIXELS:
        why = f"its pictures are of {stream.width} x {stream.height} pixels"
    if why:
        container.close()
        raise UserError(f"{path} cannot be opened as a video: {why}")
    return container


class PyavDecoder:
    """PyAV seeks to the key frame at or before a time and decodes forward from there."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._container = open_video(path)
        self._stream = self._container.streams.video[0]
        self._stream.codec_context.thread_count = 1
        self.memory = decoder_memory(self._stream.height, self._stream.width, self._stream.frames)
        self._decoded: Iterator[Any] = iter(())
        self._position = float("inf")
        """Time of the last decoded frame; infinite: seek before decoding."""
        self._reach = 0.0
        """Longest way in seconds from a key frame to a time so far; nearer times are decoded up to without seeking."""

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
        nearest = "none is there"
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
        # One tick earlier, as the requested time may be a rounding error above the frame's own.
        tick = max(round(time / self._stream.time_base) - 1, 0)
        self._container.seek(tick, stream=self._stream, backward=True)
        self._decoded = iter(self._container.decode(self._stream))

    def close(self) -> None:
        """Close the file."""
        self._container.close()


class TorchcodecDecoder:
    """torchcodec finds the frame of an index by itself."""

    def __init__(self, path: Path) -> None:
        from torchcodec.decoders import VideoDecoder  # type: ignore[import-untyped,import-not-found,unused-ignore]

        self._path = path
        try:
            self._video = VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="approximate")
        except (OSError, RuntimeError, ValueError) as e:
            raise UserError(f"{path} cannot be opened as a video: {e}") from e
        about = self._video.metadata
        if not about.num_frames or not about.average_fps:
            raise UserError(f"{path} cannot be opened as a video: it does not say how many frames it has")
        self.memory = decoder_memory(about.height or 0, about.width or 0, about.num_frames)

    def frames(self, times: Sequence[float], tolerance: float) -> list[Frame]:
        """See `Decoder.frames`."""
        metadata = self._video.metadata
        last = metadata.num_frames - 1
        indices = [min(max(round(time * metadata.average_fps), 0), last) for time in times]
        try:
            found = self._video.get_frames_at(indices=indices)
        except (RuntimeError, IndexError, ValueError) as e:
            raise _no_frame(self._path, times[0], tolerance, f"decoding fails: {e}") from e
        for time, pts in zip(times, found.pts_seconds.tolist(), strict=True):
            if abs(time - pts) >= tolerance:
                raise _no_frame(self._path, time, tolerance, f"the nearest is at {pts:.4f} s")
        return list(found.data.numpy())

    def close(self) -> None:
        """Release the file; torchcodec closes it with its last reference."""
        del self._video


def _no_frame(path: Path, time: float, tolerance: float, nearest: str) -> UserError:
    return UserError(
        f"{path} has no frame within {tolerance:.4f} s of {time:.4f} s ({nearest}): the dataset's timestamps do not "
        "fit its video, or the file is damaged; download, record or convert that episode again"
    )
