"""A video of an episode, encoded while it is played."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CRF = 26
"""Quality of H.264: lower is better and larger."""


class Video:
    """Writes frames to an MP4 file that browsers play."""

    def __init__(self, path: Path, frames_per_second: float) -> None:
        self._path, self._rate = path, Fraction(max(frames_per_second, 1.0)).limit_denominator(1000)
        self._container: Any = None
        self._stream: Any = None
        self.frames = 0

    def add(self, frame: NDArray[np.uint8]) -> None:
        """Add a frame, uint8 [height, width, 3] RGB."""
        import av

        frame = np.ascontiguousarray(frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2])  # H.264 needs even.
        if self._container is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            av.logging.set_libav_level(av.logging.ERROR)
            self._container = av.open(str(self._path), "w", format="mp4")
            self._stream = self._container.add_stream("libx264", rate=self._rate, options={"crf": str(CRF)})
            self._stream.height, self._stream.width = frame.shape[:2]
            self._stream.pix_fmt = "yuv420p"
            self._stream.codec_context.thread_count = 1
        self._container.mux(self._stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        self.frames += 1

    def close(self) -> None:
        """Finish the file."""
        if self._container is not None:
            self._container.mux(self._stream.encode())
            self._container.close()
