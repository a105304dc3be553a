"""Batches of held-out rows: every validation uses the same rows with the same random numbers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rlinf_core.contract.datasets import SampleSource
from rlinf_core.contract.evaluation import ValidationBatch, ValidationRow
from rlinf_core.contract.policy import PolicyConfig
from rlinf_core.data.loading.encoding import add_draws, encode_rows, read_rows
from rlinf_core.data.loading.sampling import validation_generator
from rlinf_core.data.pipeline import Pipeline


def build_validation_batches(
    source: SampleSource,
    pipeline: Pipeline,
    policy: PolicyConfig,
    *,
    seed: int,
    val_samples: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
) -> Iterator[ValidationBatch]:
    """A rank's share of the held-out rows of a validation, with the same rows and draws each time.

    Every rank yields the same number of batches, because sharded forward passes need all ranks; sizes differ by at most
    one. A rank without a row for a batch yields a filler, whose `rows` are empty.

    Args:
        source: Held-out rows.
        pipeline: Encodes them.
        policy: Draws and collates.
        seed: Seed of the draws.
        val_samples: Rows to use over all ranks, evenly spread; all of them if there are fewer.
        micro_batch_size: Most rows per batch.
        rank: This process, from 0.
        world_size: Number of ranks.
    """
    chosen = np.unique(np.linspace(0, len(source) - 1, min(val_samples, len(source))).round().astype(np.int64))
    batches = -(-len(chosen) // (world_size * micro_batch_size))
    for part in np.array_split(chosen[rank::world_size], batches):
        indices = part.tolist() or [int(chosen[0])]
        rows = read_rows(source, indices)
        generators = (validation_generator(seed, index) for index in indices)
        samples = add_draws(encode_rows(source, indices, rows, pipeline), policy, generators)
        targets = [pipeline.target(row) for row in rows]
        counted = [ValidationRow(*row) for row in zip(indices, samples, targets, strict=True)] if part.size else []
        yield ValidationBatch(policy.collate(samples), counted)
