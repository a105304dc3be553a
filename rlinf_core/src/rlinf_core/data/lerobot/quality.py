"""A quality value per episode, for `data.quality_column`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlinf_core.data.lerobot.files import data_files_below, read_json_lines, read_parquet
from rlinf_core.data.lerobot.metadata import NUMBERS, Metadata, nearest_first
from rlinf_core.data.lerobot.rows import read_rows
from rlinf_core.errors import UserError
from rlinf_core.untrusted.parquet import open_parquet
from rlinf_core.untrusted.text import parse_json, read_text


def episode_quality(
    metadata: Metadata,
    column: str,
    chosen: NDArray[np.bool_],
    fetch: Callable[[Iterable[Path]], object] = lambda paths: None,
) -> NDArray[np.float64]:
    """[episodes], a column of `meta/episodes`, or the mean over each episode's frames of a data column.

    Args:
        metadata: The dataset's metadata.
        column: The name of the column.
        chosen: [episodes]; frames of the others are not read, and their value is NaN.
        fetch: Downloads files that the folder lacks.

    Raises:
        UserError: There is no such column, or its values are not single numbers or booleans.
    """
    if column in metadata.features:
        return _mean_of_frames(metadata, column, chosen, fetch)
    values = _listed(metadata, column)
    try:
        numbers = np.array([values[number] for number in metadata.episodes.tolist()], np.float64)
    except (TypeError, ValueError) as error:
        raise _no_number(column) from error
    if numbers.ndim != 1 or np.isnan(numbers).any():
        raise _no_number(column)
    return numbers


def _mean_of_frames(
    metadata: Metadata, column: str, chosen: NDArray[np.bool_], fetch: Callable[[Iterable[Path]], object]
) -> NDArray[np.float64]:
    feature = metadata.features[column]
    if not feature["dtype"].startswith(NUMBERS) or np.prod(feature.get("shape") or (1,)) != 1:
        raise _no_number(column)
    rows = read_rows(metadata, [column], chosen, fetch)
    sums = np.concatenate([[0.0], np.cumsum(rows.columns[column].reshape(-1), dtype=np.float64)])
    means = np.full(len(metadata.episodes), np.nan)
    means[rows.places] = (sums[rows.stops] - sums[rows.starts]) / metadata.lengths[rows.places]
    return means


def _listed(metadata: Metadata, column: str) -> dict[int, Any]:
    """Episode number -> value in `meta/episodes`."""
    if metadata.version != "v3.0":
        path = metadata.root / "meta" / "episodes.jsonl"
        described = parse_json(read_text(path).lstrip().partition("\n")[0])
        if column not in described:
            raise _not_there(metadata, column, list(described))
        return {one["episode_index"]: one[column] for one in read_json_lines(path, ("episode_index", column))}
    values: dict[int, Any] = {}
    for path in data_files_below(metadata.root / "meta" / "episodes"):
        with open_parquet(path) as file:
            names = file.schema_arrow.names
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
