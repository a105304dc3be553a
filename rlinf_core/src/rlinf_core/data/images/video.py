"""Frames of video files at given times, as uint8 RGB.

Decoding dominates the cost of reading robot data. So decoders stay open between calls (bounded in number and bytes),
the frames of a file are decoded in the order of time, a frame that is requested twice is decoded once, and only the
requested frames are converted to RGB. torchcodec decodes if it loads (on Linux it does, with the FFmpeg libraries of
PyAV's wheel, see `decoders.lend_ffmpeg`), else PyAV. A decoder uses one thread; loader workers provide the parallelism.
Other processes decode several files in threads, because both decoders release the GIL.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rlinf_core.data.images.decoders import Decoder, Frame, PyavDecoder, TorchcodecDecoder, lend_ffmpeg, no_frame
from rlinf_core.data.images.video_header import VideoHeader, read_video_header
from rlinf_core.errors import UserError

DecoderName = Literal["torchcodec", "pyav"]
LONGEST = 1e11
"""Seconds on a video's clock, also if it counts from 1970: larger times, and NaN, are damage."""


@functools.cache
def decoder_name() -> DecoderName:
    """The default decoder of this process: torchcodec if it loads, else PyAV."""
    return "pyav" if torchcodec_failure() else "torchcodec"


@functools.cache
def torchcodec_failure() -> str:
    """The reason why torchcodec does not load in this process; empty if it does."""
    lent = ""
    try:
        lend_ffmpeg()
    except OSError as e:  # torchcodec may still find the system's FFmpeg.
        lent = f"PyAV's FFmpeg libraries cannot be loaded for it: {e}; "
    try:
        import torchcodec.decoders  # type: ignore[import-untyped,import-not-found,unused-ignore]  # noqa: F401
    except (ImportError, OSError, RuntimeError) as e:  # Not installed, or FFmpeg's shared libraries are not found.
        return lent + str(e).strip().partition("\n")[0]
    return ""


class VideoReader:
    """Reads frames of many files, and keeps the most recently used files open.

    Decoders cannot be pickled, so a copy in another process starts without open files.
    """

    def __init__(
        self,
        capacity: int = 128,
        decoder: DecoderName | None = None,
        *,
        memory: int = 2**29,
        threads: int | None = None,
        any_format: bool = False,
    ) -> None:
        """Create a reader; files are opened on first use.

        Args:
            capacity: Most files to keep open; the usual limit of a process is 1024.
            decoder: Decoder to use; None: torchcodec if it loads, else PyAV.
            memory: Most bytes that open decoders may take together, by their own estimate.
            threads: Files to decode in parallel; None: 1 in loader workers, else a few.
            any_format: Also decode depth maps and frames with an alpha channel, only to see whether they are damaged.
        """
        self._any_format = any_format
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
        """One frame per time, in the order of `times`.

        Args:
            path: A video file.
            times: Seconds of the file's own clock, in any order.
            tolerance: Largest distance in seconds from a time to the nearest frame.

        Raises:
            UserError: The file cannot be read, has no frame near a time, or is not RGB; the message names file and
                time.
        """
        if strange := [time for time in times if not abs(time) <= LONGEST]:
            raise no_frame(path, strange[0], tolerance, "it is not a time in a video")
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
        """`frames` for several different files, in parallel where threads are allowed."""
        threads = self._threads or _threads()
        if threads == 1 or len(wanted) == 1:
            return [self.frames(path, times, tolerance) for path, times in wanted]
        self._pool = self._pool or ThreadPoolExecutor(threads, "rlinf-video")
        return list(self._pool.map(lambda one: self.frames(one[0], one[1], tolerance), wanted))

    def close_removed(self) -> None:
        """Close files that have been removed, whose disk is free only then."""
        with self._lock:
            removed = [self._open.pop(path) for path in list(self._open) if not path.exists()]
        for decoder in removed:
            decoder.close()

    def close(self) -> None:
        """Close all files and end the threads; the next call opens what it needs again."""
        with self._lock:
            decoders, self._open = list(self._open.values()), OrderedDict()
        for decoder in decoders:
            decoder.close()
        if self._pool:
            self._pool.shutdown()
            self._pool = None

    def _take(self, path: Path) -> Decoder:
        """The decoder of a file, for this thread only until `_give_back`."""
        with self._lock:
            decoder = self._open.pop(path, None)
        return decoder or self._opened(path)

    def _opened(self, path: Path) -> Decoder:
        header = read_video_header(path)
        if header.not_rgb and not self._any_format:
            raise UserError(f"{path} contains {header.not_rgb}. Name another column in data.images")
        if self.decoder == "torchcodec" and torchcodec_shows(header):
            return TorchcodecDecoder(path, header)
        return PyavDecoder(path, header)

    def _give_back(self, path: Path, decoder: Decoder) -> None:
        with self._lock:
            self._open[path] = decoder
            while len(self._open) > self._capacity or (
                len(self._open) > 1 and sum(one.memory for one in self._open.values()) > self._memory
            ):
                self._open.popitem(last=False)[1].close()

    def __getstate__(self) -> dict[str, Any]:
        options = {"capacity": self._capacity, "decoder": self._decoder, "memory": self._memory}
        return options | {"threads": self._threads, "any_format": self._any_format}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def torchcodec_shows(header: VideoHeader) -> bool:
    """Whether torchcodec (0.11) shows the frames of a file as they are; PyAV decodes the others.

    Where it converts to RGB by swscale (widths that are multiples of 32), it recognizes full-range YUV by the pixel
    format (`yuvj420p`) alone, but AV1, VP9 and 10-bit H.265 have a tag instead: it would read it as limited range, with
    too much contrast. It knows the orientation as an angle, which a mirrored image does not have.
    """
    return not header.turn.mirrors and (not header.full_range or header.pixel_format.startswith("yuvj"))


def _threads() -> int:
    """One in loader workers and other child processes, else up to four."""
    return 1 if multiprocessing.parent_process() else min(4, os.cpu_count() or 1)
