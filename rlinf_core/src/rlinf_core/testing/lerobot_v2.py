"""Convert v3.0 LeRobot datasets to formats v2.0 and v2.1, without re-encoding anything.

Every episode gets its own data file and video files, with the same rows and packets: numbers, PNG bytes and decoded
frames are identical in all formats.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from rlinf_core.data.lerobot.metadata import Metadata, load_metadata

DATA_PATH = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
VIDEO_PATH = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"


def write_v2(source: Path, target: Path, version: Literal["v2.0", "v2.1"], chunks_size: int = 1000) -> None:
    """Write a dataset in an older format.

    Args:
        source: Folder of the v3.0 dataset.
        target: Folder to write; it must not exist.
        version: v2.0 has statistics of the whole dataset, v2.1 of each episode.
        chunks_size: Episodes per folder.
    """
    metadata = load_metadata(str(source), source)
    (target / "meta").mkdir(parents=True)
    data = [pq.read_table(path) for path in metadata.data_files]
    rows = pa.concat_tables(data)
    for i, episode in enumerate(metadata.episodes.tolist()):
        keys = {"episode_chunk": episode // chunks_size, "episode_index": episode}
        path = target / DATA_PATH.format(**keys)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(rows.slice(metadata.starts[i], metadata.lengths[i]), path)
        for key in metadata.video_files:
            path = target / VIDEO_PATH.format(**keys, video_key=key)
            path.parent.mkdir(parents=True, exist_ok=True)
            start = metadata.video_starts[key][i]
            _cut(metadata.video_files[key][i], path, start, start + metadata.lengths[i] / metadata.fps)
    _write_meta(metadata, target, version, chunks_size)


def _write_meta(metadata: Metadata, target: Path, version: str, chunks_size: int) -> None:
    info = json.loads((metadata.root / "meta" / "info.json").read_text(encoding="utf-8"))
    for key in ("data_files_size_in_mb", "video_files_size_in_mb"):
        info.pop(key, None)
    count, videos = len(metadata.episodes), metadata.columns_of("video")
    info |= {"codebase_version": version, "chunks_size": chunks_size, "total_chunks": -(-count // chunks_size)}
    info |= {"data_path": DATA_PATH, "video_path": VIDEO_PATH if videos else None, "total_videos": count * len(videos)}
    (target / "meta" / "info.json").write_text(json.dumps(info, indent=4), encoding="utf-8")
    tasks = [{"task_index": number, "task": text} for number, text in metadata.task_texts.items()]
    _write_lines(target / "meta" / "tasks.jsonl", tasks)
    paths = sorted((metadata.root / "meta" / "episodes").glob("*/*.parquet"))
    described = pa.concat_tables([pq.read_table(path) for path in paths]).sort_by("episode_index").to_pylist()
    keys = ("episode_index", "tasks", "length")
    _write_lines(target / "meta" / "episodes.jsonl", [{key: one[key] for key in keys} for one in described])
    if version == "v2.0":
        stats = (metadata.root / "meta" / "stats.json").read_text(encoding="utf-8")
        (target / "meta" / "stats.json").write_text(stats, encoding="utf-8")
    else:
        lines = [{"episode_index": one["episode_index"], "stats": _statistics(one)} for one in described]
        _write_lines(target / "meta" / "episodes_stats.jsonl", lines)


def _statistics(described: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`stats/<column>/<statistic>` -> column -> statistic."""
    stats: dict[str, dict[str, Any]] = {}
    for key, value in described.items():
        if key.startswith("stats/"):
            column, _, statistic = key.removeprefix("stats/").rpartition("/")
            stats.setdefault(column, {})[statistic] = value
    return stats


def _write_lines(path: Path, values: list[Any]) -> None:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")


def _cut(source: Path, target: Path, start: float, stop: float) -> None:
    """Copy the packets from `start` to `stop` seconds of a concatenated video to a file that starts at 0."""
    import av

    with av.open(str(source)) as whole, av.open(str(target), "w") as part:
        video: Any = whole.streams.video[0]
        copied = part.add_stream_from_template(video, opaque=True)
        first, end = round(start / video.time_base), round(stop / video.time_base)
        packets: Iterator[Any] = whole.demux(video)
        for packet in packets:
            if packet.pts is not None and first <= packet.pts + 1 < end:  # One tick of tolerance for rounding.
                packet.pts -= first
                packet.dts -= first
                packet.stream = copied
                part.mux(packet)
