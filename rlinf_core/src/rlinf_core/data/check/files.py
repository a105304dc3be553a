"""Check the files of a LeRobot dataset and report all damage, where the reader stops at the first.

Three depths: `fast` reads the metadata and all numbers; `ends` also checks that every image is present and decodes the
first and last frame of each episode; `full` decodes every frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from rlinf_core.data.check.findings import Damage, FileFinding
from rlinf_core.data.check.numbers import check_data_file, check_metadata, check_missing, check_unlisted
from rlinf_core.data.check.pictures import Reading, check_images, check_video
from rlinf_core.data.images.video import VideoReader
from rlinf_core.data.lerobot.metadata import NUMBERS, Metadata

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
        reads: How images will be read; None: as `Reading()` says.
        progress: Called with the number of finished files and the number of all files.

    Raises:
        UserError: The named video decoder does not load.
    """
    damage = Damage()
    damage.add(check_metadata(metadata))
    damage.add(check_missing(metadata, metadata.files(cameras)))
    if local:
        damage.add(check_unlisted(metadata))
    tasks = _tasks(metadata, cameras, vectors, depth, reads or Reading())
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            for done, found in enumerate(pool.map(lambda task: list(task()), tasks), 1):
                damage.add(found)
                progress(done, len(tasks))
        finally:
            pool.shutdown(cancel_futures=True)
    return damage


def number_columns(metadata: Metadata) -> list[str]:
    """The numeric columns other than the index columns."""
    names = [name for name, feature in metadata.features.items() if feature["dtype"].startswith(NUMBERS)]
    return [name for name in names if name not in ("index", "episode_index", "frame_index", "timestamp", "task_index")]


def _tasks(
    metadata: Metadata, cameras: Sequence[str], vectors: Sequence[str], depth: Depth, reads: Reading
) -> list[Callable[[], Iterable[FileFinding]]]:
    """One call per file and kind of content."""
    order = np.argsort(metadata.data_file, kind="stable")
    stops = np.cumsum(np.bincount(metadata.data_file, minlength=len(metadata.data_files)))
    files = list(zip(metadata.data_files, np.split(order, stops[:-1]), strict=True))
    tasks: list[Callable[[], Iterable[FileFinding]]] = [
        partial(check_data_file, metadata, *one, vectors) for one in files
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
        tasks += [partial(check_video, metadata, camera, *one, full=full, reads=reads) for one in held.items()]
    return tasks
