"""What the dataset calls each dimension of `state` and `actions` after transforms. Torch-free.

Transforms are code, and packages bring their own, so a name follows its number: the recorded numbers are changed one by
one, and what changes behind the transforms got its value from that number. A dimension is named if it depends on one
number of the dataset's columns, and no other dimension depends on that number: after a permutation, a scaling or a new
sign it has its name, after a rotation or a sum it has none. A wrong name is worse than none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlinf_core.contract.datasets import ColumnSource, DatasetConfig, LeRobotDatasetConfig, NamingSource, SampleSource
from rlinf_core.data.normalize import KEYS
from rlinf_core.data.statistics.compute import apply, takes_batches
from rlinf_core.data.transforms import Transform

ROWS = 24
"""Rows in which numbers are changed: enough that a threshold is crossed in one of them."""

Names = Mapping[str, tuple[str, ...]]
"""`state` and `actions` -> a name for each dimension, empty for one without a name; a key without any is left out."""


def name_dimensions(data: DatasetConfig, source: SampleSource, transforms: Sequence[Transform]) -> Names:
    """The names of the dimensions of `state` and `actions` after transforms.

    Args:
        data: Says which columns are the state and the action.
        source: Rows; only a `NamingSource` has names.
        transforms: Repacking, and any transforms after it.

    Returns:
        Nothing if the dataset names nothing, or if the transforms need images or reject changed values.
    """
    if not isinstance(source, NamingSource) or not isinstance(data, LeRobotDatasetConfig) or data.stats_need_images:
        return {}
    columns = {"state": data.state, "actions": data.actions}
    known = {column: source.names_of((column,)) for names in columns.values() for column in names}
    if not any(known.values()) or not len(source):
        return {}
    rows = np.unique(np.linspace(0, len(source) - 1, ROWS).astype(np.int64)).tolist()
    try:
        traced = _Traced(source, rows, transforms)
        found = {key: _names(traced, key, columns[key], known) for key in KEYS}
    except Exception:  # A transform may reject values that were not recorded together; the run does not depend on this.
        return {}
    return {key: names for key, names in found.items() if any(names)}


class _Traced:
    """Rows whose numbers can be changed before the transforms."""

    def __init__(self, source: SampleSource, rows: Sequence[int], transforms: Sequence[Transform]) -> None:
        self._transforms = transforms
        self._in_columns = isinstance(source, ColumnSource) and all(map(takes_batches, transforms))
        self._read: list[Any] = (
            [source.columns(rows)]
            if isinstance(source, ColumnSource) and self._in_columns
            else source.without_images(rows)
        )
        self._before = self._outputs(self._read)

    def width(self, key: str) -> int:
        """Dimensions of `state` or `actions` after the transforms; 0 if there is none."""
        return int(self._before[key].shape[-1]) if key in self._before else 0

    def changed_by(self, key: str, column: str) -> Iterator[NDArray[np.int64]]:
        """For each number of a column: which dimensions of `state` or `actions` change with it."""
        values = self._read[0][column] if self._in_columns else np.stack([row[column] for row in self._read])
        noise = np.random.Generator(np.random.Philox(key=0)).uniform(-1, 1, values.shape[:-1])
        for number in range(values.shape[-1]):
            one = values[..., number]
            # Values of other rows cross thresholds that the data cross; noise moves a number that never changes.
            scale = 1e-3 * (np.ptp(one) or max(1.0, float(np.abs(one).max())))
            changed = values.copy()
            changed[..., number] = np.roll(one, 1, axis=0) + scale * noise
            after = self._outputs(self._with(column, changed))[key]
            same = (after == self._before[key]) | (np.isnan(after) & np.isnan(self._before[key]))
            yield np.flatnonzero(~same.reshape(-1, same.shape[-1]).all(axis=0))

    def _with(self, column: str, values: NDArray[Any]) -> list[Any]:
        if self._in_columns:
            return [{**self._read[0], column: values}]
        return [{**row, column: own} for row, own in zip(self._read, values, strict=True)]

    def _outputs(self, read: Sequence[Any]) -> dict[str, NDArray[Any]]:
        samples: list[Any] = [apply(one, self._transforms, read_images=False) for one in read]
        return {key: np.stack([sample[key] for sample in samples]) for key in KEYS if key in samples[0]}


def _names(traced: _Traced, key: str, columns: Sequence[str], known: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The name of each dimension of `state` or `actions`, which the columns of that key may give."""
    origins: list[list[str]] = [[] for _ in range(traced.width(key))]
    for column in columns if origins else ():
        for number, dimensions in enumerate(traced.changed_by(key, column)):
            name = known[column][number] if known[column] and len(dimensions) == 1 else ""
            for dimension in dimensions.tolist():
                origins[dimension].append(name)
    return tuple(names[0] if len(names) == 1 else "" for names in origins)
