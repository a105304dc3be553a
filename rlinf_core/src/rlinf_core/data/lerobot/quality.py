"""A number for each episode of a LeRobot dataset, by which some are left out (`data.quality_column`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rlinf_core.data.lerobot.columns import read_columns
from rlinf_core.data.lerobot.files import read_json_lines, read_parquet
from rlinf_core.data.lerobot.info import NUMBERS
from rlinf_core.data.lerobot.metadata import Metadata, nearest_first
from rlinf_core.errors import UserError
from rlinf_core.untrusted import parse_json


def episode_quality(metadata: Metadata, column: str) -> NDArray[np.float64]:
    """[episodes], a column of `meta/episodes`, or the mean over its frames of a column of the data.

    Raises:
        UserError: There is no such column, or it does not hold one number or truth value each.
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
    """Episode number -> its value in `meta/episodes`."""
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
    return UserError(f"data.quality_column names {column!r}, which does not hold one number or truth value each")
