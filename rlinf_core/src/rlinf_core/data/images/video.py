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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rlinf_core.data.images.decoders import Decoder, Frame, PyavDecoder, TorchcodecDecoder, lend_ffmpeg
from rlinf_core.errors import UserError

DecoderName = Literal["torchcodec", "pyav"]


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
