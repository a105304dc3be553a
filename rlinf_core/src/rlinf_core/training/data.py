"""`RunData`: a run bound to its datasets, from rows to a trainer's micro batches.

A single dataset is handled like a mixture of one; only the sources of a mixture have names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlinf_core.contract.datasets import DecodingSource, SampleSource, Split
from rlinf_core.contract.evaluation import ValidationBatch
from rlinf_core.contract.policy import PolicyConfig
from rlinf_core.contract.process_group import ProcessGroup
from rlinf_core.contract.run import LoadedPlugins, RunConfig, RunSource
from rlinf_core.data.loading.chunked_sampling import check_streams, chunks_of
from rlinf_core.data.loading.encoding import add_draws
from rlinf_core.data.loading.loader import TrainLoader, build_train_loader
from rlinf_core.data.loading.mixture import Source
from rlinf_core.data.loading.sampling import Batching, steps_per_epoch
from rlinf_core.data.loading.validation import build_validation_batches
from rlinf_core.data.pipeline import Pipeline, build_pipeline, encode_observation
from rlinf_core.data.splits import describe_splits, open_split
from rlinf_core.data.statistics.preview import bind_policy, preview_samples
from rlinf_core.data.statistics.run import run_statistics
from rlinf_core.errors import UserError
from rlinf_core.training.checkpoint.state import statistics_copy
from rlinf_core.training.distributed.processes import to_device


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

    def prepare(self, group: ProcessGroup, *, resuming: bool, checkpoint: Path | None = None) -> RunData:
        """Add the statistics of each dataset, which rank 0 computes or reads, and the pipelines that use them.

        Args:
            group: All ranks call this.
            resuming: The run continues from a checkpoint; see `data.statistics.run.run_statistics`.
            checkpoint: That checkpoint, with whose copy the statistics in the run's folder are compared.

        Raises:
            UserError: The statistics are unusable, or no longer match the data.
        """
        sources, warnings = [], []
        for given, rows in zip(self.run.sources, self.rows, strict=True):
            with given.naming():
                recorded = checkpoint and statistics_copy(checkpoint, given.statistics)
                stats, findings = run_statistics(
                    given.run, rows, group, resuming=resuming, file=given.statistics, recorded=recorded
                )
                pipeline = build_pipeline(given.run.data, self.run.policy, stats)
            sources.append(Source(rows, pipeline, given.name, given.share))
            warnings += [f"{_prefix(given.name)}{finding}" for finding in findings]
        return replace(self, sources=tuple(sources), warnings=tuple(warnings))

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

    def for_evaluators(self, group: ProcessGroup) -> EvaluatedData:
        """The datasets as evaluators see them on this rank."""
        opened = zip(self.run.sources, self.sources, self.held_out, strict=True)
        return EvaluatedData(tuple(EvaluatedSource(*one, self.run.policy, group) for one in opened))

    def facts(self) -> Iterator[str]:
        """Lines to report per dataset: episodes, rows, decoder; in a mixture also how often it is drawn from."""
        for given, rows, held_out in zip(self.run.sources, self.rows, self.held_out, strict=True):
            text = f"data: {describe_splits(rows, held_out)}"
            if isinstance(rows, DecodingSource) and (decoder := rows.try_decoder()):
                text += f"; videos by {decoder}"
            yield f"{given.name}: {text}; {given.drawn(len(rows), self.size)}" if given.name else text

    def sample_facts(self) -> Iterator[str]:
        """What the policy reports about the samples of each dataset."""
        for given, source in zip(self.run.sources, self.sources, strict=True):
            if not given.run.data.stats_need_images:
                for name, fact in self.run.policy.describe(preview_samples(source.rows, source.pipeline)).items():
                    yield f"{_prefix(source.name)}{name}: {fact}"


@dataclass(frozen=True, eq=False)
class EvaluatedSource:
    """A dataset of the run as evaluators see it: a `contract.evaluation.EvaluationSource`."""

    given: RunSource
    source: Source
    held_out: SampleSource | None
    policy: PolicyConfig
    group: ProcessGroup

    @property
    def name(self) -> str:
        """Its name in the mixture; empty if the run has one dataset."""
        return self.source.name

    @property
    def share(self) -> float:
        """The probability that a training sample comes from it."""
        return self.source.share

    @property
    def rows(self) -> SampleSource:
        """The training rows."""
        return self.source.rows

    @property
    def pipeline(self) -> Pipeline:
        """Its transforms, with the run's statistics."""
        return self.source.pipeline

    def batches(
        self, samples: int, *, micro_batch_size: int | None = None, divided: bool = True
    ) -> Iterator[ValidationBatch]:
        """Batches of held-out rows on this rank's device; none if there are no held-out rows."""
        if self.held_out is None:
            return
        run, group = self.given.run, self.group
        found = build_validation_batches(
            self.held_out,
            self.pipeline,
            self.policy,
            seed=run.seed,
            val_samples=samples,
            micro_batch_size=micro_batch_size or run.trainer.micro_batch_size,
            rank=group.rank if divided else 0,
            world_size=group.size if divided else 1,
        )
        for batch, rows in found:
            yield ValidationBatch(to_device(batch, group.device), rows)

    def act(
        self, policy: Any, observations: Sequence[Mapping[str, Any]], generators: Sequence[np.random.Generator]
    ) -> list[NDArray[np.floating]]:
        """The policy's actions for observations, [H, D] each, in the data's units."""
        if not self.policy.chunk_length():
            raise UserError(
                f"the policy {self.policy.type!r} has no actions: it cannot act in a simulator or on a robot"
            )
        with self.given.naming():
            samples = [encode_observation(self.pipeline, self.given.run.data, dict(one)) for one in observations]
        drawn = add_draws(samples, self.policy, generators)
        batch = to_device(self.policy.collate(drawn), self.group.device)
        actions = policy.sample_actions(batch, batch["noise"]).float().cpu().numpy()
        return [self.pipeline.decode(chunk, sample) for chunk, sample in zip(actions, drawn, strict=True)]


@dataclass(frozen=True)
class EvaluatedData:
    """The data of a run as evaluators see them: a `contract.evaluation.EvaluationData`."""

    sources: tuple[EvaluatedSource, ...]


def check_batching(run: RunConfig, ranks: int) -> None:
    """Raise `UserError` if the batches, or the streams of the chunked order, cannot be divided among the ranks."""
    run.trainer.check_ranks(ranks)
    _ = Batching.of(run, 0, ranks).accumulation
    check_streams(chunks_of(run.data), ranks)


def _open(source: RunSource, plugins: LoadedPlugins, split: Split) -> SampleSource:
    with source.naming():
        return open_split(source.run, plugins, split)


def _prefix(source: str) -> str:
    return f"{source}: " if source else ""
