"""The datasets of a run on their way into the trainer: rows, statistics, pipelines, and each one's loss.

A run of one dataset and a mixture go the same way; only a mixture's sources have names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlinf_core.contract.datasets import SampleSource, Split
from rlinf_core.contract.process_group import ProcessGroup
from rlinf_core.contract.run import LoadedPlugins, RunConfig, RunSource
from rlinf_core.data.lerobot.source import LeRobotSource
from rlinf_core.data.loading.chunked_sampling import chunks_of
from rlinf_core.data.loading.loader import build_train_loader
from rlinf_core.data.loading.mixture import Source
from rlinf_core.data.pipeline import build_pipeline
from rlinf_core.data.splits import describe_splits, open_split
from rlinf_core.data.statistics.preview import different_prompts, preview_samples
from rlinf_core.data.statistics.run import run_statistics
from rlinf_core.errors import UserError


def open_training_rows(run: RunConfig, plugins: LoadedPlugins) -> list[SampleSource]:
    """The training rows of each dataset."""
    return [_open(source, plugins, "train") for source in run.sources]


def _open(source: RunSource, plugins: LoadedPlugins, split: Split) -> SampleSource:
    with source.naming():
        rows = open_split(source.run, plugins, split)
        if not len(rows):
            raise UserError(f"the dataset {source.run.data.config_name!r} has no rows for {split}")
        return rows


def know_data(run: RunConfig, plugins: LoadedPlugins) -> tuple[RunConfig, Mapping[str, Sequence[int]]]:
    """The run with a policy that knows the data as far as its layout follows from them, and what it knows."""
    layout = run.policy.data_layout(_prompts(run, plugins))
    return run.model_copy(update={"policy": run.policy.with_data_layout(layout)}), layout


def _prompts(run: RunConfig, plugins: LoadedPlugins) -> Iterator[str]:
    for source in run.sources:
        data = source.run.data
        splits: tuple[Split, ...] = ("train", "validation") if data.has_validation else ("train",)
        for split in splits:
            with source.naming():
                rows, transforms = _open(source, plugins, split), (data.repack(), *data.transforms())
                yield from different_prompts(rows, transforms, read_images=data.stats_need_images)


def open_loader(run: RunConfig, sources: Sequence[Source], group: ProcessGroup, start_step: int, stop_step: int) -> Any:
    """This rank's micro batches from the step after `start_step` to `stop_step`."""
    return build_train_loader(
        sources,
        run.policy,
        seed=run.seed,
        global_batch_size=run.trainer.global_batch_size,
        micro_batch_size=run.trainer.micro_batch_size,
        rank=group.rank,
        world_size=group.size,
        start_step=start_step,
        stop_step=stop_step,
        num_workers=run.data.num_workers,
        pin_memory=group.device.type == "cuda",
        chunks=chunks_of(run.data),
    )


def made_of(run: RunConfig, rows: Sequence[SampleSource]) -> str:
    """A hash of what the rows are made of; empty where statistics are, which know what they were computed from."""
    return "" if run.policy.normalization != "none" else " ".join(source.fingerprint() for source in rows)


def build_sources(
    run: RunConfig, rows: Sequence[SampleSource], group: ProcessGroup, *, resuming: bool
) -> tuple[tuple[Source, ...], list[str]]:
    """The datasets as the loader takes them, and warnings about their statistics.

    Args:
        run: The run.
        rows: What `open_training_rows` gave.
        group: All ranks call this.
        resuming: See `training.statistics.run_statistics`, which says what is raised, too.
    """
    sources, warnings = [], []
    for source, own in zip(run.sources, rows, strict=True):
        with source.naming():
            stats, found = run_statistics(source.run, own, group, resuming=resuming, file=source.statistics)
            pipeline = build_pipeline(source.run.data, run.policy, stats)
        sources.append(Source(own, pipeline, source.name, source.share))
        warnings += [f"{source.name}: {finding}" if source.name else str(finding) for finding in found]
    return tuple(sources), warnings


def open_held_out_rows(run: RunConfig, plugins: LoadedPlugins) -> list[SampleSource | None]:
    """The held-out rows of each dataset; None where the run does not validate, or a source holds out nothing."""
    return [
        _open(source, plugins, "validation")
        if run.runner.val_check_interval and source.run.data.has_validation
        else None
        for source in run.sources
    ]


def describe_splits_of(
    run: RunConfig, sources: Sequence[Source], held_out: Sequence[SampleSource | None]
) -> Iterator[str]:
    """Episodes and rows of each dataset and, in a mixture, how often it is drawn from."""
    total = sum(len(source.rows) for source in sources)
    for given, source, own in zip(run.sources, sources, held_out, strict=True):
        text = f"data: {describe_splits(source.rows, own)}"
        if isinstance(source.rows, LeRobotSource) and (decoder := source.rows.try_decoder()):
            text += f"; videos by {decoder}"
        yield f"{source.name}: {text}; {given.drawn(len(source.rows), total)}" if source.name else text


def describe_samples(run: RunConfig, sources: Sequence[Source]) -> Iterator[str]:
    """The policy's facts of each dataset."""
    for given, source in zip(run.sources, sources, strict=True):
        if not given.run.data.stats_need_images:
            for name, fact in run.policy.describe(preview_samples(source.rows, source.pipeline)).items():
                yield f"{source.name}: {name}: {fact}" if source.name else f"{name}: {fact}"


def source_losses(sources: Sequence[Source], sums: Sequence[float]) -> dict[str, float]:
    """`loss/<name>` of the sources that the step has samples of, from `step.source_sums` of the global batch."""
    pairs = zip(sources, sums[::2], sums[1::2], strict=True) if sums else ()
    return {f"loss/{source.name}": loss / weight for source, loss, weight in pairs if weight}


def missing_losses(sources: Sequence[Source], metrics: Mapping[str, float]) -> str:
    """What to tell of a mixture whose first step has no losses of sources; empty where it has."""
    if len(sources) == 1 or any(key.startswith("loss/") for key in metrics):
        return ""
    return "note: no loss/<source> is measured: the policy does not tell PolicyOutput.sample_losses"
