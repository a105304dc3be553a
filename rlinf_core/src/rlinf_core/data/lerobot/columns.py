"""Read the numeric columns of a whole LeRobot dataset into arrays, and check them.

Files are read in parallel: formats v2.x have one file per episode, tens of thousands in the largest datasets. What is
read must agree with the metadata (rows, indices, tasks, widths, finite values); an error names file, episode and frame.
At the end: a quality value per episode, for `data.quality_column`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rlinf_core.data.images.video_header import is_depth_format
from rlinf_core.data.lerobot.files import read_json_lines, read_parquet
from rlinf_core.data.lerobot.metadata import AGAIN, NUMBERS, Metadata, nearest_first
from rlinf_core.data.lerobot.shared_memory import Columns, find_shared, share
from rlinf_core.errors import UserError
from rlinf_core.untrusted import parse_json

INDEX_COLUMNS = ("index", "episode_index", "frame_index", "timestamp", "task_index")
READERS = 8
"""Files that are read in parallel."""

_in_use: WeakValueDictionary[object, Columns] = WeakValueDictionary()
"""Columns that a source in this process uses, by the state of their files."""


def read_columns(metadata: Metadata, names: Sequence[str]) -> tuple[Columns, NDArray[np.int64]]:
    """Read columns of all data files into contiguous arrays. Files are read once for all splits.

    Args:
        metadata: The dataset's metadata.
        names: `INDEX_COLUMNS`, and columns of vectors.

    Returns:
        Index columns [N] and vectors float32 [N, D]; and [data files], the position after the last frame of each.

    Raises:
        UserError: A file cannot be read, or its frames or the width of a vector differ from the metadata.
    """
    # Computed from the metadata, which the files must agree with.
    stops = np.cumsum(np.bincount(metadata.data_file, metadata.lengths, len(metadata.data_files)).astype(np.int64))
    state = _state(metadata, names)
    columns = _in_use.get(state) if state else None
    if columns is None and state:
        columns = _in_use[state] = find_shared(state) or share(_read_files(metadata, names), state)
    elif columns is None:
        columns = _read_files(metadata, names)  # Raises with the name of the missing file.
    return columns, stops


def _state(metadata: Metadata, names: Sequence[str]) -> object:
    """Everything that the result depends on; None if a file is missing."""
    try:
        statuses = [path.stat() for path in metadata.data_files]
    except OSError:
        return None
    files = tuple((status.st_ino, status.st_size, status.st_mtime_ns) for status in statuses)
    described = (metadata.root.resolve(), metadata.frames, metadata.lengths.tobytes(), metadata.episodes.tobytes())
    widths = tuple(width_of(metadata.features.get(name, {})) for name in names)
    return (*described, tuple(metadata.task_texts), tuple(names), widths, files)


def _read_files(metadata: Metadata, names: Sequence[str]) -> Columns:
    vectors = {name: width_of(metadata.features[name]) for name in names if name not in INDEX_COLUMNS}

    def read(path: Path) -> dict[str, NDArray[Any]]:
        table = read_parquet(path, list(names))
        return {
            name: vectors_of(table[name], vectors[name], f"{path}: {name!r}")
            if name in vectors
            else _numbers_of(table[name], f"{path}: {name!r}")
            for name in names
        }

    with ThreadPoolExecutor(READERS) as pool:
        try:
            files = list(pool.map(read, metadata.data_files))
        finally:
            pool.shutdown(cancel_futures=True)
    lengths = np.array([len(file["index"]) for file in files], np.int64)
    columns = Columns((name, np.concatenate([file[name] for file in files])) for name in names)
    _check_frames(metadata, lengths, columns)
    return columns


def width_of(feature: Mapping[str, Any]) -> int:
    """Numbers per row of a column."""
    return int(np.prod(feature.get("shape") or (1,)))


LONGEST_NAME = 40
"""Characters of a name that messages show."""


def names_of(feature: Mapping[str, Any]) -> tuple[str, ...]:
    """A name for each number of a column; empty if the metadata do not name every one."""
    names = [" ".join(name.split())[:LONGEST_NAME] for name in _flat(feature.get("names"))]
    return tuple(names) if all(names) and len(names) == width_of(feature) else ()


def _flat(names: Any) -> Iterator[str]:
    """Datasets have lists, lists of lists, headings with lists, and names with their indices."""
    if isinstance(names, Mapping):
        headings = any(isinstance(value, list) for value in names.values())
        names = list(names.values()) if headings else list(names)
    if isinstance(names, str):
        yield names
    for one in names if isinstance(names, list) else ():
        yield from _flat(one)


def image_size(feature: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width of a column's images, channels last or first; None if the metadata do not give them."""
    shape = list(feature.get("shape") or ())
    if len(shape) != 3 or not all(isinstance(n, int) for n in shape):
        return None
    channels = (1, 3, 4)  # Grey, RGB, RGBA.
    if shape[-1] in channels:
        return shape[0], shape[1]
    return (shape[1], shape[2]) if shape[0] in channels else None


