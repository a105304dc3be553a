"""Names for the numbers of state and action from `meta/modality.json`, which GR00T's datasets have.

It names slices of the vectors (`left_arm`: 0 to 7), where `meta/info.json` only numbers them (`motor_0`, `motor_1`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlinf_core.data.lerobot.columns import names_of, width_of
from rlinf_core.data.lerobot.files import read_json
from rlinf_core.errors import UserError

MODALITY = "meta/modality.json"
COLUMNS = {"state": "observation.state", "action": "action"}
"""The column that a table's slices are of, unless `original_key` names another."""


def with_part_names(root: Path, features: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The features with the names of `meta/modality.json` where their own say nothing.

    Args:
        root: The dataset's folder; most have no such file.
        features: Column -> its feature.
    """
    named = dict(features)
    for column, names in _names(_read(root), features).items():
        if _says_nothing(names_of(features[column])):
            named[column] = features[column] | {"names": names}
    return named


def annotation_columns(root: Path) -> list[str]:
    """The columns with indices of tasks that `meta/modality.json` names; empty without that file."""
    table = _read(root).get("annotation")
    parts = table.items() if isinstance(table, dict) else ()
    keys = [(part.get("original_key") if isinstance(part, dict) else None, name) for name, part in parts]
    return [str(key or f"annotation.{name}") for key, name in keys]


def _read(root: Path) -> dict[str, Any]:
    """The file's content; empty if there is none, or a damaged one, because it only describes what is read anyway."""
    try:
        content = read_json(root / MODALITY)
    except (FileNotFoundError, UserError):
        return {}
    return content if isinstance(content, dict) else {}


def _says_nothing(names: Sequence[str]) -> bool:
    """Whether there are no names, or all are the same word with a number: `motor_0`, `motor_1`."""
    stems = {re.sub(r"[_\W]*\d+$", "", name) if re.search(r"\d$", name) else name for name in names}
    return not names or (len(stems) == 1 and len(names) > 1)


def _names(content: Mapping[str, Any], features: Mapping[str, Any]) -> dict[str, list[str]]:
    """Column -> a name for each number; columns that the slices do not cover are left out."""
    found: dict[str, list[str | None]] = {}
    for table, column in COLUMNS.items():
        parts = content.get(table)
        for name, part in parts.items() if isinstance(parts, dict) else ():
            described = part if isinstance(part, dict) else {}
            start, end, own = described.get("start"), described.get("end"), described.get("original_key") or column
            if not isinstance(own, str) or own not in features:
                continue
            if not isinstance(start, int) or not isinstance(end, int):
                continue
            names = found.setdefault(own, [None] * width_of(features[own]))
            if 0 <= start < end <= len(names):
                whole = end - start == 1
                names[start:end] = [name if whole else f"{name}[{i}]" for i in range(end - start)]
    return {column: [str(name) for name in names] for column, names in found.items() if all(names)}
