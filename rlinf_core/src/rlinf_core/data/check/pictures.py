"""Check the videos of a LeRobot dataset and its images in parquet columns; see `check.files`.

First and last frames are decoded as a run does. All frames are decoded by PyAV, which reports corrupt ones; torchcodec
does not. Frames are expected at frame / fps; wrong timestamps are a separate finding, of `check.numbers`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rlinf_core.data.check.findings import FileFinding, FindingKind
from rlinf_core.data.images.parquet import image_batches
from rlinf_core.data.images.pictures import decode
from rlinf_core.data.images.video import DecoderName, VideoReader
from rlinf_core.data.images.video_header import open_video, read_frame_times, read_video_header, video_stream
from rlinf_core.data.lerobot.columns import image_size, not_rgb
from rlinf_core.data.lerobot.frame_match import FrameMatch
from rlinf_core.data.lerobot.metadata import Metadata
from rlinf_core.errors import UserError
from rlinf_core.untrusted.parquet import open_parquet

MOST_FRAMES = 2**24
"""Frames of an episode whose times are computed at most."""


@dataclass(frozen=True)
class Reading:
    """How images will be read."""

    decoder: DecoderName | None = None
    """The video decoder; None: torchcodec if it loads, else PyAV."""
    train: bool = False
    """Whether all columns are images to train on. Otherwise those that the metadata describe as something else, such as
    depth maps, may be."""

    def any_format(self, feature: dict[str, Any]) -> bool:
        """Whether the images of a column may be other than RGB: they are not damaged, but cannot be trained on."""
        return not self.train and (bool(not_rgb(feature)) or 3 not in (feature.get("shape") or ()))


def check_video(
    metadata: Metadata,
    camera: str,
    path: Path,
    held: Sequence[int],
    *,
    full: bool,
    reads: Reading,
    match: FrameMatch | None = None,
) -> list[FileFinding]:
    """Check one video file: number, size and kind of its frames, and that the first and last frame of each episode or
    (`full`) all can be decoded.

    Args:
        metadata: The dataset's metadata.
        camera: The column.
        path: The file.
        held: Indices of the episodes that it should contain.
        full: Decode every frame.
        reads: How the frames will be read.
        match: The rows' frames; None: frames are expected at frame / fps.
    """
    if not path.is_file():
        return []
    name = path.relative_to(metadata.root).as_posix()
    held = [i for i in held if metadata.lengths[i] > 0]
    try:
        header = read_video_header(path)
        count = header.frames or len(read_frame_times(path).ticks)
    except (OSError, UserError) as error:
        episode = int(metadata.episodes[held[0]]) if held else None
        return [FileFinding("damaged_video", f"cannot be opened as a video: {_line(error)}", name, episode)]
    found = [*_check_size(metadata, camera, name, header.height, header.width)]
    if header.not_rgb and not reads.any_format(metadata.features[camera]):
        found.append(FileFinding("not_rgb", f"contains {header.not_rgb}", name))
    expected = int(metadata.lengths[list(held)].sum())
    if count < expected:
        found.append(FileFinding("wrong_count", f"has {count} frames, its episodes have {expected}", name))
    elif count > expected:
        found.append(FileFinding("spare_frames", f"has {count} frames, its episodes have {expected}", name))
    times = {i: _times(metadata, camera, path, i, match) for i in held}
    if full:
        found += _decode_all(metadata, path, name, times)
    reported = {one.episode for one in found}
    rest = {i: seconds for i, seconds in times.items() if metadata.episodes[i] not in reported}
    return [*found, *_decode_ends(metadata, path, name, rest, reads.decoder)]


def check_images(
    metadata: Metadata, cameras: list[str], path: Path, held: NDArray[np.int64], *, full: bool, reads: Reading
) -> Iterator[FileFinding]:
    """Check the image columns of one data file: every row has an image, and the first and last image of each episode or
    (`full`) all can be decoded. At most one finding per column and episode.

    Args:
        metadata: The dataset's metadata.
        cameras: The columns.
        path: The file.
        held: Indices of the episodes that it should contain.
        full: Decode every image.
        reads: How the images will be read.
    """
    try:
        with open_parquet(path):
            pass
    except (OSError, pa.ArrowException):
        return  # `check_data_file` reports it.
    name = path.relative_to(metadata.root).as_posix()
    # Lazy, because the metadata may claim any number of frames; the file has a finite number of rows.
    places = ((i, frame) for i in held.tolist() for frame in range(metadata.lengths[i]))
    reported: set[tuple[str, int]] = set()
    try:
        for batch in image_batches(path, cameras, metadata.root):
            # `check_data_file` reports rows beyond those that meta/ counts.
            for at, (i, frame) in enumerate(islice(places, len(batch))):
                decoded = full or frame in (0, metadata.lengths[i] - 1)
                for camera in cameras:
                    value = batch[camera][at]
                    if (value.is_valid and not decoded) or (camera, i) in reported:
                        continue
                    for kind, what in _image_damage(metadata, camera, value, reads):
                        reported.add((camera, i))
                        yield FileFinding(kind, f"{camera!r} {what}", name, int(metadata.episodes[i]), frame)
    except UserError as error:
        yield FileFinding("unreadable_file", f"its images cannot be read: {_line(error)}", name)


def _image_damage(metadata: Metadata, camera: str, value: Any, reads: Reading) -> Iterator[tuple[FindingKind, str]]:
    """The problem with an image, if any."""
    try:
        any_format = reads.any_format(metadata.features[camera])
        height, width, _ = decode(value.as_buffer() if value.is_valid else None, "", any_format=any_format).shape
    except UserError as error:
        yield "damaged_image", _line(error).strip().removesuffix(". Record, convert or download it again")
        return
    for finding in _check_size(metadata, camera, "", height, width):
        yield finding.kind, finding.message


def _check_size(metadata: Metadata, camera: str, name: str, height: int, width: int) -> Iterator[FileFinding]:
    if image_size(metadata.features[camera]) not in (None, (height, width)):
        shape = metadata.features[camera]["shape"]
        yield FileFinding("wrong_shape", f"is {height} x {width} pixels, meta/info.json says {shape}", name)


def _times(metadata: Metadata, camera: str, path: Path, i: int, match: FrameMatch | None) -> NDArray[np.float64]:
    """The times of an episode's frames in its file, in seconds."""
    if match is not None:
        return match.seconds_of_episode(camera, path, int(metadata.episodes[i]))
    # Bounded, because the metadata may claim any number of frames.
    frames = np.arange(min(int(metadata.lengths[i]), MOST_FRAMES))
    return np.asarray(metadata.video_starts[camera][i] + frames / metadata.fps)


