"""Batches of samples, decoded in worker processes; which rows they hold, `data.order` says."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from rlinf_core.data.mixture import Indices, Source, order_of
from rlinf_core.data.order import check_batch, sample_generator, steps_per_epoch, validation_generator
from rlinf_core.data.pipeline import Pipeline
from rlinf_core.data.sample import Batch, Row, Sample
from rlinf_core.datasets import SampleSource
from rlinf_core.errors import UserError
from rlinf_core.policy import PolicyConfig

SOURCE = "rlinf_source"
"""Key of a mixture's training batches, which the trainer takes out: int64 [B], the number of each sample's source."""


@dataclass
class MicroBatches(Dataset[Any]):
    """The micro batches of one rank by number: with `a` of them a step, number i is the `i % a`-th of step `i // a`."""

    sources: Sequence[Source]
    policy: PolicyConfig
    seed: int
    global_batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        self.accumulation = check_batch(self.global_batch_size, self.micro_batch_size, self.world_size)
        rows = sum(len(source.rows) for source in self.sources)
        self.steps_per_epoch = steps_per_epoch(rows, self.global_batch_size)
        self._order = order_of(self.sources, self.seed, self.steps_per_epoch * self.global_batch_size)
        self._epoch: tuple[int, tuple[Indices, Indices]] | None = None

    def __getitem__(self, number: int) -> Batch | UserError:
        """A collated micro batch; a `UserError` is returned, as raised ones lose their form between processes."""
        step, micro = divmod(number, self.accumulation)
        epoch, step = divmod(step, self.steps_per_epoch)
        start = step * self.global_batch_size + (micro * self.world_size + self.rank) * self.micro_batch_size
        positions = slice(start, start + self.micro_batch_size)
        numbers, indices = (order[positions] for order in self._order_of_epoch(epoch))
        generators = [sample_generator(self.seed, epoch, position) for position in range(start, positions.stop)]
        try:
            batch = self.policy.collate(self._samples(numbers, indices, generators))
        except UserError as e:
            return e
        return batch if len(self.sources) == 1 else {**batch, SOURCE: torch.from_numpy(numbers.copy())}

    def _samples(self, numbers: Indices, indices: Indices, generators: Sequence[np.random.Generator]) -> list[Sample]:
        """The samples of a micro batch; each source's rows are read at once."""
        samples: dict[int, Sample] = {}
        for number in np.unique(numbers):
            source, places = self.sources[number], np.flatnonzero(numbers == number).tolist()
            own = indices[places].tolist()
            rows = read_rows(source.rows, own)
            draws = [generators[place] for place in places]
            encoded = encode_rows(source.rows, own, rows, source.pipeline, self.policy, draws)
            samples |= zip(places, encoded, strict=True)
        return [samples[place] for place in range(len(numbers))]

    def _order_of_epoch(self, epoch: int) -> tuple[Indices, Indices]:
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self._order.epoch(epoch)
        return self._epoch[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_epoch": None}


class TrainLoader(DataLoader[Any]):
    """A `DataLoader` of micro batches that raises the `UserError`s its workers hand over."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Micro batches, in order."""
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                raise batch
            yield batch


def build_train_loader(
    sources: Sequence[Source],
    policy: PolicyConfig,
    *,
    seed: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    start_step: int,
    stop_step: int,
    num_workers: int,
    pin_memory: bool,
) -> TrainLoader:
    """A rank's micro batches of the steps `start_step` to `stop_step - 1`, in the order of use.

    Args:
        sources: The datasets with their training rows; of several, batches tell each sample's under `SOURCE`.
        policy: Draws each sample's random numbers and collates.
        seed: Keys order and draws.
        global_batch_size: Samples a step, over all ranks.
        micro_batch_size: Samples a batch.
        rank: This process, from 0.
        world_size: Number of ranks.
        start_step: Finished steps of the run, counted over all epochs.
        stop_step: Steps of the whole run.
        num_workers: Processes that read ahead; 0: read when asked.
        pin_memory: Whether batches are put into page-locked memory, for copies to a GPU that do not wait.

    Raises:
        UserError: The sizes do not divide, the rows do not fill a step, or (while iterating) a row cannot be read.
    """
    batches = MicroBatches(sources, policy, seed, global_batch_size, micro_batch_size, rank, world_size)
    numbers = range(start_step * batches.accumulation, stop_step * batches.accumulation)
    return TrainLoader(
        batches,
        sampler=numbers,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        multiprocessing_context=_worker_context() if num_workers else None,
        worker_init_fn=_leave_signals_to_the_run if num_workers else None,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # Else the loader draws from the process's own and shifts its numbers.
    )


def _worker_context() -> Any:
    """Workers fork from a server that has imported this module and runs no threads: quick to start, and no lock or
    decoder of the training process comes along.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    # A server that a scheduler's SIGTERM ends takes its workers along; they inherit that they do not hear it.
    resource_tracker.ensure_running()  # Starting it would let the signal through again.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def _leave_signals_to_the_run(_: int) -> None:
    """Obey the training process only: Ctrl-C and a scheduler's SIGTERM reach the workers as well, but a run that was
    asked to stop needs them until its step is done.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return  # macOS has no schedulers that signal whole groups.
    # SIGTERM is blocked in this thread and in all that it starts, and waits for the one thread that asks who sent it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey_the_run, daemon=True).start()


def _obey_the_run() -> None:
    run = multiprocessing.parent_process()
    while run and signal.sigwaitinfo({signal.SIGTERM}).si_pid != run.pid:
        pass
    os._exit(1)


def _as_it_is(batch: Any) -> Any:
    return batch


def read_rows(source: SampleSource, indices: Sequence[int]) -> list[Row]:
    """Rows with their images; an error names the row that cannot be read."""
    try:
        return source.__getitems__(indices)
    except Exception:
        for index in indices:
            with _naming(source, index):
                source.__getitems__([index])
        raise


def encode_rows(
    source: SampleSource,
    indices: Sequence[int],
    rows: Sequence[Row],
    pipeline: Pipeline,
    policy: PolicyConfig,
    generators: Sequence[np.random.Generator],
) -> list[Sample]:
    """Samples with their random numbers; an error names the row it comes from."""
    samples: list[Any] = []
    for index, row, generator in zip(indices, rows, generators, strict=True):
        with _naming(source, index):
            samples.append(pipeline.encode(row) | policy.draw(generator))
    return samples


@contextlib.contextmanager
def _naming(source: SampleSource, index: int) -> Iterator[None]:
    """Say where an error comes from: in the message of a `UserError`, in a note below the traceback of others."""
    try:
        yield
    except UserError as e:
        raise UserError(f"{e} [{source.describe(index)}]") from e
    except Exception as e:
        e.add_note(f"while preparing the row {source.describe(index)}")
        raise


class ValidationRow(NamedTuple):
    """A held-out row as the policy sees it and as the data have it."""

    row: int
    """Its index in the source."""
    sample: Sample
    """Encoded; `Pipeline.decode` needs it."""
    target: Sample
    """In the data's own units: the `actions` that decoded ones are compared with."""


class ValidationBatch(NamedTuple):
    """A micro batch of held-out rows."""

    batch: Batch
    rows: list[ValidationRow]
    """The rows of the batch; empty if another rank's or an earlier batch's row only fills it: it must not count."""


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
    """A rank's share of the held-out rows that validations look at: the same rows and draws each time.

    Every rank yields equally many batches, as sharded forward passes need all ranks; their sizes differ by one at
    most. A rank without a row for a batch yields a filling one, whose `rows` are empty.

    Args:
        source: Held-out rows.
        pipeline: Makes samples of them.
        policy: Draws and collates.
        seed: Keys the draws.
        val_samples: Rows to look at over all ranks, evenly spread; all of them if there are fewer.
        micro_batch_size: Largest number of rows a batch.
        rank: This process, from 0.
        world_size: Number of ranks.
    """
    chosen = np.unique(np.linspace(0, len(source) - 1, min(val_samples, len(source))).round().astype(np.int64))
    batches = -(-len(chosen) // (world_size * micro_batch_size))
    for part in np.array_split(chosen[rank::world_size], batches):
        indices = part.tolist() or [int(chosen[0])]
        generators = [validation_generator(seed, index) for index in indices]
        rows = read_rows(source, indices)
        samples = encode_rows(source, indices, rows, pipeline, policy, generators)
        targets = [pipeline.target(row) for row in rows]
        counted = [ValidationRow(*row) for row in zip(indices, samples, targets, strict=True)] if part.size else []
        yield ValidationBatch(policy.collate(samples), counted)
