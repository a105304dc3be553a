"""`RunData`: a run bound to its datasets, from rows to a trainer's micro batches.

A single dataset is handled like a mixture of one; only the sources of a mixture have names.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlinf_core.contract.datasets import DecodingSource, SampleSource, Split
from rlinf_core.contract.process_group import ProcessGroup
from rlinf_core.contract.run import LoadedPlugins, RunConfig, RunSource
from rlinf_core.data.coverage import FILE, measure
from rlinf_core.data.loading.chunked_sampling import check_streams, chunks_of
from rlinf_core.data.loading.loader import TrainLoader, build_train_loader
from rlinf_core.data.loading.mixture import Source
from rlinf_core.data.loading.sampling import Batching, steps_per_epoch
from rlinf_core.data.normalize import Vector
from rlinf_core.data.pipeline import build_pipeline
from rlinf_core.data.sample import Sample
from rlinf_core.data.splits import describe_splits, open_split
from rlinf_core.data.statistics.preview import bind_policy, preview_samples
from rlinf_core.data.statistics.run import run_statistics
from rlinf_core.errors import UserError
from rlinf_core.files import write_text

ROWS_WITH_IMAGES = 4
"""Rows of each dataset whose image sizes are looked at when a run begins."""


@dataclass(frozen=True, eq=False)
class RunData:
    """A run whose policy is bound to its data. `open` opens the rows, `prepare` adds statistics and pipelines."""

    run: RunConfig
    """The run; its policy knows the `PolicyConfig.data_layout` of the data."""
    rows: tuple[SampleSource, ...]
    """The training rows of each dataset."""
    held_out: tuple[SampleSource | None, ...]
    """The held-out rows of each dataset; None if the run does not validate or the dataset holds out nothing."""
    layout: Mapping[str, Sequence[int]]
    """The `PolicyConfig.data_layout`: what the module's layout takes from the data; saved in checkpoints."""
    sources: tuple[Source, ...] = ()
    """The datasets with their pipelines, for the loader; empty before `prepare`."""
    warnings: tuple[str, ...] = field(default=())
    """Warnings about the statistics; empty before `prepare`."""
    states: tuple[tuple[Vector, Vector] | None, ...] = ()
    """The smallest and the largest state of each dataset; None if it is not known, as when a run continues."""

    @classmethod
    def open(cls, run: RunConfig, plugins: LoadedPlugins) -> RunData:
        """Open the rows of all splits that the run uses, and bind its policy to them.

        Raises:
            UserError: A dataset cannot be opened, or a split has no rows.
        """
        rows = tuple(_open(source, plugins, "train") for source in run.sources)
        run, layout = bind_policy(run, plugins)
        validates = run.runner.val_check_interval
        held_out = tuple(
            _open(source, plugins, "validation") if validates and source.run.data.has_validation else None
            for source in run.sources
        )
        return cls(run, rows, held_out, layout)

    def prepare(self, group: ProcessGroup, *, resuming: bool) -> RunData:
        """Add the statistics of each dataset, which rank 0 computes or reads, and the pipelines that use them.

        Args:
            group: All ranks call this.
            resuming: The run continues from a checkpoint; see `data.statistics.run.run_statistics`.

        Raises:
            UserError: The statistics are unusable, or no longer match the data.
        """
        sources, warnings, states = [], [], []
        for given, rows in zip(self.run.sources, self.rows, strict=True):
            with given.naming():
                prepared = run_statistics(given.run, rows, group, resuming=resuming, file=given.statistics)
                pipeline = build_pipeline(given.run.data, self.run.policy, prepared.stats)
            sources.append(Source(rows, pipeline, given.name, given.share))
            warnings += [f"{_prefix(given.name)}{finding}" for finding in prepared.findings]
            states.append(prepared.state)
        return replace(self, sources=tuple(sources), warnings=tuple(warnings), states=tuple(states))

    @cached_property
    def size(self) -> int:
        """Training rows of all datasets: the samples of an epoch, before it is cut to whole steps."""
        return sum(map(len, self.rows))

    @cached_property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
        return steps_per_epoch(self.size, self.run.trainer.global_batch_size)

    @property
    def stop_step(self) -> int:
        """The last step of the run."""
        return self.run.runner.stop_step(self.steps_per_epoch)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what the rows are made of; empty if the policy normalizes, as the statistics record their own."""
        if self.run.policy.normalization != "none":
            return ""
        return " ".join(source.fingerprint() for source in self.rows)

    def loader(self, group: ProcessGroup, start_step: int) -> TrainLoader:
        """This rank's micro batches of the steps after `start_step`."""
        batching, chunks = Batching.of(self.run, group.rank, group.size), chunks_of(self.run.data)
        return build_train_loader(
            self.sources,
            self.run.policy,
            batching,
            (start_step, self.stop_step),
            num_workers=self.run.data.num_workers,
            pin_memory=group.device.type == "cuda",
            chunks=chunks,
        )

    def facts(self) -> Iterator[str]:
        """Lines to report per dataset: episodes, rows, decoder; in a mixture also how often it is drawn from."""
        for given, rows, held_out in zip(self.run.sources, self.rows, self.held_out, strict=True):
            text = f"data: {describe_splits(rows, held_out)}"
            if isinstance(rows, DecodingSource) and (decoder := rows.try_decoder()):
                text += f"; videos by {decoder}"
            yield f"{given.name}: {text}; {given.drawn(len(rows), self.size)}" if given.name else text

    def sample_facts(self) -> Iterator[str]:
        """What the policy reports about the samples of each dataset; warnings start with `warning: `."""
        for given, source, samples in zip(self.run.sources, self.sources, self._previews, strict=True):
            if not given.run.data.stats_need_images:
                for name, fact in self.run.policy.describe(samples).items():
                    yield described(name, fact, source.name)

    @cached_property
    def _previews(self) -> tuple[Iterable[Sample], ...]:
        """Encoded rows spread over each dataset; kept if the policy acts, as they are then read twice."""
        previews = (preview_samples(source.rows, source.pipeline) for source in self.sources)
        both = zip(self.run.sources, previews, strict=True)
        return tuple(list(samples) if self._acts(given) else samples for given, samples in both)

    def _acts(self, given: RunSource) -> bool:
        return self.run.policy.chunk_length() > 0 and not given.run.data.stats_need_images

    def save_coverage(self) -> None:
        """Write what training sees into the run's folder, for `rlinf export`; nothing for policies without actions."""
        found = {}
        for given, source, samples, state in zip(
            self.run.sources, self.sources, self._previews, self.states, strict=True
        ):
            if self.run.policy.chunk_length():
                seen = samples if self._acts(given) else ()
                images = _some_images(source)
                found[given.name] = measure(seen, self.run.policy.measured, images, state).model_dump(mode="json")
        if found:
            write_text(self.run.folder / FILE, json.dumps(found, indent=1) + "\n")


