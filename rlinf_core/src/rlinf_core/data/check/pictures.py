"""Check the videos of a LeRobot dataset and its images in parquet columns; see `check.files`.

Videos are decoded by PyAV, which is always installed. Frames are expected at frame / fps; wrong timestamps are a
separate finding, of `check.numbers`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rlinf_core.data.check.findings import FileFinding, FindingKind
from rlinf_core.data.images.parquet import image_batches
from rlinf_core.data.images.pictures import decode
from rlinf_core.data.images.video import VideoReader
from rlinf_core.data.images.video_header import open_video
from rlinf_core.data.lerobot.columns import image_size
from rlinf_core.data.lerobot.metadata import Metadata
from rlinf_core.errors import UserError


def check_video(metadata: Metadata, camera: str, path: Path, held: Sequence[int], *, full: bool) -> list[FileFinding]:
    """Check one video file: its number of frames, and the first and last frame of each episode or (`full`) all.

    Args:
        metadata: The dataset's metadata.
        camera: The column.
        path: The file.
        held: Indices of the episodes that it should contain.
        full: Decode every frame.
    """
    if not path.is_file():
        return []
    name = path.relative_to(metadata.root).as_posix()
    held = [i for i in held if metadata.lengths[i] > 0]
    try:
        with open_video(path) as container:
            stream: Any = container.streams.video[0]
            count, size = stream.frames or sum(packet.size > 0 for packet in container.demux(stream)), stream
            height, width = size.height, size.width
    except (av.FFmpegError, OSError, UserError) as error:
        episode = int(metadata.episodes[held[0]]) if held else None
        return [FileFinding("damaged_video", f"cannot be opened as a video: {_line(error)}", name, episode)]
    found = [*_check_size(metadata, camera, name, height, width)]
    expected = int(metadata.lengths[list(held)].sum())
    if count < expected:
        found.append(FileFinding("wrong_count", f"has {count} frames, its episodes have {expected}", name))
    elif count > expected:
        found.append(FileFinding("spare_frames", f"has {count} frames, its episodes have {expected}", name))
    found += (
        _decode_all(metadata, camera, path, name, held) if full else _decode_ends(metadata, camera, path, name, held)
    )
    return found


def check_images(
    metadata: Metadata, cameras: list[str], path: Path, held: NDArray[np.int64], *, full: bool
) -> Iterator[FileFinding]:
    """Check the image columns of one data file: every row has an image, and the first and last image of each episode or
    (`full`) all can be decoded. At most one finding per column and episode.

    Args:
        metadata: The dataset's metadata.
        cameras: The columns.
        path: The file.
        held: Indices of the episodes that it should contain.
        full: Decode every image.
    """
    try:
        pq.read_metadata(path)
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
                    for kind, what in _image_damage(metadata, camera, value):
                        reported.add((camera, i))
                        yield FileFinding(kind, f"{camera!r} {what}", name, int(metadata.episodes[i]), frame)
    except UserError as error:
        yield FileFinding("unreadable_file", f"its images cannot be read: {_line(error)}", name)


def _image_damage(metadata: Metadata, camera: str, value: Any) -> Iterator[tuple[FindingKind, str]]:
    """The problem with an image, if any."""
    try:
        # A column of one channel may contain depth maps, which cannot be trained on but are not damaged.
        deep = 3 not in (metadata.features[camera].get("shape") or ())
        height, width, _ = decode(value.as_buffer() if value.is_valid else None, "", deep=deep).shape
    except UserError as error:
        yield "damaged_image", _line(error).strip().removesuffix(". Record, convert or download it again")
        return
    for finding in _check_size(metadata, camera, "", height, width):
        yield finding.kind, finding.message


def _check_size(metadata: Metadata, camera: str, name: str, height: int, width: int) -> Iterator[FileFinding]:
    if image_size(metadata.features[camera]) not in (None, (height, width)):
        shape = metadata.features[camera]["shape"]
        yield FileFinding("wrong_shape", f"is {height} x {width} pixels, meta/info.json says {shape}", name)


def _time(metadata: Metadata, camera: str, episode: int, frame: int) -> float:
    """Time of an episode's frame in its file, in seconds."""
    return float(metadata.video_starts[camera][episode] + frame / metadata.fps)


def _decode_ends(metadata: Metadata, camera: str, path: Path, name: str, held: Sequence[int]) -> Iterator[FileFinding]:
    """Decode the first and the last frame of each episode."""
    reader = VideoReader(capacity=1, decoder="pyav")
    for i in held:
        for frame in dict.fromkeys((0, int(metadata.lengths[i]) - 1)):
            try:
                reader.frames(path, [_time(metadata, camera, i, frame)], tolerance=0.5 / metadata.fps)
            except UserError as error:
                what = _line(error).removeprefix(f"{path} ").partition("): ")[0] + ")"
                yield FileFinding("damaged_video", what, name, int(metadata.episodes[i]), frame)
                break


def _decode_all(metadata: Metadata, camera: str, path: Path, name: str, held: Sequence[int]) -> Iterator[FileFinding]:
    """Decode every frame, and report missing and corrupt ones; one finding of each kind per episode."""
    there, corrupt, cause = [], [], "the file has no frame at its time"
    with open_video(path) as container:
        stream: Any = container.streams.video[0]
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
    for i in held:
        # Bounded, because the metadata may claim any number of frames.
        frames = np.arange(min(int(metadata.lengths[i]), len(there) + 2**20))
        wanted = _time(metadata, camera, i, 0) + frames / metadata.fps
        after = np.searchsorted(times, wanted)
        nearest = np.where(wanted - times[after - 1] < times[after] - wanted, after - 1, after)
        missing = np.abs(times[nearest] - wanted) >= 0.5 / metadata.fps
        for flags, what in ((missing, cause), (bad[nearest] & ~missing, "the decoder reports a corrupt frame")):
            if flags.any():
                more = f" ({int(flags.sum())} frames of the episode)" if flags.sum() > 1 else ""
                yield FileFinding("damaged_video", what + more, name, int(metadata.episodes[i]), int(flags.argmax()))


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
