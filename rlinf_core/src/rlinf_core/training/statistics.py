"""The statistics of a run: rank 0 finds or computes them before training, the others read what it wrote."""

from __future__ import annotations

from rlinf_core.config.run import RunConfig
from rlinf_core.data.normalize import Stats, prepare_norm_stats
from rlinf_core.datasets import SampleSource
from rlinf_core.training.distributed import Processes


def run_statistics(run: RunConfig, source: SampleSource, group: Processes, *, resuming: bool) -> Stats | None:
    """The statistics with which this run normalises, kept in `<run>/norm_stats.json`; None if its policy does not.

    Args:
        run: The run.
        source: Training rows.
        group: All ranks call this; they wait for rank 0 as long as it takes.
        resuming: The run continues from a checkpoint, whose weights know only the statistics they were trained with.

    Raises:
        UserError: The run continues but its statistics are gone or no longer those of the data.
    """
    if run.policy.normalization == "none":
        return None
    return group.decide(
        lambda: prepare_norm_stats(
            run.folder / "norm_stats.json",
            source,
            (run.data.repack(), *run.data.transforms()),
            horizon=run.policy.chunk_length(),
            given=run.data.norm_stats,
            read_images=run.data.stats_need_images,
            resuming=resuming,
        )
    )
