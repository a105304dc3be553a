"""Micro batches in chunked order (contract 13): each run of frames is read once, by the worker that owns its stream.

With several workers, a micro batch is made in as many parts: each worker makes the samples of its own streams, and the
training process joins them. So samples are sent uncollated, in one block of shared memory, and the training process
collates them (a few milliseconds).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from rlinf_core.contract.datasets import PrefetchingSource
from rlinf_core.data.batch_memory import batch_tensor
from rlinf_core.data.loading.chunked_sampling import ChunkedEpoch, ChunkedOrder, Chunks, check_streams
from rlinf_core.data.loading.encoding import add_draws
from rlinf_core.data.loading.micro_batches import MicroBatches
from rlinf_core.data.loading.mixture import Indices
from rlinf_core.data.loading.replacement import load_samples
from rlinf_core.data.loading.sampling import sample_generator
from rlinf_core.data.sample import Batch, Sample
from rlinf_core.errors import RunError, UserError
from rlinf_core.plugins.owners import exiting_code

AHEAD = 2
"""By files: how far ahead files are fetched, in units of the buffers of all streams."""


class PackedSamples(NamedTuple):
    """A worker's part of a micro batch, to be sent to the training process."""

    places: list[int]
    """Indices of the samples in the micro batch."""
    pickled: bytes
    """The samples without their large arrays."""
    arrays: torch.Tensor
    """uint8, the large arrays, concatenated, in shared memory."""
    stops: list[int]
    """End of each array in `arrays`."""


