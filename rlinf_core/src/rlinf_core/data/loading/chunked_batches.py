"""Micro batches in the chunked order (contract 13): each run of frames is read once, by the worker its stream is of.

With several workers a micro batch is made in as many parts, each of the streams that are one worker's own, and the
rank's process puts them together. So the samples cross from process to process uncollated, in one block of shared
memory, and collating them (a few milliseconds) is left to the process that trains.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from rlinf_core.data.batch_memory import batch_tensor
from rlinf_core.data.loading.chunked_sampling import ChunkedEpoch, ChunkedOrder, Chunks, check_streams
from rlinf_core.data.loading.encoding import add_draws, encode_rows, read_rows
from rlinf_core.data.loading.micro_batches import MicroBatches
from rlinf_core.data.loading.mixture import Indices
from rlinf_core.data.loading.sampling import sample_generator
from rlinf_core.data.sample import Batch, Sample
from rlinf_core.errors import UserError


class Part(NamedTuple):
    """Samples on their way to the rank's process."""

    places: list[int]
    """Where they stand in the micro batch."""
    pickled: bytes
    """The samples without their large arrays."""
    arrays: torch.Tensor
    """uint8, those arrays one after the other, in shared memory."""
    stops: list[int]
    """Where in it each of them ends."""


@dataclass
class ChunkedMicroBatches(MicroBatches):
    """`MicroBatches` in the chunked order; with `parts`, number i is part `i % parts` of micro batch `i // parts`."""

    chunks: Chunks
    parts: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_streams(self.chunks, self.batching.ranks)
        if len(self.sources) > 1:
            raise UserError('data.shuffle = "chunked" is for a run of one dataset, and this one has several')
        self._chunked = ChunkedOrder(self.batching.seed, self.sources[0].rows.episodes, self.epoch_samples, self.chunks)
        self.held = HeldRuns()
        self._drawn: tuple[int, ChunkedEpoch] | None = None

    def __getitem__(self, number: int) -> Batch | Part | UserError:  # type: ignore[override]
        """A collated micro batch or, of several parts, one of them; a `UserError` is returned."""
        number, part = divmod(number, self.parts)
        epoch, positions = self.positions(number)
        # The streams of a rank are every world_size-th, and of those a worker's are every parts-th.
        own = np.flatnonzero(positions % self.chunks.streams // self.batching.ranks % self.parts == part)
        positions = positions[own]
        order = self._order_drawn(epoch, number)
        generators = (sample_generator(self.batching.seed, epoch, position) for position in positions.tolist())
        try:
            encoded = self.held.take(order.rows[positions].tolist(), self._encode)
            samples = add_draws(encoded, self.policy, generators)
            return pack(own.tolist(), samples) if self.parts > 1 else self.policy.collate(samples)
        except UserError as e:
            return e

    def join(self, parts: Sequence[Part]) -> Batch:
        """The micro batch that its parts make."""
        samples = {place: sample for part in parts for place, sample in zip(part.places, unpack(part), strict=True)}
        return self.policy.collate([samples[place] for place in sorted(samples)])

    def places(self, micro: int, rank: int) -> Indices:
        """[B], where in a step a rank's samples stand: every world_size-th, which are those of its streams."""
        numbers = np.arange(micro * self.batching.micro_batch_size, (micro + 1) * self.batching.micro_batch_size)
        return numbers * self.batching.ranks + rank

    def _order_of_epoch(self, epoch: int) -> tuple[Indices, Indices]:
        return self._chunked.epoch(epoch)

    def _encode(self, rows: Sequence[int]) -> list[Sample]:
        source = self.sources[0]
        return encode_rows(source.rows, rows, read_rows(source.rows, rows), source.pipeline)

    def _order_drawn(self, epoch: int, number: int) -> ChunkedEpoch:
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = epoch, self._chunked.draw(epoch)
            done = number // self.accumulation % self.steps_per_epoch * self.batching.global_batch_size
            self.held.begin(self._drawn[1], done)
        return self._drawn[1]

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_drawn": None, "held": HeldRuns()}


class HeldRuns:
    """The samples of runs that were read whole, from then until they are drawn.

    The order bounds their number (`Chunks.most_held`). Samples are held encoded: images have the policy's size then.
    """

    def __init__(self) -> None:
        self.bytes = 0
        """Size of the arrays that are held."""
        self._samples: dict[int, Sample] = {}

    def __len__(self) -> int:
        return len(self._samples)

    def begin(self, order: ChunkedEpoch, done: int) -> None:
        """Forget what is held, and go on in the epoch of `order` after its first `done` samples."""
        self._order, self.bytes, self._samples = order, 0, {}
        self._drawn = np.zeros(len(order.rows), np.bool_)
        self._drawn[order.rows[:done]] = True

    def take(self, rows: Sequence[int], encode: Callable[[Sequence[int]], list[Sample]]) -> list[Sample]:
        """The samples of rows; a run of which none is held yet is encoded, as far as it is not drawn."""
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
    """A copy of arrays that are views of larger ones, which would be held as long as any view of them."""
    if isinstance(value, Mapping):
        return {key: _own(inner) for key, inner in value.items()}
    return value.copy() if isinstance(value, np.ndarray) and value.base is not None else value


def _size(value: Any) -> int:
    if isinstance(value, Mapping):
        return sum(map(_size, value.values()))
    return int(value.nbytes) if isinstance(value, np.ndarray) else 0


def pack(places: list[int], samples: list[Sample]) -> Part:
    """Put the arrays of samples into one block, in memory that the receiver has mapped."""
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(samples, protocol=5, buffer_callback=buffers.append)
    raws = [buffer.raw() for buffer in buffers]
    # Aligned, as arrays of floats are to be read where they lie.
    sizes = [-(-raw.nbytes // 64) * 64 for raw in raws]
    starts = np.cumsum([0, *sizes])
    arrays = batch_tensor((int(starts[-1]),), torch.uint8)
    target, stops = arrays.numpy(), []
    for start, raw in zip(starts.tolist(), raws, strict=False):
        target[start : start + raw.nbytes] = np.frombuffer(raw, np.uint8)
        stops.append(start + raw.nbytes)
    return Part(places, pickled, arrays, stops)


def unpack(part: Part) -> list[Sample]:
    """The samples again; their arrays are views of the block."""
    block, starts = memoryview(part.arrays.numpy()), [-(-stop // 64) * 64 for stop in (0, *part.stops)]
    buffers = [block[start:stop] for start, stop in zip(starts, part.stops, strict=False)]
    samples: list[Sample] = pickle.loads(part.pickled, buffers=buffers)
    return samples