def not_rgb(feature: Mapping[str, Any]) -> str:
    """The reason why the metadata say that a column's images are not RGB, such as depth maps; empty if they do not.

    lerobot marks depth maps by `is_depth_map` in `info`, and reads `video.is_depth_map` in `info` or `video_info`, as
    older versions wrote it. Other recorders leave out the mark, but may give the pixel format.
    """
    for where in ("info", "video_info"):
        described = feature.get(where)
        for key, value in described.items() if isinstance(described, dict) else ():
            name = str(key).removeprefix("video.")
            if name == "is_depth_map" and value and str(value).lower() != "false":
                return f"depth maps, according to {where!r} ({key!r}) in meta/info.json"
            if name == "pix_fmt" and is_depth_format(str(value)):
                return f"{value} images, according to {where!r} in meta/info.json: one channel of more than 8 bits"
    return ""


def vectors_of(column: pa.ChunkedArray, width: int, what: str) -> NDArray[np.float32]:
    """A column of numbers or of lists of one length -> float32 [rows, width]; `what` starts error messages.

    Raises:
        UserError: A row has no value or another width.
    """
    array = flat = column.combine_chunks()
    while pa.types.is_list(flat.type) or pa.types.is_large_list(flat.type) or pa.types.is_fixed_size_list(flat.type):
        if flat.null_count:
            raise UserError(f"{what} has no value in row {_first(pc.is_null(flat))}: {AGAIN}")
        if flat is array and len(array) and pc.list_value_length(array).unique().to_pylist() != [width]:
            wrong = np.asarray(pc.list_value_length(array)) != width
            if not pa.types.is_nested(flat.type.value_type):
                raise UserError(
                    f"{what} has {pc.list_value_length(array)[int(wrong.argmax())]} numbers in row "
                    f"{int(wrong.argmax())}, but meta/info.json says {width}: correct the wrong one"
                )
        flat = flat.flatten()
    if flat.null_count:
        raise UserError(f"{what} has no value in row {_first(pc.is_null(flat)) // max(width, 1)}: {AGAIN}")
    check_numeric(flat.type, what)
    numbers: NDArray[np.float32] = flat.to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    if len(numbers) != len(array) * width:
        raise UserError(
            f"{what} has {len(numbers)} numbers in {len(array)} rows, but meta/info.json says {width} per row"
        )
    return numbers.reshape(len(array), width)


def _numbers_of(column: pa.ChunkedArray, what: str) -> NDArray[Any]:
    """An index column -> [rows]; some writers store lists of one number."""
    if pa.types.is_nested(column.type):
        return vectors_of(column, 1, what).reshape(-1)
    if column.null_count:
        raise UserError(f"{what} has no value in row {_first(pc.is_null(column))}: {AGAIN}")
    check_numeric(column.type, what)
    numbers: NDArray[Any] = column.to_numpy()
    return numbers


def check_numeric(kind: pa.DataType, what: str) -> None:
    """Raise `UserError`, which starts with `what`, for a non-numeric type."""
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise UserError(f"{what} contains {kind}, not numbers: {AGAIN}")


def _first(flags: pa.Array | pa.ChunkedArray) -> int:
    return int(np.asarray(flags).argmax())


def _check_frames(metadata: Metadata, lengths: NDArray[np.int64], columns: dict[str, NDArray[Any]]) -> None:
    """Raise `UserError` unless the files contain the frames that the metadata list, in that order."""
    root, hint = metadata.root, f"`rlinf check-dataset {metadata.name}` reports more"
    expected = np.bincount(metadata.data_file, metadata.lengths, len(lengths)).astype(np.int64)
    for file in np.flatnonzero(lengths != expected)[:1].tolist():
        raise UserError(
            f"{metadata.data_files[file]} has {lengths[file]} rows, but its episodes have {expected[file]} frames "
            f"according to meta/: {AGAIN} ({hint})"
        )
    if not np.array_equal(metadata.starts, np.cumsum(metadata.lengths) - metadata.lengths):
        raise UserError(
            f"{root}: according to meta/episodes, frames belong to no episode or to several: {AGAIN} ({hint})"
        )
    if len(columns["index"]) != metadata.frames:
        raise UserError(
            f"{root}: the data files have {len(columns['index'])} rows, but meta/info.json counts {metadata.frames} "
            f"frames: {AGAIN} ({hint})"
        )
    named = {"index": np.arange(metadata.frames), "episode_index": np.repeat(metadata.episodes, metadata.lengths)}
    for name, numbers in named.items():
        for row in np.flatnonzero(columns[name] != numbers)[:1].tolist():
            raise UserError(
                f"{frame_at(metadata, row)}, has {name} {columns[name][row]} instead of {numbers[row]}: {AGAIN} "
                f"({hint})"
            )
    unknown = ~np.isin(columns["task_index"], list(metadata.task_texts))
    for row in np.flatnonzero(unknown)[:1].tolist():
        file = "tasks.parquet" if metadata.version == "v3.0" else "tasks.jsonl"
        raise UserError(
            f"{frame_at(metadata, row)}, has the task {columns['task_index'][row]}, which meta/{file} does not list: "
            f"{AGAIN} ({hint})"
        )


