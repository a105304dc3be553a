"""What the container of a video file says about its frames, read without decoding them and cached per file.

`read_video_header` opens the file, which takes about a millisecond, and remembers what it found until the file's size
or modification time changes. `read_frame_times` reads the whole file, still without decoding, because FFmpeg exposes no
table of frame times.
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
from numpy.typing import NDArray

from rlinf_core.errors import UserError
from rlinf_core.untrusted.text import NotAFileError, check_file

MOST_PIXELS = 2**25
"""Upper bound on the size of an image: a few bytes of a header can claim any size."""
_ANY_METADATA: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}
"""Accept invalid UTF-8 in tags, which do not matter; PyAV 19 does so without an option."""
CONTAINERS = ("mov", "mp4", "matroska", "webm", "avi", "mpegts", "mpeg", "ogg", "flv", "gif")
"""FFmpeg's names of the containers that are opened: files that consist of frames. A playlist (`hls`, `concat`, `dash`)
names other files, which may lie anywhere."""
CODECS = (
    *("h264", "hevc", "av1", "libdav1d", "libaom-av1", "vp8", "libvpx", "vp9", "libvpx-vp9", "mpeg4", "mpeg2video"),
    *("mpeg1video", "mjpeg", "prores", "theora", "ffv1", "huffyuv", "ffvhuff", "png", "gif", "rawvideo"),
)
"""FFmpeg's names of the decoders that may run on a file: those of codecs that recorders and datasets use. FFmpeg has
hundreds, and the rare ones are seldom tested against hostile files."""
_LOCAL = {
    "protocol_whitelist": "file",
    "format_whitelist": ",".join(CONTAINERS),
    "codec_whitelist": ",".join(CODECS),
}
_IDENTITY = np.array([[1, 0], [0, 1]]) << 16
_FULL_RANGE = 2  # AVCOL_RANGE_JPEG


@dataclass(frozen=True)
class Turn:
    """How stored frames become upright ones: first transpose, then reverse rows, then columns."""

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    @property
    def mirrors(self) -> bool:
        """Whether left and right are exchanged: the turn is not a rotation."""
        return (self.transpose + self.flip_rows + self.flip_columns) % 2 == 1

    @property
    def degrees(self) -> int:
        """The rotation clockwise: 0, 90, 180 or 270. A mirrored one is this rotation of the image mirrored before."""
        if self.transpose:
            return 90 if self.flip_columns else 270
        return 180 if self.flip_rows else 0

    def apply(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The upright image of a stored one, [height, width, 3]."""
        image = image.transpose(1, 0, 2) if self.transpose else image
        image = image[::-1] if self.flip_rows else image
        return np.ascontiguousarray(image[:, ::-1] if self.flip_columns else image)


@dataclass(frozen=True)
class VideoHeader:
    """What a container says about its video stream. Fields that the container may lack have a default."""

    stream: int
    """Index of the stream among all of the file; the first video stream that is not a cover image."""
    codec: str
    """FFmpeg's name of the decoder, such as `"h264"`, `"hevc"` or `"libdav1d"`."""
    pixel_format: str
    """FFmpeg's name, such as `"yuv420p"`; empty if unknown."""
    frames: int
    """Number of stored frames; 0 if the container does not say, as Matroska and fragmented MP4. It includes frames that
    an edit list hides, which `read_frame_times` does not."""
    time_base: Fraction
    """Seconds per tick: frame times are multiples of it."""
    start: float
    """Time of the first frame in seconds; 0 if unknown."""
    duration: float | None
    """Seconds from the first frame to the end of the last."""
    average_rate: float | None
    """Frames per second: frames / duration."""
    base_rate: float | None
    """FFmpeg's guess, from the first frames, of the rate of a grid that contains all frame times. Equals the average
    rate up to rounding if the rate is constant."""
    height: int
    """Rows of the upright frames."""
    width: int
    """Columns of the upright frames."""
    turn: Turn
    """How stored frames become upright ones."""
    full_range: bool
    """Whether luma is tagged as 0 to 255, instead of 16 to 235."""
    color_matrix: int
    """Matrix coefficients by their number in ISO/IEC 23091-2: 1 is BT.709, 5 and 6 BT.601, 9 BT.2020, 2 untagged."""

    @property
    def not_rgb(self) -> str:
        """The reason why the frames cannot be trained on as RGB images; empty if they can."""
        if is_depth_format(self.pixel_format):
            return (
                f"{self.pixel_format} frames, which have one channel of more than 8 bits, such as depth maps: they "
                "would be read as grey images"
            )
        if _has_alpha(self.pixel_format):
            return (
                f"{self.pixel_format} frames, whose alpha channel would be lost: encode the video without it, such as "
                "with `ffmpeg -i old.mp4 -pix_fmt yuv420p new.mp4`"
            )
        return ""


