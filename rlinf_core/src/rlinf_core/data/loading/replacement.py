"""`data.on_bad_sample = "skip"`: a row that cannot be read is replaced by another one of its dataset.

Which one depends on seed, epoch and row alone, so that it is the same on any number of ranks and workers, and after a
resume. Storage that is away makes no row bad: `encoding.read_rows` waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rlinf_core.data.loading.encoding import encode_rows, read_rows
from rlinf_core.data.loading.mixture import Source
from rlinf_core.data.loading.sampling import REPLACEMENTS, generator
from rlinf_core.data.sample import REPLACED, ReplacedRow, Row, Sample
from rlinf_core.errors import UserError

MOST_DRAWS = 20
"""Rows that are tried in place of a bad one, before the data as a whole count as bad."""


class Loaded(NamedTuple):
    """A row and the sample made from it, of another row if that was replaced."""

    row: Row
    sample: Sample
    replaced: ReplacedRow | None


def load_samples(source: Source, number: int, indices: Sequence[int], *, seed: int, epoch: int) -> list[Sample]:
    """`load_rows` for training: the samples only, of which those of replaced rows say so under `REPLACED`."""
    loaded = load_rows(source, indices, seed=seed, epoch=epoch, number=number)
    marked: list[Any] = [{**one.sample, REPLACED: one.replaced} if one.replaced else one.sample for one in loaded]
    return marked


def take_marks(samples: Sequence[Sample]) -> list[ReplacedRow]:
    """Remove what `load_samples` has added to the samples of replaced rows, and return it."""
    unmarked: Any = samples
    return [sample.pop(REPLACED) for sample in unmarked if REPLACED in sample]


def load_rows(source: Source, indices: Sequence[int], *, seed: int, epoch: int, number: int = 0) -> list[Loaded]:
    """Read and encode rows; bad ones are replaced if their dataset wants that.

    Args:
        source: The dataset.
        indices: The rows.
        seed: The run's seed.
        epoch: The current epoch.
        number: Index of the dataset in the run.

    Raises:
        UserError: A row cannot be read or encoded, and is not to be replaced; or too many others cannot be read.
        RunError: Storage stays away.
    """
    try:
        rows = read_rows(source.rows, indices)
        samples = encode_rows(source.rows, indices, rows, source.pipeline)
    except UserError:
        if not source.skips_bad_rows:
            raise
        return [
            _load_or_replace(source, index, generator(seed, epoch, REPLACEMENTS, index), number) for index in indices
        ]
    return [Loaded(row, sample, None) for row, sample in zip(rows, samples, strict=True)]


def _load_or_replace(source: Source, index: int, draws: np.random.Generator, number: int) -> Loaded:
    try:
        return _load(source, index)
    except UserError as error:
        first = error
    for other in draws.integers(len(source.rows), size=MOST_DRAWS).tolist():
        try:
            loaded = _load(source, other)
        except UserError:
            continue
        return loaded._replace(replaced=ReplacedRow(number, index, other, str(first)))
    raise UserError(
        f'{first}. {MOST_DRAWS} other rows of the dataset that were tried instead (data.on_bad_sample = "skip") '
        "cannot be read either: `rlinf check-dataset --full` finds what is damaged"
    )


def _load(source: Source, index: int) -> Loaded:
    rows = read_rows(source.rows, [index])
    return Loaded(rows[0], encode_rows(source.rows, [index], rows, source.pipeline)[0], None)
