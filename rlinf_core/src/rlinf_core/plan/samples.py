"""How long a run's samples are: those of its data where they are at hand, else the longest that its policy takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlinf_core.contract.datasets import LeRobotDatasetConfig
from rlinf_core.contract.run import RunConfig, RunSource
from rlinf_core.data.loading.sampling import sample_generator
from rlinf_core.data.pipeline import build_pipeline
from rlinf_core.data.sample import Sample
from rlinf_core.data.splits import open_split
from rlinf_core.data.statistics.preview import encode_without_images
from rlinf_core.data.statistics.run import diagnose
from rlinf_core.errors import UserError
from rlinf_core.hub import cache_only
from rlinf_core.plugins.registry import Plugins
from rlinf_core.training.data import bind_policy

SAMPLED_ROWS = 256
"""Evenly spread over the training rows: the mean length of prompts is known to a few hundredths."""
STATISTICS_ROWS = 4096
"""For the statistics without which numbers cannot become tokens."""


@dataclass(frozen=True)
class SampledSource:
    """Samples of a dataset, as `collate` takes them."""

    share: float
    """The probability that a training sample is from here."""
    samples: Sequence[Sample]
    fact: str
    """Which they are."""
    assumption: str = ""
    """What was not known; empty: they are of the data."""


def sample_sources(run: RunConfig, plugins: Plugins) -> list[SampledSource]:
    """Samples of each of a run's datasets; the hub is not asked.

    Raises:
        UserError: A dataset is not at hand and the policy does not say how long samples can be.
    """
    sampled = []
    for source in run.sources:
        with source.naming(), cache_only():
            try:
                sampled.append(_of_data(source, plugins))
            except UserError as error:
                sampled.append(_longest_possible(source, error))
    return sampled


def know_data_at_hand(run: RunConfig, plugins: Plugins) -> tuple[RunConfig, list[str]]:
    """`training.data.bind_policy`, or the run as it is and an assumption; the hub is not asked."""
    with cache_only():
        try:
            return bind_policy(run, plugins)[0], []
        except UserError as error:
            first = str(error).splitlines()[0]
            return run, [f"what of the policy's size follows from the data is as it assumes: {first}"]


def _of_data(source: RunSource, plugins: Plugins) -> SampledSource:
    """Rows without their pictures; those of one row stand for all: a dataset's pictures are of one size."""
    run = source.run
    rows = open_split(run, plugins, "train")
    if not len(rows):
        raise UserError(f"the dataset {run.data.config_name!r} has no rows for train")
    stats = diagnose(run, rows, rows=STATISTICS_ROWS).stats if run.policy.normalization != "none" else None
    pipeline = build_pipeline(run.data, run.policy, stats)
    indices = np.unique(np.linspace(0, len(rows) - 1, SAMPLED_ROWS).astype(np.int64)).tolist()
    (seen,) = rows.__getitems__(indices[:1])
    pictures = {key: value for key, value in pipeline.encode(seen).items() if key == "images"}
    samples: list[Any] = [
        {**sample, **run.policy.draw(sample_generator(run.seed, 0, place)), **pictures}
        for place, sample in enumerate(encode_without_images(rows, pipeline, indices))
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
            f"{reason}\n  Without the data nothing tells how long samples are: the policy {run.policy.type!r} has no "
            "largest_sample()"
        ) from reason
    drawn: Any = {**sample, **run.policy.draw(sample_generator(run.seed, 0, 0))}
    where = f"{source.name}: " if source.name else ""
    return SampledSource(
        source.share,
        [drawn],
        f"{where}the longest samples that the policy takes",
        f"{where}samples as long as the policy takes, as {_why(data.repo_id, reason)}",
    )


def _why(dataset: str, reason: UserError) -> str:
    """Why data were not read, in a line."""
    # The rest of the message is about reaching the hub; the text plugin's wording differs.
    if any(f"'{dataset}' is {no} file or folder" in str(reason) for no in ("no", "not a")):
        return f"{dataset} is not on this machine, and the hub was not asked"
    return "the data were not read: " + str(reason).splitlines()[0]
