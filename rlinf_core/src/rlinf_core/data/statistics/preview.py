"""Preview the data before a run: evenly spread samples without images, and all prompts, to which the policy is bound.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlinf_core.contract.datasets import ColumnSource, SampleSource, Split
from rlinf_core.contract.run import LoadedPlugins, RunConfig
from rlinf_core.data.pipeline import Pipeline
from rlinf_core.data.sample import Sample
from rlinf_core.data.splits import open_split
from rlinf_core.data.statistics.compute import ROWS_AT_A_TIME, apply, takes_batches
from rlinf_core.data.transforms import Transform
from rlinf_core.errors import UserError

PREVIEW_ROWS = 4096
"""Most rows of a preview; they take a few seconds."""


def preview_samples(source: SampleSource, pipeline: Pipeline, most: int = PREVIEW_ROWS) -> Iterator[Sample]:
    """Encode the rows that `spread_rows` selects, lazily and without images."""
    yield from encode_without_images(source, pipeline, spread_rows(source.episodes, most).tolist())


def spread_rows(episodes: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Select up to `most` rows: the first of every episode, to cover all episodes, then evenly spread ones.

    Args:
        episodes: [N], the episode of each row.
        most: If there are more episodes, evenly spread episodes are selected.
    """
    if len(episodes) <= most:
        return np.arange(len(episodes))
    first = np.flatnonzero(np.diff(episodes, prepend=episodes[0] - 1))
    first = first[np.linspace(0, len(first) - 1, min(most, len(first))).astype(np.int64)]
    spread = np.linspace(0, len(episodes) - 1, most - len(first)).astype(np.int64)
    return np.union1d(first, spread)


def encode_without_images(
    source: SampleSource, pipeline: Pipeline, rows: Sequence[int], at_once: int = 256
) -> Iterator[Sample]:
    """Encode rows without their images; an error names the row."""
    for start in range(0, len(rows), at_once):
        indices = rows[start : start + at_once]
        for index, row in zip(indices, source.without_images(indices), strict=True):
            try:
                yield pipeline.encode(row)
            except UserError as error:
                raise UserError(f"{error} [{source.describe(index)}]") from error


def bind_policy(run: RunConfig, plugins: LoadedPlugins) -> tuple[RunConfig, Mapping[str, Sequence[int]]]:
    """The run with its policy bound to what its layout takes from the data (e.g. embedding rows), and that layout."""
    layout = run.policy.data_layout(_all_prompts(run, plugins))
    return run.model_copy(update={"policy": run.policy.with_data_layout(layout)}), layout


def _all_prompts(run: RunConfig, plugins: LoadedPlugins) -> Iterator[str]:
    for source in run.sources:
        data = source.run.data
        splits: tuple[Split, ...] = ("train", "validation") if data.has_validation else ("train",)
        for split in splits:
            with source.naming():
                rows, transforms = open_split(source.run, plugins, split), (data.repack(), *data.transforms())
                yield from different_prompts(rows, transforms, read_images=data.stats_need_images)


def different_prompts(
    source: SampleSource, transforms: Sequence[Transform], *, read_images: bool = False
) -> Iterator[str]:
    """Every distinct prompt of a split, in one pass over its rows.

    Args:
        source: The rows.
        transforms: All transforms before normalisation: repacking and the dataset's own.
        read_images: Decode images for transforms that need them; slow.
    """
    seen: set[str] = set()
    in_columns = not read_images and isinstance(source, ColumnSource) and all(map(takes_batches, transforms))
    for start in range(0, len(source), ROWS_AT_A_TIME):
        rows = range(start, min(start + ROWS_AT_A_TIME, len(source)))
        for prompt in _prompts(source, rows, transforms, in_columns=in_columns, read_images=read_images):
            if prompt not in seen:
                seen.add(prompt)
                yield prompt


def _prompts(
    source: SampleSource, rows: Sequence[int], transforms: Sequence[Transform], *, in_columns: bool, read_images: bool
) -> list[str]:
    if in_columns:
        assert isinstance(source, ColumnSource)
        prompts: Any = apply(source.columns(rows), transforms, read_images=False).get("prompt", [])
        return [prompts] if isinstance(prompts, str) else list(prompts)
    read = source.__getitems__(rows) if read_images else source.without_images(rows)
    samples = [apply(row, transforms, read_images=read_images) for row in read]
    return [sample["prompt"] for sample in samples if "prompt" in sample]