def _some_images(source: Source) -> Iterator[Mapping[str, NDArray[Any]]]:
    """The images of some rows before any transform; of none if they cannot be read, which the loader will report."""
    rows = np.unique(np.linspace(0, len(source.rows) - 1, ROWS_WITH_IMAGES).astype(np.int64)).tolist()
    try:
        for row in source.rows.__getitems__(rows):
            yield source.pipeline.target(row).get("images", {})
    except UserError:
        return


def check_batching(run: RunConfig, ranks: int) -> None:
    """Raise `UserError` if the batches, or the streams of the chunked order, cannot be divided among the ranks."""
    run.trainer.check_ranks(ranks)
    _ = Batching.of(run, 0, ranks).accumulation
    check_streams(chunks_of(run.data), ranks)


def _open(source: RunSource, plugins: LoadedPlugins, split: Split) -> SampleSource:
    with source.naming():
        return open_split(source.run, plugins, split)


WARNING = "warning: "


def described(name: str, fact: str, source: str = "") -> str:
    """A line for one of the policy's facts about samples; a warning stays one."""
    if fact.startswith(WARNING):
        return f"{WARNING}{_prefix(source)}{fact.removeprefix(WARNING)}"
    return f"{_prefix(source)}{name}: {fact}"


def _prefix(source: str) -> str:
    return f"{source}: " if source else ""
