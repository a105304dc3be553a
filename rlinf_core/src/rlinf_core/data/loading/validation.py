"""Batches of held-out rows: every validation uses the same rows with the same random numbers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rlinf_core.contract.evaluation import ValidationBatch, ValidationRow
from rlinf_core.contract.policy import PolicyConfig
from rlinf_core.data.loading.encoding import add_draws
from rlinf_core.data.loading.mixture import Source
from rlinf_core.data.loading.replacement import load_rows
from rlinf_core.data.loading.sampling import validation_generator
from rlinf_core.terminal import warn


def build_validation_batches(
    source: Source,
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
        source: Held-out rows; bad ones are replaced by others of them if their dataset wants that.
        policy: Draws and collates.
        seed: Seed of the draws.
        val_samples: Rows to use over all ranks, evenly spread; all of them if there are fewer.
        micro_batch_size: Most rows per batch.
        rank: This process, from 0.
        world_size: Number of ranks.
    """
    chosen = np.unique(
        np.linspace(0, len(source.rows) - 1, min(val_samples, len(source.rows))).round().astype(np.int64)
    )
    batches = -(-len(chosen) // (world_size * micro_batch_size))
    for part in np.array_split(chosen[rank::world_size], batches):
        indices = part.tolist() or [int(chosen[0])]
        loaded = load_rows(source, indices, seed=seed, epoch=0)
        generators = (validation_generator(seed, index) for index in indices)
        samples = add_draws([one.sample for one in loaded], policy, generators)
        used = [one.replaced.by if one.replaced else index for index, one in zip(indices, loaded, strict=True)]
        for bad in filter(None, (one.replaced for one in loaded)):
            warn(f"a held-out row was replaced by {source.rows.describe(bad.by)}: {bad.error}")
        targets = [source.pipeline.target(one.row) for one in loaded]
        counted = [ValidationRow(*row) for row in zip(used, samples, targets, strict=True)] if part.size else []
        yield ValidationBatch(policy.collate(samples), counted)
