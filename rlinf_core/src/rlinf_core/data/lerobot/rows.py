"""Find the rows of the chosen episodes in a dataset's data files, and read their numeric columns.

Rows are found by what the files hold, `episode_index` and `frame_index`, as lerobot finds them. The metadata say where
to look first; published datasets exist whose pointers are stale, so a row that is not there is looked for in the other
data files. Files that hold no chosen episode are not opened. Files are read in parallel: formats v2.x have one file per
episode, tens of thousands in the largest datasets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rlinf_core.data.lerobot.columns import INDEX_COLUMNS, numbers_of, vectors_of, width_of
from rlinf_core.data.lerobot.files import data_files_below, is_there, read_parquet
from rlinf_core.data.lerobot.metadata import Metadata
from rlinf_core.data.lerobot.prompts import PROMPT, TEXTS, joined_prompts, prompts_of, texts_of
from rlinf_core.data.lerobot.shared_memory import Columns, find_shared, share
from rlinf_core.errors import UserError

DERIVED = ("index", "frame_index", "timestamp")
"""Columns that follow from the order of an episode's rows if a file lacks them, as GR00T's datasets do."""
SEGMENTS = "rlinf_segments"
"""Beside the dataset's columns: int64 [S, 3], where runs of rows come from: first position, file, first row in it."""
READERS = 8
"""Files that are read in parallel."""