def check_finite(metadata: Metadata, columns: Mapping[str, NDArray[Any]], used: NDArray[np.bool_]) -> None:
    """Raise `UserError` for NaN or infinity: a single one spoils the statistics of all rows.

    Args:
        metadata: The dataset's metadata.
        columns: As `read_columns` returns them.
        used: [N], the frames to check; unused episodes may contain anything.
    """
    for name in columns.keys() - set(INDEX_COLUMNS):
        rows = np.flatnonzero(used & ~np.isfinite(columns[name]).all(axis=1))
        if not len(rows):
            continue
        episodes = np.unique(columns["episode_index"][rows]).tolist()
        named = ", ".join(map(str, episodes[:10])) + ", ..." * (len(episodes) > 10)
        raise UserError(
            f"{name!r} contains NaN or infinity in {len(rows)} frames of {len(episodes)} episodes ({named}), first in "
            f"{frame_at(metadata, int(rows[0]))}: fix these frames, or leave the episodes out with "
            f"data.exclude_episodes; `rlinf check-dataset {metadata.name}` lists them"
        )


def frame_at(metadata: Metadata, row: int) -> str:
    """File, episode and frame at a position among all frames, for messages."""
    episode = int(np.searchsorted(metadata.stops, row, side="right"))
    path = metadata.data_files[metadata.data_file[episode]]
    return f"{path}, episode {metadata.episodes[episode]}, frame {row - metadata.starts[episode]}"


def episode_quality(metadata: Metadata, column: str) -> NDArray[np.float64]:
    """[episodes], a column of `meta/episodes`, or the mean over each episode's frames of a data column.

    Raises:
        UserError: There is no such column, or its values are not single numbers or booleans.
    """
    if column in metadata.features:
        return _mean_of_frames(metadata, column)
    values = _listed(metadata, column)
    try:
        numbers = np.array([values[number] for number in metadata.episodes.tolist()], np.float64)
    except (TypeError, ValueError) as error:
        raise _no_number(column) from error
    if numbers.ndim != 1 or np.isnan(numbers).any():
        raise _no_number(column)
    return numbers


def _mean_of_frames(metadata: Metadata, column: str) -> NDArray[np.float64]:
    feature = metadata.features[column]
    if not feature["dtype"].startswith(NUMBERS) or np.prod(feature.get("shape") or (1,)) != 1:
        raise _no_number(column)
    columns, _ = read_columns(metadata, ["index", "episode_index", "task_index", column])
    sums = np.concatenate([[0.0], np.cumsum(columns[column].reshape(-1), dtype=np.float64)])
    totals = sums[metadata.stops] - sums[metadata.starts]
    return np.asarray(totals / np.maximum(metadata.lengths, 1))


def _listed(metadata: Metadata, column: str) -> dict[int, Any]:
    """Episode number -> value in `meta/episodes`."""
    if metadata.version != "v3.0":
        path = metadata.root / "meta" / "episodes.jsonl"
        described = parse_json(path.read_text(encoding="utf-8").lstrip().partition("\n")[0])
        if column not in described:
            raise _not_there(metadata, column, list(described))
        return {one["episode_index"]: one[column] for one in read_json_lines(path, ("episode_index", column))}
    values: dict[int, Any] = {}
    for path in sorted((metadata.root / "meta" / "episodes").glob("*/*.parquet")):
        names = pq.read_schema(path).names
        if column not in names:
            own = [name for name in names if not name.startswith(("stats/", "videos/", "data/", "meta/"))]
            raise _not_there(metadata, column, own)
        table = read_parquet(path, ["episode_index", column])
        values |= dict(zip(table["episode_index"].to_pylist(), table[column].to_pylist(), strict=True))
    return values


def _not_there(metadata: Metadata, column: str, own: list[str]) -> UserError:
    return UserError(
        f"data.quality_column names {column!r}, which {metadata.name} does not have; its episodes have "
        f"{nearest_first(column, own)}; its frames have {nearest_first(column, metadata.features)}"
    )


def _no_number(column: str) -> UserError:
    return UserError(f"data.quality_column names {column!r}, whose values are not single numbers or booleans")
