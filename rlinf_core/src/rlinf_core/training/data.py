"""`RunData`: a run bound to its datasets, from rows to a trainer's micro batches.

A single dataset is handled like a mixture of one; only the sources of a mixture have names.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rlinf_core.contract.datasets import (
    DecodingSource,
    ReportingSource,
    SampleSource,
    Split,
    StillSource,
    TaskSource,
    TimedSource,
)
from rlinf_core.contract.evaluation import ValidationBatch
from rlinf_core.contract.policy import PolicyConfig
from rlinf_core.contract.process_group import ProcessGroup
from rlinf_core.contract.run import LoadedPlugins, RunConfig, RunSource
from rlinf_core.data.coverage import FILE, list_tasks, measure
from rlinf_core.data.images.still import still_camera
from rlinf_core.data.loading.chunked_sampling import check_streams, chunks_of
from rlinf_core.data.loading.encoding import add_draws
from rlinf_core.data.loading.loader import TrainLoader, build_train_loader
from rlinf_core.data.loading.mixture import Source
from rlinf_core.data.loading.sampling import Batching, steps_per_epoch
from rlinf_core.data.loading.validation import build_validation_batches
from rlinf_core.data.normalize import Vector
from rlinf_core.data.pipeline import Pipeline, build_pipeline, encode_observation
from rlinf_core.data.sample import Sample
from rlinf_core.data.splits import describe_splits, open_split
from rlinf_core.data.statistics.names import name_dimensions
from rlinf_core.data.statistics.preview import bind_policy, preview_samples
from rlinf_core.data.statistics.rates import compare_rates
from rlinf_core.data.statistics.run import run_statistics
from rlinf_core.errors import UserError
from rlinf_core.files import write_text
from rlinf_core.training.checkpoint.image_files import (
    Record,
    changed_since,
    compare_images,
    record_images,
    write_record,
)
from rlinf_core.training.checkpoint.state import NO_BEST, Position, statistics_copy
from rlinf_core.training.distributed.processes import to_device
from rlinf_core.training.distributed.same_inputs import check_same_files
from rlinf_core.training.stopping import Best

if TYPE_CHECKING:
    from rlinf_core.training.state.build import TrainState

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
    """Warnings about statistics and data; empty before `prepare`."""
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

    def prepare(
        self, group: ProcessGroup, *, resuming: bool, checkpoint: Path | None = None, allow_change: bool = False
    ) -> RunData:
        """Add the statistics of each dataset, which rank 0 computes or reads, and the pipelines that use them.

        Args:
            group: All ranks call this.
            resuming: The run continues from a checkpoint; see `data.statistics.run.run_statistics`.
            checkpoint: That checkpoint, with whose copy the statistics in the run's folder are compared, and with
                whose record the image files.
            allow_change: Whether it may continue with other image files, or on other rows than those of its
                statistics.

        Raises:
            UserError: The statistics are unusable, or no longer match the data; or machines have different files; or
                image files have changed since the checkpoint was saved.
        """
        names = [source.name for source in self.run.sources]
        opened = zip(names, self.rows, self.held_out, strict=True)
        check_same_files(self.run, opened, group, with_weights=not resuming)
        sources, warnings, states = [], self._compare_images(group, checkpoint, allow_change=allow_change), []
        for given, rows in zip(self.run.sources, self.rows, strict=True):
            with given.naming():
                recorded = checkpoint and statistics_copy(checkpoint, given.statistics)
                options = {"resuming": resuming, "allow_other_rows": allow_change}
                found = run_statistics(given.run, rows, group, file=given.statistics, recorded=recorded, **options)
                pipeline = build_pipeline(given.run.data, self.run.policy, found.stats)
            sources.append(Source.of(given, rows, pipeline))
            reported = rows.warnings() if isinstance(rows, ReportingSource) else ()
            warnings += [f"{_prefix(given.name)}{finding}" for finding in (*found.findings, *reported)]
            states.append(found.state)
        if not resuming:
            warnings += compare_rates(list(zip(self.run.sources, self.rows, strict=True)))
        prepared = replace(self, sources=tuple(sources), warnings=tuple(warnings), states=tuple(states))
        _ = prepared.fingerprint  # Now: a save must not depend on files that may be gone by then.
        return prepared

    def _compare_images(self, group: ProcessGroup, checkpoint: Path | None, *, allow_change: bool) -> list[str]:
        """Compare the image files with those of the checkpoint, and record them for the next ones."""

        def compare() -> list[str]:
            record = self._record_images()
            changes = compare_images(checkpoint, record, allow_change=allow_change) if checkpoint else ""
            write_record(self.run.folder, record)
            return [f"the run continues with other image files: {changes}"] if changes else []

        return group.decide(compare)

    def _record_images(self) -> Record:
        return record_images(zip((source.name for source in self.run.sources), self.rows, strict=True))

    def images_changed(self) -> str:
        """The image files that have changed since the run started, on rank 0; empty if none has."""
        return changed_since(self.run.folder, self._record_images())

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

    def position(self, step: int, state: TrainState, *, validated: int = 0, best: Best = NO_BEST) -> Position:
        """The position of a checkpoint after `step` finished steps.

        Args:
            step: Finished optimizer steps.
            state: What the checkpoint holds.
            validated: The step of the last validation.
            best: The best validation so far.
        """
        batch = self.run.trainer.global_batch_size
        return Position(
            step=step,
            epoch=step // self.steps_per_epoch,
            sample=step % self.steps_per_epoch * batch,
            rows=self.size,
            seed=self.run.seed,
            layout=state.layout,
            validated=validated,
            best=best,
            data=self.fingerprint,
            data_layout=self.layout,
            adapters=state.adapters.recorded(),
        )

    def facts(self) -> Iterator[str]:
        """Lines to report per dataset: episodes, rows, decoder; in a mixture also how often it is drawn from."""
        for given, rows, held_out in zip(self.run.sources, self.rows, self.held_out, strict=True):
            text = f"data: {describe_splits(rows, held_out)}"
            if isinstance(rows, DecodingSource) and (decoder := _try_decoder(rows, given)):
                text += f"; videos by {decoder}"
            yield f"{given.name}: {text}; {given.drawn(len(rows), self.size)}" if given.name else text
            if isinstance(rows, ReportingSource):
                yield from (f"{_prefix(given.name)}{name}: {fact}" for name, fact in rows.facts().items())

    def still_cameras(self) -> Iterator[str]:
        """A warning per camera that was the same in all rows that `facts` decoded."""
        for given, rows in zip(self.run.sources, self.rows, strict=True):
            if isinstance(rows, StillSource):
                for column, what in rows.still_images().items():
                    yield f"{_prefix(given.name)}{still_camera(column, what)}"

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
                covered = measure(seen, self.run.policy.measured, images, state)
                found[given.name] = covered.model_copy(update=_named(given, source)).model_dump(mode="json")
        if found:
            write_text(self.run.folder / FILE, json.dumps(found, indent=1) + "\n")


def _named(given: RunSource, source: Source) -> dict[str, Any]:
    """What the dataset says of its rows, as fields of a `Coverage`: tasks, rate and names."""
    rows, found = source.rows, dict[str, Any]()
    if isinstance(rows, TaskSource):
        numbers, texts = rows.tasks()
        found |= list_tasks(texts.get(number, "") for number in np.unique(numbers).tolist())
    if isinstance(rows, TimedSource) and (seconds := rows.step_seconds()) > 0:
        found["fps"] = 1 / seconds
    return found | {"names": dict(name_dimensions(given.run.data, rows, [given.run.data.repack()]))}


def _some_images(source: Source) -> Iterator[Mapping[str, NDArray[Any]]]:
    """The images of some rows before any transform; of none if they cannot be read, which the loader will report."""
    rows = np.unique(np.linspace(0, len(source.rows) - 1, ROWS_WITH_IMAGES).astype(np.int64)).tolist()
    try:
        for row in source.rows.__getitems__(rows):
            yield source.pipeline.target(row).get("images", {})
    except UserError:
        return


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
            replace(self.source, rows=self.held_out),
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


def _try_decoder(rows: DecodingSource, given: RunSource) -> str:
    """The decoder and its speed; it need not fail where training would replace a bad sample."""
    try:
        return rows.try_decoder()
    except UserError:
        if given.run.data.on_bad_sample == "stop":
            raise
        return "a decoder whose speed is not known, as one of the frames tried cannot be read"


WARNING = "warning: "


def described(name: str, fact: str, source: str = "") -> str:
    """A line for one of the policy's facts about samples; a warning stays one."""
    if fact.startswith(WARNING):
        return f"{WARNING}{_prefix(source)}{fact.removeprefix(WARNING)}"
    return f"{_prefix(source)}{name}: {fact}"


def _prefix(source: str) -> str:
    return f"{source}: " if source else ""
