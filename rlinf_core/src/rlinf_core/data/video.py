"""Frames of video files at given times, as uint8 RGB.

Decoding dominates the cost of reading robot data, so decoders stay open between calls (a bounded number of them),
requests to one file are served in the order of time, and only the frames asked for are converted to RGB. torchcodec
decodes where it loads (it needs FFmpeg's libraries on the system), else PyAV, whose wheels bundle them. One thread a
decoder: loader workers are the parallelism.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import av
import numpy as np
from numpy.typing import NDArray

from rlinf_core.errors import UserError

DecoderName = Literal["torchcodec", "pyav"]
MOST_PIXELS = 2**26
"""Of a picture: a few bytes can claim any size."""


class Decoder(Protocol):
    """An open video file."""

    def frames(self, times: Sequence[float], tolerance: float) -> list[NDArray[np.uint8]]:
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
    """The decoder this process uses: torchcodec if it loads, else PyAV."""
    try:
        import torchcodec.decoders  # type: ignore[import-untyped,import-not-found,unused-ignore]  # noqa: F401
    except (ImportError, OSError, RuntimeError):  # Not installed, or FFmpeg's shared libraries are not found.
        return "pyav"
    return "torchcodec"


class VideoReader:
    """Reads frames of many files, keeping the `capacity` most recently used ones open.

    A process makes its own: decoders cannot be pickled, so a copy in another process starts with none open.
    """

    def __init__(self, capacity: int = 32, decoder: DecoderName | None = None) -> None:
        self._capacity = capacity
        self._decoder = decoder
        self._open: OrderedDict[Path, Decoder] = OrderedDict()

    def frames(self, path: Path, times: Sequence[float], tolerance: float) -> list[NDArray[np.uint8]]:
        """One uint8 [height, width, 3] RGB frame for each time, in the order of `times`.

        Args:
            path: A video file.
            times: Seconds from the start of the file, in any order.
            tolerance: Seconds a frame may lie off its time; half a frame finds the nearest one.

        Raises:
            UserError: The file cannot be read, or holds no frame near a time; it names file and time.
        """
        order = np.argsort(times, kind="stable")
        found = self._decoder_of(path).frames([times[i] for i in order], tolerance)
        frames = [found[0]] * len(found)
        for i, frame in zip(order, found, strict=True):
            frames[i] = frame
        return frames

    def _decoder_of(self, path: Path) -> Decoder:
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        while len(self._open) >= self._capacity:
            self._open.popitem(last=False)[1].close()
        name = self._decoder or decoder_name()
        self._open[path] = TorchcodecDecoder(path) if name == "torchcodec" else PyavDecoder(path)
        return self._open[path]

    def __getstate__(self) -> dict[str, Any]:
        return {"_capacity": self._capacity, "_decoder": self._decoder, "_open": OrderedDict()}


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
        self._decoded: Iterator[Any] = iter(())
        self._position = float("inf")
        """Time of the last decoded frame; infinite: seek before decoding."""
        self._reach = 0.0
        """Longest way in seconds from a key frame to a time so far; nearer times are decoded up to without seeking."""

    def frames(self, times: Sequence[float], tolerance: float) -> list[NDArray[np.uint8]]:
        """See `Decoder.frames`."""
        found: list[NDArray[np.uint8]] = []
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
        if not self._video.metadata.num_frames or not self._video.metadata.average_fps:
            raise UserError(f"{path} cannot be opened as a video: it does not say how many frames it has")

    def frames(self, times: Sequence[float], tolerance: float) -> list[NDArray[np.uint8]]:
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