def _decode_ends(
    metadata: Metadata,
    path: Path,
    name: str,
    times: Mapping[int, NDArray[np.float64]],
    decoder: DecoderName | None,
) -> Iterator[FileFinding]:
    """Decode the first and the last frame of each episode."""
    reader = VideoReader(capacity=1, decoder=decoder, any_format=True)
    for i, seconds in times.items():
        for frame in dict.fromkeys((0, len(seconds) - 1)):
            try:
                reader.frames(path, [float(seconds[frame])], tolerance=0.5 / metadata.fps)
            except UserError as error:
                what = _line(error).removeprefix(f"{path} ").partition("): ")[0] + ")"
                yield FileFinding("damaged_video", what, name, int(metadata.episodes[i]), frame)
                break


def _decode_all(
    metadata: Metadata, path: Path, name: str, times_of: Mapping[int, NDArray[np.float64]]
) -> Iterator[FileFinding]:
    """Decode every frame, and report missing and corrupt ones; one finding of each kind per episode."""
    there, corrupt, cause = [], [], "the file has no frame at its time"
    with open_video(path) as container:
        stream = video_stream(container)
        try:
            for frame in container.decode(stream):
                if frame.pts is not None:
                    there.append(float(frame.pts * stream.time_base))
                    corrupt.append(bool(frame.is_corrupt))
        except av.FFmpegError as error:
            cause = f"decoding fails: {_line(error)}"
    order = np.argsort(there, kind="stable")
    times = np.array([-np.inf, *np.array(there)[order], np.inf])
    bad = np.array([False, *np.array(corrupt, bool)[order], False])
    for i, wanted in times_of.items():
        after = np.searchsorted(times, wanted)
        nearest = np.where(wanted - times[after - 1] < times[after] - wanted, after - 1, after)
        missing = np.abs(times[nearest] - wanted) >= 0.5 / metadata.fps
        for flags, what in ((missing, cause), (bad[nearest] & ~missing, "the decoder reports a corrupt frame")):
            if flags.any():
                more = f" ({int(flags.sum())} frames of the episode)" if flags.sum() > 1 else ""
                yield FileFinding("damaged_video", what + more, name, int(metadata.episodes[i]), int(flags.argmax()))


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
