"""How long a run's samples are: from its data if available, otherwise the policy's maximum."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlinf_core.contract.datasets import LeRobotDatasetConfig, VariedSource
from rlinf_core.contract.run import RunConfig, RunSource
from rlinf_core.data.loading.sampling import sample_generator
from rlinf_core.data.sample import Sample
from rlinf_core.data.splits import open_split
from rlinf_core.data.statistics.preview import bind_policy, encode_without_images
from rlinf_core.data.statistics.run import diagnosed_pipeline
from rlinf_core.errors import UserError
from rlinf_core.hub import cache_only
from rlinf_core.plugins.registry import Plugins

SAMPLED_ROWS = 256
"""Evenly spread over the training rows; enough to know the mean prompt length to a few percent."""
STATISTICS_ROWS = 4096
"""For the statistics that are needed to turn numbers into tokens."""


@dataclass(frozen=True)
class SampledSource:
    """Samples of a dataset, as `collate` takes them."""

    share: float
    """The probability that a training sample comes from this dataset."""
    samples: Sequence[Sample]
    fact: str
    """Which samples these are, in words."""
    assumption: str = ""
    """What was assumed instead of read from the data; empty: the samples are from the data."""


def sample_sources(run: RunConfig, plugins: Plugins) -> list[SampledSource]:
    """Samples of each of a run's datasets; the hub is not contacted.

    Raises:
        UserError: A dataset is not available and the policy has no maximum sample length.
    """
    sampled = []
    for source in run.sources:
        with source.naming(), cache_only():
            try:
                sampled.append(_of_data(source, plugins))
            except UserError as error:
                sampled.append(_longest_possible(source, error))
    return sampled


def bind_policy_at_hand(run: RunConfig, plugins: Plugins) -> tuple[RunConfig, list[str]]:
    """`bind_policy`, or the unchanged run and an assumption; the hub is not contacted."""
    with cache_only():
        try:
            return bind_policy(run, plugins)[0], []
        except UserError as error:
            first = str(error).splitlines()[0]
            return run, [f"the policy's own defaults for sizes that depend on the data: {first}"]


def _of_data(source: RunSource, plugins: Plugins) -> SampledSource:
    """Rows without images, to which the images of one row are added: all images of a dataset have the same size."""
    run = source.run
    rows = open_split(run, plugins, "train")
    pipeline, _ = diagnosed_pipeline(run, rows, rows=STATISTICS_ROWS)
    indices = np.unique(np.linspace(0, len(rows) - 1, SAMPLED_ROWS).astype(np.int64)).tolist()
    (seen,) = rows.__getitems__(indices[:1])
    images = {key: value for key, value in pipeline.encode(seen).items() if key == "images"}
    encoded: Iterable[Any] = encode_without_images(rows, pipeline, indices)
    if isinstance(rows, VariedSource) and rows.images_differ:
        encoded, images = (pipeline.encode(row) for at in indices for row in rows.__getitems__([at])), {}
    samples: list[Any] = [
        {**sample, **run.policy.draw(sample_generator(run.seed, 0, position)), **images}
        for position, sample in enumerate(encoded)
    ]
    where = f"{source.name}: " if source.name else ""
    return SampledSource(
        source.share, samples, f"{where}{len(samples)} of {len(rows)} training rows of {run.data.repo_id}"
    )


def _longest_possible(source: RunSource, reason: UserError) -> SampledSource:
    run, data = source.run, source.run.data
    cameras = list(data.images) if isinstance(data, LeRobotDatasetConfig) else []
    sample = run.policy.largest_sample(cameras)
    if sample is None:
        raise UserError(
            f"{reason}\n  Without the data, the length of samples is unknown: the policy {run.policy.type!r} has no "
            "largest_sample()"
        ) from reason
    drawn: Any = {**sample, **run.policy.draw(sample_generator(run.seed, 0, 0))}
    where = f"{source.name}: " if source.name else ""
    return SampledSource(
        source.share,
        [drawn],
        f"{where}the policy's longest samples",
        f"{where}samples of the policy's maximum length, because {_why(data.repo_id, reason)}",
    )


def _why(dataset: str, reason: UserError) -> str:
    """Why the data were not read, in one line."""
    # The rest of the message is about reaching the hub; the text plugin's wording differs.
    if any(f"'{dataset}' is {no} file or folder" in str(reason) for no in ("no", "not a")):
        return f"{dataset} is not on this machine, and the hub was not contacted"
    return "the data were not read: " + str(reason).splitlines()[0]
