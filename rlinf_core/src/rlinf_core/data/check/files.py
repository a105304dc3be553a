"""Check the files of a LeRobot dataset and report all damage, where the reader stops at the first.

Three depths: `fast` reads the metadata and all numbers; `ends` also checks that every image is present and decodes the
first and last frame of each episode; `full` decodes every frame.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rlinf_core.data.check.findings import Damage, FileFinding
from rlinf_core.data.check.numbers import check_data_file, check_metadata, check_missing, check_unlisted, located
from rlinf_core.data.check.pictures import Reading, check_images, check_video
from rlinf_core.data.check.tasks import check_listed_tasks
from rlinf_core.data.images.video import VideoReader
from rlinf_core.data.lerobot.frame_match import FrameMatch, Match, Mismatch
from rlinf_core.data.lerobot.metadata import NUMBERS, Metadata
from rlinf_core.data.lerobot.rows import Rows, read_rows
from rlinf_core.errors import UserError

Depth = Literal["fast", "ends", "full"]
AT_ONCE = 4
"""Files that are checked in parallel."""


def check_files(
    metadata: Metadata,
    *,
    cameras: Sequence[str],
    vectors: Sequence[str],
    depth: Depth = "ends",
    local: bool = True,
    chosen: NDArray[np.bool_] | None = None,
    match: Match = "time",
    reads: Reading | None = None,
    progress: Callable[[int, int], object] = lambda done, all: None,
) -> Damage:
    """Check a dataset's files.

    Args:
        metadata: The dataset's metadata, from `read_metadata`.
        cameras: Image columns to check.
        vectors: Numeric columns to check, besides the index columns.
        depth: How much to read and decode.
        local: Whether the folder contains the whole dataset, so that unlisted files are reported.
        chosen: [episodes], the episodes whose files are checked; None: all.
        match: How rows find their frames: `LeRobotDatasetConfig.match_frames`.
        reads: How images will be read; None: as `Reading()` says.
        progress: Called with the number of finished files and the number of all files.

    Raises:
        UserError: The named video decoder does not load.
    """
    damage = Damage()
    damage.add(check_metadata(metadata))
    used = metadata if chosen is None else metadata.only(chosen)
    frames = _Frames(metadata, chosen, [name for name in cameras if name in metadata.video_files], match, depth)
    if frames.rows is not None:
        used, notes = located(used, frames.rows)
        damage.add(notes)
        damage.add(check_listed_tasks(metadata, frames.rows))
    damage.add(check_missing(used, used.files(cameras)))
    if local:
        damage.add(check_unlisted(metadata, used))
    tasks = _tasks(used, cameras, vectors, depth, frames, reads or Reading())
    progress(0, len(tasks))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            for done, found in enumerate(pool.map(lambda task: list(task()), tasks), 1):
                damage.add(found)
                progress(done, len(tasks))
        finally:
            pool.shutdown(cancel_futures=True)
    damage.add(frames.findings(damage))
    return damage


class _Frames:
    """The match of rows and frames, and what is wrong with it; without one if the rows cannot be read."""

    def __init__(
        self, metadata: Metadata, chosen: NDArray[np.bool_] | None, cameras: list[str], match: Match, depth: Depth
    ) -> None:
        self._metadata = metadata
        self.rows: Rows | None = None
        self.match: FrameMatch | None = None
        self.mismatches: list[Mismatch] = []
        with contextlib.suppress(UserError):  # `check_data_file` reports what is wrong with them.
            self.rows = read_rows(metadata, (), chosen)
        if self.rows is not None and cameras and depth != "fast":
            self.match = FrameMatch(self.rows, cameras, match)
            self.mismatches = self.match.mismatches(np.ones(len(self.rows.places), np.bool_))

    @property
    def agree(self) -> bool:
        """Whether every row's frame is known to be right, whatever the dataset's clock is."""
        return self.match is not None and not self.mismatches

    @property
    def wrong(self) -> set[Path]:
        """The files that can be decoded but have a mismatch."""
        return {one.path for one in self.mismatches if one.kind != "damaged_video"}

    def findings(self, damage: Damage) -> Iterator[FileFinding]:
        """The mismatches, without those that follow from wrong times of rows, which are found already."""
        late = {finding.episode for finding in damage.listed if finding.kind == "wrong_timestamp"}
        for one in self.mismatches:
            known = one.kind == "damaged_video" or (one.kind == "wrong_timestamp" and one.episode in late)
            if not known:
                name = one.path.relative_to(self._metadata.root).as_posix()
                yield FileFinding(one.kind, one.message, name, one.episode, one.frame)


def number_columns(metadata: Metadata) -> list[str]:
    """The numeric columns other than the index columns."""
    names = [name for name, feature in metadata.features.items() if feature["dtype"].startswith(NUMBERS)]
    return [name for name in names if name not in ("index", "episode_index", "frame_index", "timestamp", "task_index")]


def _tasks(
    metadata: Metadata, cameras: Sequence[str], vectors: Sequence[str], depth: Depth, frames: _Frames, reads: Reading
) -> list[Callable[[], Iterable[FileFinding]]]:
    """One call per file and kind of content."""
    order = np.argsort(metadata.data_file, kind="stable")
    stops = np.cumsum(np.bincount(metadata.data_file, minlength=len(metadata.data_files)))
    files = list(zip(metadata.data_files, np.split(order, stops[:-1]), strict=True))
    tasks: list[Callable[[], Iterable[FileFinding]]] = [
        partial(check_data_file, metadata, *one, vectors, clock="other_clock" if frames.agree else "wrong_timestamp")
        for one in files
    ]
    if depth == "fast":
        return tasks
    full = depth == "full"
    images = [name for name in cameras if metadata.features[name]["dtype"] == "image"]
    if images:
        tasks += [partial(check_images, metadata, images, *one, full=full, reads=reads) for one in files]
    if any(metadata.video_files.get(camera) for camera in cameras):
        reads = replace(reads, decoder=VideoReader(decoder=reads.decoder).decoder)
    for camera in cameras:
        held: dict[Path, list[int]] = {}
        for i, path in enumerate(metadata.video_files.get(camera, ())):
            held.setdefault(path, []).append(i)
        tasks += [
            partial(check_video, metadata, camera, path, held_there, full=full, reads=reads, match=frames.match)
            for path, held_there in held.items()
            if path not in frames.wrong
        ]
    return tasks
