"""Check the metadata and the numeric columns of a LeRobot dataset; see `check.files`.

Every function continues after a problem if it can, and reports them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rlinf_core.data.check.findings import FileFinding, FindingKind
from rlinf_core.data.lerobot.columns import INDEX_COLUMNS, check_numeric, vectors_of, width_of
from rlinf_core.data.lerobot.files import INFO
from rlinf_core.data.lerobot.metadata import Metadata
from rlinf_core.data.lerobot.rows import DERIVED, Rows
from rlinf_core.errors import UserError
from rlinf_core.untrusted.parquet import open_parquet, read_table
from rlinf_core.untrusted.text import not_a_file

Numbers = dict[str, NDArray[np.float64]]
"""Index column -> [rows of a file]; exact to 2^53."""


def check_metadata(metadata: Metadata) -> Iterator[FileFinding]:
    """Check counts, lengths and the presence of statistics."""
    listed = "meta/episodes" if metadata.version == "v3.0" else "meta/episodes.jsonl"
    numbers, count = np.unique(metadata.episodes, return_counts=True)
    for episode in numbers[count > 1].tolist():
        yield FileFinding("wrong_count", "the episode is listed more than once", listed, episode)
    if len(numbers) != metadata.total_episodes:
        what = f"{INFO} counts {metadata.total_episodes} episodes, {listed} lists {len(numbers)}"
        yield FileFinding("wrong_count", what, INFO)
    if metadata.lengths.sum() != metadata.frames:
        what = f"{INFO} counts {metadata.frames} frames, the episodes of {listed} have {metadata.lengths.sum()}"
        yield FileFinding("wrong_count", what, INFO)
    for i in np.flatnonzero(metadata.starts != metadata.firsts)[:1].tolist():
        what = f"starts at row {metadata.starts[i]}, by the lengths before it at {metadata.firsts[i]}: it is not used"
        yield FileFinding("stale_pointer", what, listed, int(metadata.episodes[i]))
    for episode in metadata.episodes[metadata.lengths <= 0].tolist():
        yield FileFinding("empty_episode", "the episode has no frames", listed, episode)
    for camera in metadata.video_files:
        for before, i in metadata.overlapping(camera):
            what = f"its frames in the video of {camera!r} overlap with episode {metadata.episodes[before]}"
            yield FileFinding("wrong_timestamp", what, listed, int(metadata.episodes[i]))
    stats = metadata.root / "meta" / ("episodes_stats.jsonl" if metadata.version == "v2.1" else "stats.json")
    if not stats.is_file():
        what = "is missing: lerobot needs it, rlinf computes its own statistics"
        yield FileFinding("no_statistics", what, f"meta/{stats.name}")


def located(metadata: Metadata, rows: Rows) -> tuple[Metadata, list[FileFinding]]:
    """The metadata with the data files in which the rows are, and notes where `meta/` names others.

    Args:
        metadata: Of the episodes to check.
        rows: All their rows.
    """
    numbers = rows.metadata.episodes[rows.places]
    file_of = {int(n): rows.file_of(start)[0] for n, start in zip(numbers, rows.starts.tolist(), strict=True)}
    data_file, notes = metadata.data_file.copy(), dict[tuple[Path, Path], list[int]]()
    files = (*metadata.data_files, *(path for path in rows.files if path not in metadata.data_files))
    index = {path: number for number, path in enumerate(files)}
    for i, episode in enumerate(metadata.episodes.tolist()):
        if episode in file_of:
            data_file[i] = index[rows.files[file_of[episode]]]
            if data_file[i] != metadata.data_file[i]:
                notes.setdefault((files[metadata.data_file[i]], files[data_file[i]]), []).append(episode)
    found = [
        FileFinding(
            "stale_pointer",
            f"{_name(metadata, named)} is named for {len(episodes)} episode{'s' * (len(episodes) > 1)} whose rows are "
            f"in {_name(metadata, there)}: rows are found where they are",
            "meta/episodes" if metadata.version == "v3.0" else INFO,
            episodes[0],
        )
        for (named, there), episodes in notes.items()
    ]
    return replace(metadata, data_files=files, data_file=data_file), found


def check_unlisted(metadata: Metadata, used: Metadata) -> Iterator[FileFinding]:
    """Report files that no episode uses; `used` has the files in which the rows of the checked episodes are."""
    known = {*metadata.files(metadata.video_files), *used.data_files}
    for folder, pattern in (("data", "*.parquet"), ("videos", "*.mp4")):
        paths = (path for path in (metadata.root / folder).rglob(pattern) if not path.name.startswith("."))
        for path in sorted({*paths} - known):
            yield FileFinding("unlisted_file", "no episode in meta/ uses this file", _name(metadata, path))


def check_missing(metadata: Metadata, paths: Sequence[Path]) -> Iterator[FileFinding]:
    """Report missing data and video files."""
    missing = [path for path in paths if not path.is_file()]
    held: dict[Path, list[int]] = {path: [] for path in missing}
    files = (tuple(metadata.data_files[i] for i in metadata.data_file), *metadata.video_files.values())
    for path_of in files if missing else ():
        for episode, path in zip(metadata.episodes.tolist(), path_of, strict=True):
            if path in held:
                held[path].append(episode)
    for path, episodes in held.items():
        what = "the link is broken" if path.is_symlink() else "the file is missing"
        if path.exists():
            what = f"is {not_a_file(path.stat())}, not a file"
        yield FileFinding("missing_file", what + _holding(episodes), _name(metadata, path))


def check_data_file(
    metadata: Metadata,
    path: Path,
    held: NDArray[np.int64],
    vectors: Sequence[str],
    *,
    clock: FindingKind = "wrong_timestamp",
) -> list[FileFinding]:
    """Check one data file: counts, indices, timestamps, tasks, and the values of some columns.

    Args:
        metadata: The dataset's metadata.
        path: The file.
        held: Indices of the episodes that it should contain.
        vectors: Columns to check besides the index columns.
        clock: The kind of a finding about times that are not frame / fps.
    """
    if not path.is_file() or not len(held):
        return []
    name = _name(metadata, path)
    wanted = [*INDEX_COLUMNS, *vectors]
    try:
        with open_parquet(path) as file:
            names = file.schema_arrow.names
            there = [column for column in wanted if names.count(column) == 1]
            table = read_table(file, path, there)
    except (OSError, pa.ArrowException, UserError) as error:
        return [FileFinding("unreadable_file", _line(error) + _holding(metadata.episodes[held].tolist()), name)]
    found = [_lacks(one, name, twice=one in names) for one in wanted if one not in there]
    indices: Numbers = {}
    for column in INDEX_COLUMNS:
        if column in there:
            try:
                indices[column] = _numbers(table[column])
            except (UserError, ValueError, pa.ArrowException) as error:
                found.append(FileFinding("wrong_shape", f"{column!r} is not a numeric column: {_line(error)}", name))
    if "episode_index" in indices:
        found += _check_counts(metadata, held, name, indices["episode_index"])
        found += _check_indices(metadata, name, indices, clock)
        for column in vectors:
            if column in there:
                found += _check_vectors(metadata, name, column, table[column], indices["episode_index"])
    return found


def _lacks(column: str, name: str, *, twice: bool) -> FileFinding:
    """The finding for a column that a file lacks or has twice."""
    if twice:
        return FileFinding("missing_column", f"has two columns {column!r}", name)
    if column in DERIVED:
        return FileFinding("derived_column", f"has no column {column!r}, which follows from the order of rows", name)
    return FileFinding("missing_column", f"has no column {column!r}", name)


def _check_counts(
    metadata: Metadata, held: NDArray[np.int64], name: str, episode: NDArray[np.float64]
) -> Iterator[FileFinding]:
    """Check the number of rows of each episode in the file."""
    lengths = dict(zip(metadata.episodes[held].tolist(), metadata.lengths[held].tolist(), strict=True))
    there = dict(zip(*(part.tolist() for part in np.unique(episode, return_counts=True)), strict=True))
    for one, length in lengths.items():
        if there.get(one, 0) != length:
            yield FileFinding(
                "wrong_count", f"has {there.get(one, 0)} rows of the episode, meta/ says {length}", name, one
            )
    for one in there.keys() - lengths.keys():
        what = f"has {there[one]} rows of an episode that does not belong in this file according to meta/"
        yield FileFinding("wrong_index", what, name, int(one))


def _check_indices(metadata: Metadata, name: str, indices: Numbers, clock: FindingKind) -> Iterator[FileFinding]:
    """Report the first wrong frame per column and episode."""
    episode = indices["episode_index"]
    first = np.flatnonzero(np.diff(episode, prepend=np.nan) != 0)  # The first row of each episode.
    begins = np.repeat(first, np.diff(first, append=len(episode)))
    place: NDArray[np.float64] = (np.arange(len(episode)) - begins).astype(np.float64)
    frame = indices.get("frame_index", place)
    for at in _first_of_each(frame != place, episode):
        what = f"frame_index is {frame[at]:g}: a frame is missing, duplicated or out of order"
        yield FileFinding("wrong_index", what, name, int(episode[at]), int(place[at]))
    if "index" in indices:
        at_first = dict(zip(metadata.episodes.tolist(), metadata.firsts.tolist(), strict=True))
        expected = np.array([at_first.get(int(one), -1) for one in episode[first]])
        expected = np.repeat(expected, np.diff(first, append=len(episode))) + place
        for at in np.flatnonzero(indices["index"] != expected)[:1].tolist():
            what = f"index is {indices['index'][at]:g} instead of {expected[at]:g}: it is not used"
            yield FileFinding("stale_index", what, name, int(episode[at]), int(place[at]))
    if "timestamp" in indices:
        yield from _check_times(metadata, name, indices["timestamp"], frame, episode, place, clock)
    if "task_index" in indices:
        task = indices["task_index"]
        for at in _first_of_each(~np.isin(task, list(metadata.task_texts)), episode):
            what = f"has task_index {task[at]:g}, which meta/ does not list"
            yield FileFinding("unknown_task", what, name, int(episode[at]), int(place[at]))


def _check_times(
    metadata: Metadata,
    name: str,
    time: NDArray[np.float64],
    frame: NDArray[np.float64],
    episode: NDArray[np.float64],
    place: NDArray[np.float64],
    clock: FindingKind = "wrong_timestamp",
) -> Iterator[FileFinding]:
    """Check that times are frame / fps, within a tenth of a frame and float32 rounding, which grows with time."""
    expected = frame / metadata.fps
    slack = 0.1 / metadata.fps + 1e-6 * expected
    back = np.diff(time, prepend=np.inf) <= 0
    back[place == 0] = False
    # A wrong frame_index is a separate finding: accept a time that matches the row's position.
    off = ~((np.abs(time - expected) <= slack) | (np.abs(time - place / metadata.fps) <= slack))
    for at in _first_of_each(back | off, episode):
        what = f"timestamp is {time[at]:.4f} s, but frame / fps is {expected[at]:.4f} s"
        if back[at]:
            what += f", and the previous timestamp is {time[at - 1]:.4f} s"
        kind: FindingKind = "wrong_timestamp" if back[at] else clock
        yield FileFinding(kind, what, name, int(episode[at]), int(place[at]))


def _check_vectors(
    metadata: Metadata, name: str, column: str, values: pa.ChunkedArray, episode: NDArray[np.float64]
) -> Iterator[FileFinding]:
    """Check a column's type and width; one finding per episode that contains NaN or infinity."""
    try:
        numbers = vectors_of(values, width_of(metadata.features[column]), repr(column))
    except (UserError, ValueError, pa.ArrowException) as error:
        yield FileFinding("wrong_shape", _line(error), name)
        return
    wrong: NDArray[np.bool_] = ~np.asarray(np.isfinite(numbers).all(axis=1))
    first = np.flatnonzero(np.diff(episode, prepend=np.nan) != 0)
    for at in _first_of_each(wrong, episode):
        count = int(wrong[episode == episode[at]].sum())
        what = f"{column!r} contains NaN or infinity in {count} frame{'s' * (count > 1)} of the episode"
        frame = at - int(first[np.searchsorted(first, at, side="right") - 1])
        yield FileFinding("not_finite", what, name, int(episode[at]), frame)


def _first_of_each(flags: NDArray[np.bool_], episode: NDArray[np.float64]) -> list[int]:
    """The first flagged row of each episode."""
    rows = np.flatnonzero(flags)
    first: list[int] = rows[np.unique(episode[rows], return_index=True)[1]].tolist()
    return first


def _numbers(column: pa.ChunkedArray) -> NDArray[np.float64]:
    if column.null_count:
        raise UserError("it has missing values")
    if pa.types.is_nested(column.type):
        return vectors_of(column, 1, "a row").reshape(-1).astype(np.float64)
    check_numeric(column.type, "it")
    numbers: NDArray[np.float64] = column.to_numpy().astype(np.float64)
    if not np.isfinite(numbers).all():
        raise UserError("it contains NaN or infinity")
    return numbers


def _holding(episodes: Sequence[int]) -> str:
    """`"; it should contain episodes 3 to 7"`."""
    if not episodes:
        return ""
    few = f"episode {episodes[0]}" if len(episodes) == 1 else f"episodes {min(episodes)} to {max(episodes)}"
    return f"; it should contain {few}"


def _name(metadata: Metadata, path: Path) -> str:
    return path.relative_to(metadata.root).as_posix()


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
