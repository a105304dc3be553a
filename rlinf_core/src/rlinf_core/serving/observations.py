"""From what a client sent to a row in the dataset's format: other names, nested maps, images of other layouts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from rlinf_core.contract.datasets import DatasetConfig, LeRobotDatasetConfig
from rlinf_core.errors import UserError, did_you_mean

NOISE, SEED, DRAW, STEPS = "noise", "seed", "draw", "num_steps"
CHOSEN = (NOISE, SEED, DRAW, STEPS)
"""What a client may choose of how its actions are drawn: numbers, a seed of them and how often it was drawn from, and
denoising steps."""
DEEPEST = 4


def to_row(data: DatasetConfig, sent: Any) -> dict[str, Any]:
    """The row of an observation, and beside it what the client chose (`CHOSEN`).

    Images are made uint8 [height, width, 3]: floats are taken for 0 to 1, and [3, height, width] is transposed, as
    openpi's policies do.

    Raises:
        UserError: It is not a map, lacks columns, gives one twice, or something else is no image; all mistakes at once.
    """
    if not isinstance(sent, Mapping):
        raise UserError(f"an observation is a map of names to values, not {type(sent).__name__}")
    flat = dict(flattened(sent))
    columns, names = tuple(data.observation_columns()), data.observation_names()
    row: dict[str, Any] = {name: flat[name] for name in (*columns, "task", *CHOSEN) if name in flat}
    mistakes: list[str] = []
    for name in flat.keys() & names.keys() - set(columns):
        column = names[name]
        if column in row and name != column and row[column] is not flat[name]:
            if not np.array_equal(row[column], flat[name]):
                mistakes.append(f"{column!r} is given twice, also as {name!r}: send one")
        else:
            row[column] = flat[name]
    if not columns:
        row = flat | row
    mistakes += _missing(columns, names, row, flat)
    images = data.images.values() if isinstance(data, LeRobotDatasetConfig) else ()
    for column in images:
        if column in row:
            mistakes += _make_image(column, row)
    for column in data.state if isinstance(data, LeRobotDatasetConfig) else ():
        if column in row:
            mistakes += _make_vector(column, row)
    if isinstance(row.get("task"), (bytes, np.str_)):
        row["task"] = row["task"].decode("utf-8", "replace") if isinstance(row["task"], bytes) else str(row["task"])
    if mistakes:
        raise UserError("; ".join(mistakes))
    return row


def flattened(values: Mapping[Any, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Every value under one name: `images/front` for a map in a map."""
    for key, value in values.items():
        name = prefix + (key.decode("utf-8", "replace") if isinstance(key, bytes) else str(key))
        if isinstance(value, Mapping) and depth < DEEPEST:
            yield from flattened(value, f"{name}/", depth + 1)
        else:
            yield name, value


def _missing(columns: Any, names: Mapping[str, str], row: Mapping[str, Any], flat: Mapping[str, Any]) -> list[str]:
    """What the observation lacks, with the names under which it may be sent."""
    lacking = [column for column in columns if column not in row]
    if not lacking:
        return []
    also = {column: [name for name, its in names.items() if its == column] for column in lacking}
    wanted = ", ".join(f"{c!r}" + (f" (or {' or '.join(map(repr, also[c][:3]))})" if also[c] else "") for c in lacking)
    unused = [name for name in flat if name not in names and name not in columns]
    hint = next((text for c in lacking if (text := did_you_mean(c, unused))), "")
    return [f"the observation lacks {wanted}; it has {', '.join(map(repr, list(flat)[:20])) or 'nothing'}{hint}"]


def _make_image(column: str, row: dict[str, Any]) -> list[str]:
    image = np.asarray(row[column]) if not isinstance(row[column], (str, bytes)) else np.zeros(0)
    if image.ndim == 4 and len(image) == 1:
        image = image[0]
    if image.ndim == 3 and image.shape[0] == 3 and image.shape[-1] != 3:
        image = image.transpose(1, 2, 0)
    if image.ndim != 3 or image.shape[-1] != 3 or not image.size:
        return [f"{column!r} is {image.dtype} {list(image.shape)}, but an image is uint8 [height, width, 3], RGB"]
    if image.dtype.kind == "f":
        if not np.isfinite(image).all() or image.min() < 0 or image.max() > 1:
            return [f"{column!r} has floats outside of 0 to 1: send uint8, or floats from 0 to 1"]
        image = (255 * image).astype(np.uint8)
    if image.dtype != np.uint8:
        return [f"{column!r} is {image.dtype}, but an image is uint8 [height, width, 3], RGB"]
    row[column] = np.ascontiguousarray(image)
    return []


def _make_vector(column: str, row: dict[str, Any]) -> list[str]:
    try:
        vector = np.asarray(row[column])
    except ValueError:
        vector = np.zeros(0, "U1")
    if vector.dtype.kind not in "biuf" or vector.ndim > 2:
        return [f"{column!r} is {vector.dtype} {list(vector.shape)}, but must be numbers [D]"]
    row[column] = vector[0] if vector.ndim == 2 and len(vector) == 1 else vector
    return []
