"""Read other projects' statistics: openpi's `norm_stats.json`, lerobot's `meta/stats.json` and processors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlinf_core.data.normalize import KEYS, NormStats, parse_norm_stats
from rlinf_core.errors import UserError, did_you_mean
from rlinf_core.untrusted.text import read_json

LEROBOT_COLUMNS = {"state": ("observation.state",), "actions": ("action",)}
"""Their columns in lerobot's own datasets."""
FIELDS = ("mean", "std", "q01", "q99")


def read_openpi(path: Path) -> dict[str, NormStats]:
    """Read statistics from openpi's file, with or without its top-level key `norm_stats`.

    Raises:
        UserError: The file is not one of openpi's; the message lists its content.
    """
    content = _read_json(path)
    tables = content.get("norm_stats", content)
    if not isinstance(tables, dict):
        raise UserError(f"{path} is not a norm_stats.json of openpi: its norm_stats is not a table")
    stats = {key: _parse(path, key, tables[key]) for key in KEYS if key in tables}
    if not stats:
        raise UserError(f"{path} is not a norm_stats.json of openpi: it has {_listed(tables)}, not state or actions")
    return stats


def read_lerobot(path: Path, columns: Mapping[str, Sequence[str]] = LEROBOT_COLUMNS) -> dict[str, NormStats]:
    """Read statistics from a dataset's `meta/stats.json` or a policy's `*normalizer_processor.safetensors`.

    They are of the recorded columns, and a dataset's quantiles are means of its episodes' quantiles.

    Args:
        path: The file.
        columns: `state` and `actions` -> lerobot's column names, which are concatenated; an empty list is skipped.

    Raises:
        UserError: The file is not one of lerobot's, or lacks a column.
    """
    tables = _read_processor(path) if path.suffix == ".safetensors" else _read_json(path)
    stats = {}
    for key, names in columns.items():
        parts = []
        for name in names:
            if name not in tables:
                near = did_you_mean(name, tables)
                raise UserError(f"{path} has no statistics of {name!r}{near}; it has {_listed(tables)}")
            parts.append(_parse(path, name, tables[name]))
        if parts:
            stats[key] = NormStats(*(np.concatenate([getattr(part, field) for part in parts]) for field in FIELDS))
    return stats


def _read_processor(path: Path) -> dict[str, Any]:
    """Column -> its statistics, from tensors named `<column>.<statistic>`."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path} cannot be read: {e}") from e
    tables: dict[str, Any] = {}
    for name, values in tensors.items():
        column, _, statistic = name.rpartition(".")
        tables.setdefault(column, {})[statistic] = values
    return tables


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read: {e}") from e
    if not isinstance(content, dict):
        raise UserError(f"{path} contains no table of statistics")
    return content


def _parse(path: Path, name: str, table: Any) -> NormStats:
    try:
        return parse_norm_stats(table)
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(f"{path}: {name!r} has no mean and std, or they are invalid ({type(e).__name__}: {e})") from e


def _listed(tables: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, tables)) or "nothing"
