"""Columns of a LeRobot dataset: what the metadata say of them, and their values as arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rlinf_core.data.images.video_header import is_depth_format
from rlinf_core.data.lerobot.metadata import AGAIN
from rlinf_core.errors import UserError

INDEX_COLUMNS = ("index", "episode_index", "frame_index", "timestamp", "task_index")


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


def numbers_of(column: pa.ChunkedArray, what: str) -> NDArray[Any]:
    """An index column -> [rows]; some writers store lists of one number. `what` starts error messages."""
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
