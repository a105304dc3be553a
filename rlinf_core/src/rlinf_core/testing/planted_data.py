"""Copies of a dataset's episodes with a mistake planted in them, for `rlinf_core.testing.triage`.

An episode is read through the config of a policy, so that a mistake knows what is a camera, the state and the action,
and written again in LeRobot's v3.0 layout under the dataset's own column names, images as PNG.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rlinf_core.contract.datasets import LeRobotDatasetConfig, NamingSource, SampleSource, TimedSource
from rlinf_core.errors import UserError

CHUNK = "chunk-000/file-000.parquet"


@dataclass(frozen=True, eq=False)
class Episode:
    """One episode."""

    images: Mapping[str, NDArray[np.uint8]]
    """Image column -> [N, height, width, 3]."""
    state: NDArray[np.float32]
    """[N, D], all state columns."""
    actions: NDArray[np.float32]
    """[N, A], all action columns."""
    task: str

    def at(self, frames: NDArray[np.int64]) -> Episode:
        """Some of its frames."""
        images = {column: one[frames] for column, one in self.images.items()}
        return replace(self, images=images, state=self.state[frames], actions=self.actions[frames])


Mistake = Callable[[Episode], Episode]


@dataclass(frozen=True)
class Layout:
    """The columns of a dataset, and its rate."""

    state: Mapping[str, int]
    """Column -> its width."""
    actions: Mapping[str, int]
    names: Mapping[str, Sequence[str]]
    """Column -> names of its numbers."""
    fps: float


def read_episodes(data: LeRobotDatasetConfig, source: SampleSource, most: int) -> tuple[list[Episode], Layout]:
    """Read evenly spread episodes whole.

    Args:
        data: Names the columns.
        source: The rows.
        most: Episodes to read, at most.
    """
    numbers = np.unique(source.episodes)
    chosen = numbers[np.unique(np.linspace(0, len(numbers) - 1, min(most, len(numbers))).round().astype(np.int64))]
    episodes = []
    widths: dict[str, int] = {}
    for number in chosen.tolist():
        rows = source.__getitems__(np.flatnonzero(source.episodes == number).tolist())
        state = [np.stack([np.atleast_1d(row[column]) for row in rows]) for column in data.state]
        actions = [np.stack([row[column][0] for row in rows]) for column in data.actions]
        columns = (*data.state, *data.actions)
        widths |= {column: one.shape[1] for column, one in zip(columns, (*state, *actions), strict=True)}
        images = {column: np.stack([row[column] for row in rows]) for column in dict.fromkeys(data.images.values())}
        empty = np.zeros((len(rows), 0), np.float32)
        whole = np.concatenate([empty, *state], 1), np.concatenate(actions, 1)
        episodes.append(Episode(images, *whole, str(rows[0].get("task", ""))))
    names = source.names_of if isinstance(source, NamingSource) else lambda columns: ()
    seconds = source.step_seconds() if isinstance(source, TimedSource) else 0.1
    return episodes, Layout(
        {column: widths[column] for column in data.state},
        {column: widths[column] for column in data.actions},
        {column: names((column,)) for column in widths},
        data.stride / seconds,
    )


def write_episodes(root: Path, episodes: Sequence[Episode], layout: Layout) -> Path:
    """Write a dataset in LeRobot's v3.0 layout.

    Args:
        root: The folder, which must not exist.
        episodes: At least one.
        layout: Its columns.

    Raises:
        UserError: The folder exists.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if root.exists():
        raise UserError(f"{root} already exists: name another --output, or remove it")
    tasks = list(dict.fromkeys(one.task for one in episodes))
    table: dict[str, Any] = {column: [] for column in (*layout.state, *layout.actions, *episodes[0].images)}
    counts = [len(one.actions) for one in episodes]
    for one in episodes:
        for matrix, widths in ((one.state, layout.state), (one.actions, layout.actions)):
            start = 0
            for column, width in widths.items():
                table[column] += matrix[:, start : start + width].astype(np.float32).tolist()
                start += width
        for column, images in one.images.items():
            table[column] += [{"bytes": _png(image), "path": None} for image in images]
    places = [(e, f) for e, count in enumerate(counts) for f in range(count)]
    vectors = pa.list_(pa.float32())
    columns = {name: pa.array(values, vectors if name in layout.names else None) for name, values in table.items()}
    columns |= {
        "index": pa.array(range(len(places))),
        "episode_index": pa.array([e for e, _ in places]),
        "frame_index": pa.array([f for _, f in places]),
        "timestamp": pa.array([f / layout.fps for _, f in places], pa.float32()),
        "task_index": pa.array([tasks.index(episodes[e].task) for e, _ in places]),
    }
    stops = np.cumsum(counts)
    listed = {
        "episode_index": list(range(len(counts))),
        "tasks": [[one.task] for one in episodes],
        "length": counts,
        "dataset_from_index": (stops - counts).tolist(),
        "dataset_to_index": stops.tolist(),
        "data/chunk_index": [0] * len(counts),
        "data/file_index": [0] * len(counts),
    }
    for folder in ("meta/episodes/chunk-000", "data/chunk-000"):
        (root / folder).mkdir(parents=True)
    pq.write_table(pa.table(columns), root / f"data/{CHUNK}")
    pq.write_table(pa.table(listed), root / f"meta/episodes/{CHUNK}")
    pq.write_table(pa.table({"task_index": range(len(tasks)), "task": tasks}), root / "meta/tasks.parquet")
    (root / "meta/info.json").write_text(json.dumps(_info(episodes, layout, len(tasks)), indent=1) + "\n")
    (root / "meta/stats.json").write_text("{}\n")
    return root


def _info(episodes: Sequence[Episode], layout: Layout, tasks: int) -> dict[str, Any]:
    features: dict[str, Any] = {
        column: {"dtype": "image", "shape": list(images.shape[1:]), "names": ["height", "width", "channels"]}
        for column, images in episodes[0].images.items()
    }
    for column, width in {**layout.state, **layout.actions}.items():
        names = list(layout.names.get(column, ())) or None
        features[column] = {"dtype": "float32", "shape": [width], "names": names}
    for column, dtype in (
        *(("timestamp", "float32"), ("frame_index", "int64"), ("episode_index", "int64")),
        *(("index", "int64"), ("task_index", "int64")),
    ):
        features[column] = {"dtype": dtype, "shape": [1], "names": None}
    fps = round(layout.fps) if abs(layout.fps - round(layout.fps)) < 1e-6 else layout.fps
    return {
        "codebase_version": "v3.0",
        "fps": fps,
        "features": features,
        "total_episodes": len(episodes),
        "total_frames": sum(len(one.actions) for one in episodes),
        "total_tasks": tasks,
        "chunks_size": 1000,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": None,
        "splits": {"train": f"0:{len(episodes)}"},
    }


def _png(image: NDArray[np.uint8]) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(out, "PNG", compress_level=1)
    return out.getvalue()