def local_address(path: Path) -> str:
    """The address by which FFmpeg opens a file on this machine and nothing else.

    FFmpeg reads a path that starts with a word and a colon as an address of another protocol, such as `http:` or
    `concat:`. A dataset chooses its files' names, and relative paths begin with them.
    """
    return f"file:{path.absolute()}"


def open_video(path: Path) -> Any:
    """Open a file with PyAV; `video_stream` of it can be decoded.

    Raises:
        UserError: The file is not such a video, its container or codec is not among `CONTAINERS` and `CODECS`, or its
            frames have more than `MOST_PIXELS` pixels.
    """
    try:
        check_file(path)
    except NotAFileError as e:
        raise UserError(f"{path} cannot be opened as a video: {e}") from e
    except OSError:
        pass  # FFmpeg says it in its own words.
    try:
        container = av.open(local_address(path), container_options=_LOCAL, **_ANY_METADATA)
    except (av.FFmpegError, ValueError) as e:
        raise UserError(f"{path} cannot be opened as a video: {_reason(e)}") from e
    stream = video_stream(container)
    why = ""
    if stream is None or stream.codec_context is None:
        why = "it has no video stream that can be decoded"
    elif stream.codec_context.name not in CODECS:
        why = (
            f"its codec is {stream.codec_context.name}, and those that are read are {', '.join(CODECS)}. Encode it "
            "again, such as with `ffmpeg -i old.mp4 -pix_fmt yuv420p new.mp4`"
        )
    elif stream.time_base is None or not 0 < stream.width * stream.height <= MOST_PIXELS:
        why = f"its frames have {stream.width} x {stream.height} pixels"
    if why:
        container.close()
        raise UserError(f"{path} cannot be opened as a video: {why}")
    return container


def _reason(error: Exception) -> str:
    """FFmpeg's message; a container that is not allowed is only an invalid argument to it."""
    if getattr(error, "errno", None) == errno.EINVAL:
        return f"it is not a video file that is read: {', '.join(CONTAINERS)}"
    return str(error).partition(": 'file:")[0]


def video_stream(container: Any) -> Any:
    """The first video stream that is not a cover image; None if there is none."""
    cover = av.stream.Disposition.attached_pic
    return next((stream for stream in container.streams.video if not stream.disposition & cover), None)


def read_video_header(path: Path) -> VideoHeader:
    """What the container says, from a cache if the file has not changed. Thread-safe.

    Raises:
        UserError: The file cannot be opened as a video; the message names it.
    """
    return _read_header(*_version_of(path))


@dataclass(frozen=True, eq=False)
class FrameTimes:
    """The exact times of all frames of a file, in display order."""

    ticks: NDArray[np.int64]
    """[frames], ascending, in units of the time base."""
    is_key: NDArray[np.bool_]
    """[frames]"""
    seconds: NDArray[np.float64]
    """[frames], ascending."""

    def nearest(self, times: Any) -> NDArray[np.int64]:
        """The indices of the frames nearest to some times in seconds; the earlier one of two at the same distance."""
        times = np.asarray(times, np.float64)
        after = np.clip(np.searchsorted(self.seconds, times), 1, max(len(self.seconds) - 1, 1))
        last = len(self.seconds) - 1
        before, after = np.minimum(after - 1, last), np.minimum(after, last)
        nearer = self.seconds[after] - times < times - self.seconds[before]
        return np.where(nearer, after, before)


def read_frame_times(path: Path) -> FrameTimes:
    """The exact times of all frames. Thread-safe; the last files are cached.

    Reads the whole file without decoding, which takes 3 microseconds per frame if the file is in the page cache.

    Raises:
        UserError: The file cannot be opened as a video, is truncated, or has no frame.
    """
    return _read_times(*_version_of(path))


@functools.cache
def is_depth_format(pixel_format: str) -> bool:
    """Whether a pixel format has one channel of more than 8 bits, such as `"gray12le"`; False for unknown names."""
    try:
        components = [one for one in av.VideoFormat(pixel_format).components if not one.is_alpha]
    except ValueError:
        return False
    return len(components) == 1 and components[0].bits > 8


@functools.cache
def _has_alpha(pixel_format: str) -> bool:
    try:
        return any(component.is_alpha for component in av.VideoFormat(pixel_format).components)
    except ValueError:
        return False


def _version_of(path: Path) -> tuple[Path, int, int]:
    """A file and what changes with its content."""
    try:
        status = os.stat(path)
    except OSError as e:
        raise UserError(f"{path} cannot be opened as a video: {e}") from e
    return path, status.st_size, status.st_mtime_ns