_in_use: WeakValueDictionary[object, Columns] = WeakValueDictionary()
"""Columns that a source in this process uses, by the state of their files."""


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of some episodes, ordered by episode and frame. A position counts these rows alone."""

    metadata: Metadata
    """The whole dataset's."""
    columns: Columns
    """Vectors float32 [N, D], `INDEX_COLUMNS` [N], and with `data.prompt_column` what `prompts` keeps."""
    places: NDArray[np.int64]
    """[E], the indices in the metadata's arrays of the episodes that have rows."""
    stops: NDArray[np.int64]
    """[E], the position after each episode's last row."""
    files: tuple[Path, ...]
    """The data files that were read."""
    segments: NDArray[np.int64]
    """See `SEGMENTS`."""

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """[E], the position of each episode's first row."""
        return self.stops - self.metadata.lengths[self.places]

    def episode_of(self, at: NDArray[np.int64]) -> NDArray[np.int64]:
        """The index in `places` of the episode at each position."""
        return np.searchsorted(self.stops, at, side="right")

    def absolute(self, at: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions among all frames of the dataset, which do not depend on the choice of episodes."""
        episode = self.episode_of(at)
        return at - self.starts[episode] + self.metadata.firsts[self.places[episode]]

    def file_of(self, at: int) -> tuple[int, int]:
        """The index in `files` of the file with a row, and the row's number in it."""
        first, file, row = self.segments[np.searchsorted(self.segments[:, 0], at, side="right") - 1].tolist()
        return file, row + at - first

    @property
    def prompts(self) -> NDArray[np.int64]:
        """[N], the number of each row's prompt in `prompt_texts`."""
        prompts: NDArray[np.int64] = self.columns[PROMPT if PROMPT in self.columns else "task_index"]
        return prompts

    @cached_property
    def prompt_texts(self) -> Mapping[int, str]:
        """The prompts by number: the dataset's tasks, or the texts of `data.prompt_column`."""
        return texts_of(self.columns, self.metadata)

    def describe(self, at: int) -> str:
        """File, episode and frame of a row, for messages."""
        episode, frame = (int(self.columns[name][at]) for name in ("episode_index", "frame_index"))
        return f"{self.files[self.file_of(at)[0]]}, episode {episode}, frame {frame}"


def read_rows(
    metadata: Metadata,
    names: Sequence[str],
    chosen: NDArray[np.bool_] | None = None,
    fetch: Callable[[Iterable[Path]], object] = lambda paths: None,
    prompt: str = "",
) -> Rows:
    """Read columns of the chosen episodes; the result is shared by all splits, and by processes if it is large.

    Args:
        metadata: The dataset's metadata.
        names: Columns of vectors, besides `INDEX_COLUMNS`, which are always read.
        chosen: [episodes], the episodes to read; None: all. Empty episodes have no rows.
        fetch: Downloads files that the folder lacks.
        prompt: `data.prompt_column`; empty: prompts are those of `task_index`.

    Raises:
        UserError: A file cannot be read, or its rows or the width of a vector differ from the metadata.
    """
    wanted = metadata.lengths > 0 if chosen is None else chosen & (metadata.lengths > 0)
    files = tuple(metadata.only(wanted).data_files)
    fetch(files)
    names = [*INDEX_COLUMNS, *dict.fromkeys(name for name in names if name not in INDEX_COLUMNS)]
    state = _state(metadata, names, wanted, files, prompt)
    columns = (_in_use.get(state) or find_shared(state)) if state else None
    if columns is None:
        rows = _read(metadata, names, wanted, files, fetch, prompt)
        if not state or rows.files != files:
            return rows
        columns = share(rows.columns, state)
    _in_use[state] = columns
    return _held(metadata, wanted, files, columns)


def _state(
    metadata: Metadata, names: Sequence[str], wanted: NDArray[np.bool_], files: Sequence[Path], prompt: str
) -> object:
    """Everything that the result depends on; None if a file is missing."""
    try:
        statuses = [path.stat() for path in files]
    except OSError:
        return None
    state = tuple((status.st_ino, status.st_size, status.st_mtime_ns) for status in statuses)
    described = (metadata.root.resolve(), metadata.lengths.tobytes(), metadata.episodes.tobytes(), wanted.tobytes())
    widths = tuple(width_of(metadata.features.get(name, {})) for name in names)
    return (*described, metadata.fps, tuple(names), widths, state, *([prompt] if prompt else []))


def _held(metadata: Metadata, wanted: NDArray[np.bool_], files: tuple[Path, ...], columns: Columns) -> Rows:
    places = np.flatnonzero(wanted)
    return Rows(metadata, columns, places, np.cumsum(metadata.lengths[places]), files, columns[SEGMENTS])


def _read(
    metadata: Metadata,
    names: Sequence[str],
    wanted: NDArray[np.bool_],
    files: tuple[Path, ...],
    fetch: Callable[[Iterable[Path]], object],
    prompt: str,
) -> Rows:
    """Read the files that the metadata name, then, if episodes are missing, the others that hold them."""
    numbers = metadata.episodes[wanted]
    read = partial(_read_file, metadata=metadata, names=names, numbers=numbers, prompt=prompt)
    there = [path for path in files if is_there(path)]
    parts = dict(zip(there, _in_parallel(read, there), strict=True))
    missing = _short(metadata, wanted, parts)
    if len(missing):
        found = _others(metadata, metadata.episodes[missing], set(parts), fetch)
        parts |= dict(zip(found, _in_parallel(read, found), strict=True))
        if len(still := _short(metadata, wanted, parts)):
            raise _incomplete(metadata, still, parts)
    used = tuple(path for path in (*files, *(p for p in parts if p not in files)) if path in parts)
    columns = Columns(_joined(metadata, names, [parts.pop(path) for path in used]).items())
    rows = _held(metadata, wanted, used, columns)
    _check_frames(rows)
    return rows


def _in_parallel[T](read: Callable[[Path], T], paths: Sequence[Path]) -> list[T]:
    with ThreadPoolExecutor(READERS) as pool:
        try:
            return list(pool.map(read, paths))
        finally:
            pool.shutdown(cancel_futures=True)


Part = dict[str, Any]
"""Columns of a file's chosen rows, and under `SEGMENTS` [rows] the number of each row in the file. Under `PROMPT` are
numbers of prompts, and under `TEXTS` their texts, or None if they are the dataset's tasks."""


def _read_file(
    path: Path, *, metadata: Metadata, names: Sequence[str], numbers: NDArray[np.int64], prompt: str
) -> Part:
    """The rows of some episodes in a file."""
    wanted = [*names, *([prompt] if prompt and prompt not in names else [])]
    table = read_parquet(path, wanted, DERIVED)
    episode = numbers_of(table["episode_index"], f"{path}: 'episode_index'")
    first, lengths = _runs_of(episode)  # Of millions of rows, only the first of each episode is looked up.
    mine = np.repeat(np.isin(episode[first], numbers), lengths)
    rows = np.flatnonzero(mine)
    if len(rows) < len(mine):
        table = table.filter(pa.array(mine))
    part: Part = {"episode_index": episode[rows].astype(np.int64), SEGMENTS: rows}
    for name in names:
        what = f"{path}: {name!r}"
        if name in INDEX_COLUMNS:
            if name != "episode_index" and name in table.column_names:
                part[name] = numbers_of(table[name], what)
        else:
            part[name] = vectors_of(table[name], width_of(metadata.features[name]), what)
    if prompt:
        part[PROMPT], part[TEXTS] = prompts_of(table[prompt], f"{path}: {prompt!r}")
    return part


def _short(metadata: Metadata, wanted: NDArray[np.bool_], parts: dict[Path, Part]) -> NDArray[np.int64]:
    """The indices of wanted episodes of which not exactly as many rows were read as the metadata count."""
    count = np.zeros(len(metadata.episodes), np.int64)
    for part in parts.values():
        first, lengths = _runs_of(part["episode_index"])
        np.add.at(count, np.searchsorted(metadata.episodes, part["episode_index"][first]), lengths)
    return np.flatnonzero(wanted & (count != metadata.lengths))


def _others(
    metadata: Metadata,
    numbers: NDArray[np.int64],
    known: set[Path],
    fetch: Callable[[Iterable[Path]], object],
) -> list[Path]:
    """The data files besides the known ones that hold rows of some episodes."""
    fetch(metadata.data_files)
    paths = [path for path in data_files_below(metadata.root / "data") if path not in known]

    def holds(path: Path) -> bool:
        try:
            column = read_parquet(path, ["episode_index"])["episode_index"]
        except UserError:
            return False  # It may hold other episodes; if not, `_incomplete` says what is missing.
        return bool(np.isin(numbers_of(column, f"{path}: 'episode_index'"), numbers).any())

    return [path for path, does in zip(paths, _in_parallel(holds, paths), strict=True) if does]


def _joined(metadata: Metadata, names: Sequence[str], parts: Sequence[Part]) -> dict[str, NDArray[Any]]:
    """The columns of all files, ordered by episode; an episode's rows stay in the order of their file.

    A column leaves the parts when it is joined, so that a large table is in memory about once.
    """
    numbers = np.repeat(np.arange(len(parts)), [len(part["episode_index"]) for part in parts])
    episode = np.concatenate([part["episode_index"] for part in parts])
    order = None if (episode[1:] >= episode[:-1]).all() else np.argsort(episode, kind="stable")
    episode = episode if order is None else episode[order]
    starts, lengths = _runs_of(episode)
    place = np.searchsorted(metadata.episodes, episode[starts])

    def derived(name: str) -> NDArray[Any]:
        counted = np.arange(len(episode))
        if name == "index":
            indices: NDArray[Any] = counted + np.repeat(metadata.firsts[place] - starts, lengths)
            return indices
        frame = counted - np.repeat(starts, lengths)
        return frame if name == "frame_index" else (frame / metadata.fps).astype(np.float32)

    def joined(name: str) -> NDArray[Any]:
        if name == "index" or (name in DERIVED and not all(name in part for part in parts)):
            for part in parts:
                part.pop(name, None)
            return derived(name)
        return ordered(np.concatenate([part.pop(name) for part in parts]))

    def ordered(values: NDArray[Any]) -> NDArray[Any]:
        in_order: NDArray[Any] = values if order is None else values[order]
        return in_order

    columns = {name: joined(name) for name in names}
    if all(PROMPT in part for part in parts):
        prompts = joined_prompts([(part[PROMPT], part[TEXTS]) for part in parts])
        columns |= prompts | {PROMPT: ordered(prompts[PROMPT])}
    return columns | {SEGMENTS: _segments(ordered(numbers), joined(SEGMENTS))}


def _runs_of(values: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first index and the length of each run of equal values."""
    first = np.flatnonzero(values[1:] != values[:-1]) + 1
    first = np.concatenate([np.zeros(min(len(values), 1), np.int64), first])
    return first, np.diff(first, append=len(values))


def _segments(file: NDArray[np.int64], row: NDArray[np.int64]) -> NDArray[np.int64]:
    """The runs of consecutive rows of one file; see `SEGMENTS`."""
    first = np.flatnonzero((file[1:] != file[:-1]) | (row[1:] != row[:-1] + 1)) + 1
    first = np.concatenate([np.zeros(min(len(file), 1), np.int64), first])
    return np.stack([first, file[first], row[first]], axis=1)


def _incomplete(metadata: Metadata, short: NDArray[np.int64], parts: dict[Path, Part]) -> UserError:
    """The error for episodes whose rows are not there, or not all of them, or too many."""
    i = int(short[0])
    number, length = int(metadata.episodes[i]), int(metadata.lengths[i])
    held = {path: int((part["episode_index"] == number).sum()) for path, part in parts.items()}
    held = {path: count for path, count in held.items() if count}
    named, pointed = ", ".join(map(str, held)), metadata.data_files[metadata.data_file[i]]
    more = f"; so it is with {len(short) - 1} more episodes" if len(short) > 1 else ""
    if not held and not pointed.is_file():
        what = f"{pointed} cannot be read: there is no such file, and no other data file holds episode {number}"
    elif not held:
        what = f"no data file holds rows of episode {number}, which has {length} frames according to meta/"
    else:
        what = (
            f"{named} has {sum(held.values())} rows of episode {number}, which has {length} frames according to meta/"
        )
    few = ", ".join(map(str, metadata.episodes[short[:8]].tolist())) + ", ..." * (len(short) > 8)
    return UserError(
        f"{what}{more}. Download, record or convert that file again, or leave these episodes out: "
        f"data.exclude_episodes = [{few}] (`rlinf check-dataset {metadata.name}` reports more)"
    )


def _check_frames(rows: Rows) -> None:
    """Raise `UserError` unless the frames of each episode are numbered from 0 without gaps, in their order."""
    starts, lengths = rows.starts, rows.metadata.lengths[rows.places]
    expected = np.arange(len(rows.columns["frame_index"])) - np.repeat(starts, lengths)
    for at in np.flatnonzero(rows.columns["frame_index"] != expected)[:1].tolist():
        file, row = rows.file_of(at)
        episode = int(rows.columns["episode_index"][at])
        raise UserError(
            f"{rows.files[file]}, row {row}: frame_index of episode {episode} is {rows.columns['frame_index'][at]} "
            f"instead of {expected[at]}: a frame is missing, duplicated or out of order. Write that episode again, or "
            f"leave it out: data.exclude_episodes = [{episode}] (`rlinf check-dataset {rows.metadata.name}` reports "
            "more)"
        )
