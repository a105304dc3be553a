"""The chunked order (contract 13): frames are read in runs of consecutive ones and mixed in bounded buffers.

To show one frame in the middle of a video, a decoder starts at the key frame before it: with 30 frames from one key
frame to the next, frames in random order cost ten times as much as neighbours. So the rows of an epoch are cut into
runs of neighbours, and the shuffled runs are dealt to `streams` virtual streams. Each stream fills a buffer from its
runs, and its next sample is one of the buffer at random, whose place the next row takes. Sample `p` of an epoch comes
from stream `p % streams`.

This is simulated on row numbers, in 0.2 to 1 us a sample (256 to 32 streams), so that the order is a pure function of
(seed, epoch): the same on any number of ranks and workers, and known in the middle of an epoch. Who reads for a stream
reads each run once and holds what is not drawn yet: never more than the stream's buffer and a run. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from rlinf_core.contract.datasets import DatasetConfig
from rlinf_core.data.loading.mixture import Indices
from rlinf_core.data.loading.sampling import CHUNKS, generator
from rlinf_core.errors import UserError


@dataclass(frozen=True)
class Chunks:
    """How the chunked order is made; all counts are of the whole run, over all ranks."""

    streams: int
    """Virtual streams."""
    frames: int
    """Rows of a run."""
    buffer: int
    """Samples that all buffers hold together."""

    @property
    def capacity(self) -> int:
        """Samples that the buffer of one stream holds."""
        return self.buffer // self.streams

    @property
    def most_held(self) -> int:
        """Samples that are held over all ranks, at most: full buffers, and of each stream a run that was begun."""
        return self.streams * (self.capacity + self.frames - 1)


def chunks_of(data: DatasetConfig) -> Chunks | None:
    """What the config says; None where rows are taken in random order."""
    if data.shuffle == "random":
        return None
    return Chunks(data.streams, data.chunk_frames, data.shuffle_buffer)


def check_streams(chunks: Chunks | None, ranks: int) -> None:
    """Raise `UserError` unless each rank gets equally many streams."""
    if chunks and chunks.streams % ranks:
        nearest = sorted({max(chunks.streams // ranks, 1) * ranks, (chunks.streams // ranks + 1) * ranks})
        raise UserError(
            f"data.streams = {chunks.streams} is no multiple of the {ranks} ranks: set it to "
            f"{' or '.join(map(str, nearest))} from the start of the run, or use another number of ranks "
            "(48 is a multiple of 1, 2, 3, 4, 6, 8, 12 and 16)"
        )


@dataclass(frozen=True, eq=False)
class ChunkedEpoch:
    """The order of one epoch."""

    rows: Indices
    """[N], the row at each position; the last ones may be left out of the epoch's steps."""
    starts: Indices
    """[runs], ascending: the first row of each run. Each row is in one, which ends where the next begins."""

    def run_of(self, row: int) -> range:
        """The rows of the run that holds a row."""
        number = int(np.searchsorted(self.starts, row, side="right"))
        stop = self.starts[number] if number < len(self.starts) else len(self.rows)
        return range(int(self.starts[number - 1]), int(stop))


@dataclass(frozen=True, eq=False)
class ChunkedOrder:
    """The row of every sample, as `mixture.Order` has it in random order."""

    seed: int
    episodes: Indices
    """[N], the episode of each row: a run does not go beyond one."""
    samples: int
    """Samples an epoch takes: whole steps of the global batch."""
    chunks: Chunks

    def epoch(self, epoch: int) -> tuple[Indices, Indices]:
        """Number of the source (always 0) and row in it, both [samples], in the order of an epoch."""
        rows = self.draw(epoch).rows[: self.samples]
        return np.zeros(self.samples, np.int64), rows

    def draw(self, epoch: int) -> ChunkedEpoch:
        """An epoch's order with its runs. Runs are cut elsewhere in every epoch, so that their rows meet others."""
        random, rows = generator(self.seed, epoch, CHUNKS, 0), len(self.episodes)
        cuts = (self._frames + random.integers(self.chunks.frames)) % self.chunks.frames == 0
        starts = np.flatnonzero(self._begins | cuts)
        order = random.permutation(len(starts))
        lengths = np.diff(starts, append=rows)[order]
        sequence = np.repeat(starts[order] - (np.cumsum(lengths) - lengths), lengths) + np.arange(rows)
        # Streams get equally many rows, but for one: cuts go through runs, where two streams then read a part each.
        streams = self.chunks.streams
        sizes = rows // streams + (np.arange(streams) < rows % streams)
        # Neighbours in a step are from neighbouring streams: where a run feeds several, these are not neighbours.
        dealt = random.permutation(streams)
        first = np.empty(streams, np.int64)
        first[dealt] = np.cumsum(sizes[dealt]) - sizes[dealt]
        starts = np.union1d(starts, sequence[first[sizes > 0]])
        return ChunkedEpoch(_mix(sequence, first, sizes, self.chunks.capacity, random), starts)

    @cached_property
    def _begins(self) -> NDArray[np.bool_]:
        begins: NDArray[np.bool_] = np.diff(self.episodes, prepend=self.episodes[:1] - 1) != 0
        return begins

    @cached_property
    def _frames(self) -> Indices:
        """[N], rows since the episode's first."""
        rows = np.arange(len(self.episodes))
        frames: Indices = rows - np.maximum.accumulate(np.where(self._begins, rows, 0))
        return frames


def _mix(sequence: Indices, first: Indices, sizes: Indices, capacity: int, random: np.random.Generator) -> Indices:
    """Draw from the streams' buffers in turn, all streams at once.

    Args:
        sequence: [N], the rows of all streams.
        first: [streams], where in it each begins.
        sizes: [streams], its number of rows; they descend by one at most.
        capacity: Rows a buffer holds.
        random: Makes the draws.

    Returns:
        [N], rows in the order in which they are drawn.
    """
    last, streams = len(sequence) - 1, np.arange(len(first))
    held = sequence[np.minimum(first[:, np.newaxis] + np.arange(capacity), last)]
    drawn = np.empty((int(sizes.max()), len(first)), np.int64)
    for number, line in enumerate(drawn):
        full = np.minimum(sizes - number, capacity)
        place = (random.random(len(first)) * full).astype(np.int64)
        line[:] = held[streams, place]
        # The next row takes the place of the one that was drawn; once there is none, the last one in the buffer does.
        following = number + capacity
        held[streams, place] = np.where(
            following < sizes, sequence[np.minimum(first + following, last)], held[streams, np.maximum(full - 1, 0)]
        )
    return drawn.ravel()[: len(sequence)]