@functools.lru_cache(2**16)  # Half a kilobyte each.
def _read_header(path: Path, size: int, modified: int) -> VideoHeader:
    with open_video(path) as container:
        stream, context = video_stream(container), video_stream(container).codec_context
        turn = _turn_of(path, container, stream)
        height, width = (stream.width, stream.height) if turn.transpose else (stream.height, stream.width)
        base = stream.time_base
        pixel_format = context.pix_fmt or ""
        return VideoHeader(
            stream=stream.index,
            codec=context.name,
            pixel_format=pixel_format,
            frames=max(stream.frames, 0),
            time_base=base,
            start=float((stream.start_time or 0) * base),
            duration=None if stream.duration is None else float(stream.duration * base),
            average_rate=_rate(stream.average_rate),
            base_rate=_rate(stream.base_rate),
            height=height,
            width=width,
            turn=turn,
            full_range=int(context.color_range or 0) == _FULL_RANGE or pixel_format.startswith("yuvj"),
            color_matrix=int(context.colorspace),
        )


def _rate(rate: Fraction | None) -> float | None:
    return float(rate) if rate else None


def _turn_of(path: Path, container: Any, stream: Any) -> Turn:
    """The turn that the container asks for. PyAV passes it on with a frame only, so the first one is decoded unless the
    file is an MP4 whose tracks have no such matrix, as nearly all of them.
    """
    if "mp4" in container.format.name.split(","):
        with path.open("rb") as file:
            if all(np.array_equal(matrix, _IDENTITY) for matrix in _matrices(file)):
                return Turn()
    try:
        frame = next(iter(container.decode(stream)), None)
    except av.FFmpegError:
        return Turn()  # A decoder reports the damage with the frame that is asked for.
    found = frame.side_data.get("DISPLAYMATRIX") if frame is not None else None
    if found is None:
        return Turn()
    (a, b, _), (c, d, _), _ = np.frombuffer(bytes(found), np.int32).reshape(3, 3).tolist()
    # The stored pixel (column x, row y) belongs at column a x + c y and row b x + d y.
    if abs(b) + abs(c) > abs(a) + abs(d):
        return Turn(True, flip_rows=b < 0, flip_columns=c < 0)
    return Turn(False, flip_rows=d < 0, flip_columns=a < 0)


def _matrices(file: BinaryIO) -> Iterator[NDArray[np.int32]]:
    """The display matrices [2, 2] of an MP4 file and its tracks, as 16.16 fixed-point numbers (ISO/IEC 14496-12)."""
    end = file.seek(0, os.SEEK_END)
    movie = next((place for kind, place in _boxes(file, 0, end) if kind == b"moov"), (0, 0))
    for kind, (start, stop) in _boxes(file, *movie):
        if kind == b"mvhd":
            yield _matrix(file, start, at=(36, 48))
        elif kind == b"trak":
            heads = (place for part, place in _boxes(file, start, stop) if part == b"tkhd")
            yield from (_matrix(file, first, at=(40, 52)) for first, _ in heads)


def _boxes(file: BinaryIO, start: int, stop: int) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """Type, and start and stop of the content, of the boxes in a part of a file; ends at the first invalid one."""
    while start + 8 <= stop:
        file.seek(start)
        head = file.read(16)
        size, content = int.from_bytes(head[:4], "big"), start + 8
        if size == 1:
            size, content = int.from_bytes(head[8:16], "big"), start + 16
        size = size or stop - start
        if size < content - start:
            return
        yield head[4:8], (content, min(start + size, stop))
        start += size


def _matrix(file: BinaryIO, start: int, at: tuple[int, int]) -> NDArray[np.int32]:
    """The matrix of a box whose content starts at `start`; `at` is its place in versions 0 and 1 of the box."""
    file.seek(start)
    content = file.read(64 + 36)
    place = at[content[:1] == b"\1"]
    numbers = np.frombuffer(content[place : place + 20].ljust(20, b"\0"), ">i4")
    return numbers[[0, 1, 3, 4]].reshape(2, 2).astype(np.int32)


@functools.lru_cache(64)  # 17 bytes per frame.
def _read_times(path: Path, size: int, modified: int) -> FrameTimes:
    ticks, keys = [], []
    with open_video(path) as container:
        stream = video_stream(container)
        try:
            for packet in container.demux(stream):
                tick = packet.dts if packet.pts is None else packet.pts
                if packet.size and tick is not None and not packet.is_discard:
                    ticks.append(tick)
                    keys.append(packet.is_keyframe)
        except av.FFmpegError as e:
            raise UserError(f"{path} cannot be read as a video: {e}. Download or record it again") from e
        if not ticks:
            raise UserError(f"{path} cannot be read as a video: it has no frame. Download or record it again")
        order = np.argsort(ticks, kind="stable")
        sorted_ticks = np.array(ticks, np.int64)[order]
        seconds = sorted_ticks.astype(np.float64) * float(stream.time_base)
        return FrameTimes(sorted_ticks, np.array(keys, np.bool_)[order], seconds)
