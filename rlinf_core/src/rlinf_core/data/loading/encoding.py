"""Read rows and encode them to samples; errors name the row."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from rlinf_core.contract.datasets import SampleSource
from rlinf_core.contract.policy import PolicyConfig
from rlinf_core.data.pipeline import Pipeline
from rlinf_core.data.sample import Row, Sample
from rlinf_core.data.storage import is_storage_error, read_patiently
from rlinf_core.errors import RunError, UserError


def read_rows(source: SampleSource, indices: Sequence[int]) -> list[Row]:
    """Read rows with their images; while their storage is away, wait for it.

    Raises:
        RunError: It has stayed away.
        UserError: A row cannot be read; the message names it.
    """
    try:
        return source.__getitems__(indices)
    except (UserError, OSError):
        close = getattr(source, "close", lambda: None)
        close()  # What is open may have been replaced.
        return read_patiently(lambda: _read_naming(source, indices), what=source.describe(indices[0]), again=close)
    except Exception:
        return _read_naming(source, indices)


def _read_naming(source: SampleSource, indices: Sequence[int]) -> list[Row]:
    """Read rows; an error names the row that cannot be read."""
    try:
        return source.__getitems__(indices)
    except RunError:
        raise
    except Exception as error:
        if is_storage_error(error):
            raise  # Row by row, it would fail as many times.
        for index in indices:
            with _naming(source, index):
                source.__getitems__([index])
        raise


def encode_rows(source: SampleSource, indices: Sequence[int], rows: Sequence[Row], pipeline: Pipeline) -> list[Sample]:
    """Encode rows, without random draws; an error names the row."""
    samples = []
    for index, row in zip(indices, rows, strict=True):
        with _naming(source, index):
            samples.append(pipeline.encode(row))
    return samples


def add_draws(
    samples: Sequence[Sample], policy: PolicyConfig, generators: Iterable[np.random.Generator]
) -> list[Sample]:
    """Add each sample's random numbers."""
    drawn: list[Any] = [
        {**sample, **policy.draw(generator)} for sample, generator in zip(samples, generators, strict=True)
    ]
    return drawn


@contextlib.contextmanager
def _naming(source: SampleSource, index: int) -> Iterator[None]:
    """Add a row's origin to errors: to the message of a `UserError`, as a note to others."""
    try:
        yield
    except UserError as e:
        raise UserError(f"{e} [{source.describe(index)}]") from e
    except Exception as e:
        e.add_note(f"while preparing the row {source.describe(index)}")
        raise
