"""Write a copy of a LeRobot dataset whose metadata agree with its files; the original is not touched.

The copy has its own `meta/`, and links to the original's other folders. Corrected are the numbers that follow from the
files: counts in `meta/info.json`, the lengths of episodes, the rows and files that hold them and, where a video has
exactly one frame per row, the times at which episodes start in it. Episodes without rows are left out.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rlinf_core.data.lerobot.columns import numbers_of
from rlinf_core.data.lerobot.files import INFO, data_files_below, read_json, read_parquet
from rlinf_core.data.lerobot.frame_match import read_grid, video_files
from rlinf_core.data.lerobot.metadata import Metadata
from rlinf_core.errors import UserError
from rlinf_core.untrusted.text import read_text


@dataclass(frozen=True)
class Held:
    """An episode's rows in the data files."""

    path: Path
    rows: int


def repair(metadata: Metadata, target: Path) -> list[str]:
    """Write the copy.

    Args:
        metadata: The dataset's, from `read_metadata`.
        target: The folder to write; it must not exist.

    Returns:
        What was corrected, a line each; empty if nothing was, and then nothing is written.

    Raises:
        UserError: The folder exists or cannot be written, or an episode's rows are damaged.
    """
    if target.exists() or target.is_symlink():
        raise UserError(f"--repair {target}: it exists; name a new folder for the copy")
    held = _scan(metadata)
    there = np.array([episode in held for episode in metadata.episodes.tolist()], np.bool_)
    if not there.any():
        raise UserError(f"{metadata.root}: no data file holds rows of any episode that meta/ lists")
    fixed = _with_starts(_with_files(metadata.only(there), held))
    changes = [*_changes(metadata, fixed, there)]
    if not changes:
        return []
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        shutil.copytree(metadata.root / "meta", aside / "meta")
        _write_episodes(metadata, fixed, aside)
        _write_info(fixed, aside / INFO)
        for path in sorted(metadata.root.iterdir()):
            if path.name != "meta" and not path.name.startswith("."):
                (aside / path.name).symlink_to(path.resolve(), target_is_directory=path.is_dir())
        aside.rename(target)
    except OSError as error:
        raise UserError(f"--repair {target} cannot be written: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return changes


def _scan(metadata: Metadata) -> dict[int, Held]:
    """Every episode's rows, which must be in one file and numbered from 0 without gaps."""
    held: dict[int, Held] = {}
    for path in data_files_below(metadata.root / "data"):
        table = read_parquet(path, ["episode_index", "frame_index"], ["frame_index"])
        episode = numbers_of(table["episode_index"], f"{path}: 'episode_index'").astype(np.int64)
        for number in np.unique(episode).tolist():
            at = np.flatnonzero(episode == number)
            if "frame_index" in table.column_names:
                frame = numbers_of(table["frame_index"], f"{path}: 'frame_index'")[at]
                if not np.array_equal(frame, np.arange(len(at))):
                    raise UserError(
                        f"{path}: the frames of episode {number} are not numbered 0 to {len(at) - 1} in their order, "
                        "which cannot be repaired: write or convert that episode again, or leave it out with "
                        f"data.exclude_episodes = [{number}]"
                    )
            if number in held:
                raise UserError(
                    f"episode {number} has rows in {held[number].path} and in {path}, which cannot be repaired: remove "
                    "the file that does not belong"
                )
            held[number] = Held(path, len(at))
    return held


def _with_files(metadata: Metadata, held: dict[int, Held]) -> Metadata:
    """The metadata with the lengths and the data files that were found."""
    found = [held[episode] for episode in metadata.episodes.tolist()]
    files = tuple(sorted({one.path for one in found}))
    stops = np.cumsum([one.rows for one in found], dtype=np.int64)
    return replace(
        metadata,
        starts=stops - np.array([one.rows for one in found], np.int64),
        stops=stops,
        data_files=files,
        data_file=np.array([files.index(one.path) for one in found]),
        total_episodes=len(found),
        frames=int(stops[-1]),
    )


def _with_starts(metadata: Metadata) -> Metadata:
    """The metadata with the episodes' starts in videos that have exactly one frame per row."""
    starts = {camera: values.copy() for camera, values in metadata.video_starts.items()}
    for camera in starts:
        for path, file in video_files(metadata, camera).items():
            if not path.is_file():
                continue
            grid = read_grid(path)
            if grid.count == int(file.lengths.sum()):
                exact = grid.seconds(file.firsts)
                wrong = np.abs(exact - file.starts) > 0.1 / metadata.fps
                starts[camera][file.places[wrong]] = exact[wrong]
    return replace(metadata, video_starts=starts)


def _changes(before: Metadata, after: Metadata, there: NDArray[np.bool_]) -> list[str]:
    """What differs, a line each."""
    kept = before.only(there)

    def episodes(flags: NDArray[np.bool_]) -> str:
        numbers = after.episodes[flags].tolist()
        return f"{len(numbers)} episode{'s' * (len(numbers) > 1)}, first {numbers[0]}"

    lines = []
    if not there.all():
        numbers = ", ".join(map(str, before.episodes[~there].tolist()))
        lines.append(f"episodes without rows are left out: {numbers}")
    for what, now, was in (
        ("total_episodes", after.total_episodes, before.total_episodes),
        ("total_frames", after.frames, before.frames),
    ):
        if now != was:
            lines.append(f"{INFO}: {what} is {now} instead of {was}")
    pairs = zip(kept.data_file.tolist(), after.data_file.tolist(), strict=True)
    moved = np.array([kept.data_files[a] != after.data_files[b] for a, b in pairs])
    starts = after.video_starts
    for what, flags in (
        ("length", kept.lengths != after.lengths),
        ("position among all rows", (kept.starts != after.starts) & (kept.lengths == after.lengths)),
        ("data file", moved),
        *((f"start in the video of {name!r}", kept.video_starts[name] != starts[name]) for name in starts),
    ):
        if flags.any():
            lines.append(f"{what}: corrected for {episodes(flags)}")
    return lines


def _write_info(metadata: Metadata, path: Path) -> None:
    info: dict[str, Any] = read_json(path)
    counts = {"total_episodes": metadata.total_episodes, "total_frames": metadata.frames}
    path.write_text(json.dumps(info | counts, indent=4, ensure_ascii=False), encoding="utf-8")


def _write_episodes(before: Metadata, after: Metadata, folder: Path) -> None:
    place = {episode: i for i, episode in enumerate(after.episodes.tolist())}
    if before.version != "v3.0":
        path = folder / "meta" / "episodes.jsonl"
        listed = [json.loads(line) for line in read_text(path).split("\n") if line.strip()]
        kept = [one for one in listed if one["episode_index"] in place]
        lines = [one | {"length": int(after.lengths[place[one["episode_index"]]])} for one in kept]
        path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in lines), encoding="utf-8")
        return
    for path in data_files_below(folder / "meta" / "episodes"):
        table = read_parquet(path)
        table = table.filter(pa.array([episode in place for episode in table["episode_index"].to_pylist()]))
        at = np.array([place[episode] for episode in table["episode_index"].to_pylist()], np.int64)
        for name, values in _columns(after).items():
            if name in table.column_names:
                number = table.column_names.index(name)
                column = pa.array(values[at]).cast(table.schema.field(name).type)
                table = table.set_column(number, table.schema.field(name), column)
        pq.write_table(table, path)


def _columns(metadata: Metadata) -> dict[str, NDArray[Any]]:
    """The columns of `meta/episodes` that may be corrected, [episodes] each."""
    places = np.array([_numbers_of_file(path) for path in metadata.data_files])[metadata.data_file]
    columns: dict[str, NDArray[Any]] = {
        "length": metadata.lengths,
        "dataset_from_index": metadata.starts,
        "dataset_to_index": metadata.stops,
        "data/chunk_index": places[:, 0],
        "data/file_index": places[:, 1],
    }
    for camera, starts in metadata.video_starts.items():
        columns[f"videos/{camera}/from_timestamp"] = starts
        columns[f"videos/{camera}/to_timestamp"] = starts + metadata.lengths / metadata.fps
    return columns


def _numbers_of_file(path: Path) -> tuple[int, int]:
    """The numbers of folder and file in `chunk-000/file-001.parquet`."""
    folder, name = path.parent.name.rpartition("-")[2], path.stem.rpartition("-")[2]
    if not (folder.isdigit() and name.isdigit()):
        raise UserError(f"{path} has no numbers in its path, by which meta/episodes could name it")
    return int(folder), int(name)