@dataclass
class ChunkedMicroBatches(MicroBatches):
    """`MicroBatches` in chunked order; with `parts`, item i is part `i % parts` of micro batch `i // parts`."""

    chunks: Chunks
    parts: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_streams(self.chunks, self.batching.ranks)
        if len(self.sources) > 1:
            raise UserError('data.shuffle = "chunked" supports one dataset, but this run has several: use "random"')
        self._chunked = ChunkedOrder.of(self.batching.seed, self.sources[0].rows, self.epoch_samples, self.chunks)
        self.held = HeldRuns()
        self._drawn: tuple[int, ChunkedEpoch] | None = None
        self._ahead = (-1, 0)

    def __getitem__(self, number: int) -> Batch | PackedSamples | UserError | RunError:  # type: ignore[override]
        """A collated micro batch, or one of its parts; an error with a message is returned, not raised."""
        number, part = divmod(number, self.parts)
        epoch, positions = self.positions(number)
        # A rank owns every world_size-th stream, and a worker every parts-th of those.
        own = np.flatnonzero(positions % self.chunks.streams // self.batching.ranks % self.parts == part)
        positions = positions[own]
        order = self._order_drawn(epoch, number)
        self._prefetch(epoch, number, part)
        generators = (sample_generator(self.batching.seed, epoch, position) for position in positions.tolist())
        try:
            encoded = self.held.take(order.rows[positions].tolist(), partial(self._encode, epoch))
            samples = add_draws(encoded, self.policy, generators)
            return pack(own.tolist(), samples) if self.parts > 1 else self.collate(samples)
        except (UserError, RunError) as e:
            return e
        except SystemExit as e:  # It would end a worker without a word.
            return exiting_code(e)

    def join(self, parts: Sequence[PackedSamples]) -> Batch:
        """Join parts into a collated micro batch."""
        samples = {place: sample for part in parts for place, sample in zip(part.places, unpack(part), strict=True)}
        return self.collate([samples[place] for place in sorted(samples)])

    def places(self, micro: int, rank: int) -> Indices:
        """[B], indices in a step of a rank's samples: every world_size-th, which come from its streams."""
        numbers = np.arange(micro * self.batching.micro_batch_size, (micro + 1) * self.batching.micro_batch_size)
        return numbers * self.batching.ranks + rank

    def _order_of_epoch(self, epoch: int) -> tuple[Indices, Indices]:
        return self._chunked.epoch(epoch)

    def _encode(self, epoch: int, rows: Sequence[int]) -> list[Sample]:
        return load_samples(self.sources[0], 0, rows, seed=self.batching.seed, epoch=epoch)

    def _prefetch(self, epoch: int, number: int, part: int) -> None:
        """Have the files fetched of rows that this reader's streams draw some buffers later in the epoch."""
        source = self.sources[0].rows
        if not self.chunks.by_file or not isinstance(source, PrefetchingSource):
            return
        ahead, size = self._ahead, self.batching.global_batch_size
        until = min(number + AHEAD * self.chunks.buffer * self.accumulation // size + 1, self._last_of(epoch))
        rows: list[int] = []
        for later in range(max(ahead[1] if ahead[0] == epoch else number, number), until):
            positions = self.positions(later)[1]
            own = positions % self.chunks.streams // self.batching.ranks % self.parts == part
            rows += self.held.not_read(self._order_drawn(epoch, number).rows[positions[own]].tolist())
        self._ahead = epoch, until
        if rows:
            source.prefetch(rows)

    def _last_of(self, epoch: int) -> int:
        """The number after the last micro batch of an epoch."""
        return (epoch + 1) * self.steps_per_epoch * self.accumulation

    def _order_drawn(self, epoch: int, number: int) -> ChunkedEpoch:
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = epoch, self._chunked.draw(epoch)
            done = number // self.accumulation % self.steps_per_epoch * self.batching.global_batch_size
            self.held.begin(self._drawn[1], done)
        return self._drawn[1]

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_drawn": None, "_ahead": (-1, 0), "held": HeldRuns()}


class HeldRuns:
    """Samples of runs that have been read and are waiting to be drawn.

    The order bounds their number (`Chunks.most_held`). They are kept encoded, with images at the policy's size.
    """

    def __init__(self) -> None:
        self.bytes = 0
        """Total size of the arrays."""
        self._samples: dict[int, Sample] = {}

    def __len__(self) -> int:
        return len(self._samples)

    def not_read(self, rows: Sequence[int]) -> list[int]:
        """Those of some rows that are not waiting here."""
        return [row for row in rows if row not in self._samples]

    def begin(self, order: ChunkedEpoch, done: int) -> None:
        """Discard all samples, and continue the epoch of `order` after its first `done` samples."""
        self._order, self.bytes, self._samples = order, 0, {}
        self._drawn = np.zeros(len(order.rows), np.bool_)
        self._drawn[order.rows[:done]] = True

    def take(self, rows: Sequence[int], encode: Callable[[Sequence[int]], list[Sample]]) -> list[Sample]:
        """Remove and return the samples of some rows; a missing row causes its run to be encoded, except drawn rows."""
        taken = []
        for row in rows:
            if row not in self._samples:
                wanted = [one for one in self._order.run_of(row) if not self._drawn[one] and one not in self._samples]
                for one, sample in zip(wanted, map(_own, encode(wanted)), strict=True):
                    self._samples[one] = sample
                    self.bytes += _size(sample)
            taken.append(self._samples.pop(row))
            self.bytes -= _size(taken[-1])
            self._drawn[row] = True
        return taken


def _own(value: Any) -> Any:
    """Copy arrays that are views, which would keep the larger array alive."""
    if isinstance(value, Mapping):
        return {key: _own(inner) for key, inner in value.items()}
    return value.copy() if isinstance(value, np.ndarray) and value.base is not None else value


def _size(value: Any) -> int:
    if isinstance(value, Mapping):
        return sum(map(_size, value.values()))
    return int(value.nbytes) if isinstance(value, np.ndarray) else 0


def pack(places: list[int], samples: list[Sample]) -> PackedSamples:
    """Put the arrays of samples into one block of shared memory."""
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(samples, protocol=5, buffer_callback=buffers.append)
    raws = [buffer.raw() for buffer in buffers]
    # Aligned, because arrays of floats are read in place.
    sizes = [-(-raw.nbytes // 64) * 64 for raw in raws]
    starts = np.cumsum([0, *sizes])
    arrays = batch_tensor((int(starts[-1]),), torch.uint8)
    target, stops = arrays.numpy(), []
    for start, raw in zip(starts.tolist(), raws, strict=False):
        target[start : start + raw.nbytes] = np.frombuffer(raw, np.uint8)
        stops.append(start + raw.nbytes)
    return PackedSamples(places, pickled, arrays, stops)


def unpack(part: PackedSamples) -> list[Sample]:
    """Restore the samples; their arrays are views of the block."""
    block, starts = memoryview(part.arrays.numpy()), [-(-stop // 64) * 64 for stop in (0, *part.stops)]
    buffers = [block[start:stop] for start, stop in zip(starts, part.stops, strict=False)]
    samples: list[Sample] = pickle.loads(part.pickled, buffers=buffers)
    return samples
