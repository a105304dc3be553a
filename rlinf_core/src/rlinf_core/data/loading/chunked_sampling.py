"""The chunked order (contract 13): read runs of consecutive frames, and shuffle them in bounded buffers.

To decode a frame in the middle of a video, a decoder starts at the preceding key frame: with 30 frames between key
frames, frames in random order cost ten times as much as consecutive ones. So the rows of an epoch are cut into runs of
consecutive rows, and the shuffled runs are distributed over `streams` virtual streams. Each stream fills a buffer from
its runs and draws its next sample from the buffer at random; the next row replaces it. Sample `p` of an epoch comes
from stream `p % streams`.

This is simulated on row numbers, in 0.2 to 1 us per sample (256 to 32 streams), so the order is a pure function of
(seed, epoch): the same on any number of ranks and workers, and known in the middle of an epoch. The reader of a stream
reads each run once and keeps the rows that are not drawn yet: at most the stream's buffer and one run. Torch-free.

A run of frames goes to any stream, so every node needs every file. With `data.stream_of = "files"`, each stream has a
span of consecutive rows instead, the same one in every epoch, and takes it file by file: the files in another order in
each epoch, and within some files the runs. Spans are dealt so that on 2, 4, 8 ... ranks each rank's streams have
neighbouring spans (`spans_dealt`): N ranks share at most N - 1 files per camera.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from rlinf_core.contract.datasets import FILES_MIXED, DatasetConfig, FileStreamSource, SampleSource
from rlinf_core.data.loading.mixture import Indices
from rlinf_core.data.loading.sampling import CHUNKS, generator
from rlinf_core.errors import UserError


@dataclass(frozen=True)
class Chunks:
    """Parameters of the chunked order; all counts are for the whole run, over all ranks."""

    streams: int
    """Number of virtual streams."""
    frames: int
    """Rows per run."""
    buffer: int
    """Capacity of all buffers together, in samples."""
    by_file: bool = False
    """Whether each stream has files of its own."""

    @property
    def capacity(self) -> int:
        """Capacity of one stream's buffer, in samples."""
        return self.buffer // self.streams

    @property
    def most_held(self) -> int:
        """Most samples in memory over all ranks: full buffers, and one partly used run per stream."""
        return self.streams * (self.capacity + self.frames - 1)


def chunks_of(data: DatasetConfig) -> Chunks | None:
    """The parameters from the config; None for random order."""
    if data.shuffle == "random":
        return None
    return Chunks(data.streams, data.chunk_frames, data.shuffle_buffer, data.stream_of == "files")


def check_streams(chunks: Chunks | None, ranks: int) -> None:
    """Raise `UserError` unless the ranks divide the streams evenly."""
    if chunks and chunks.streams % ranks:
        nearest = sorted({max(chunks.streams // ranks, 1) * ranks, (chunks.streams // ranks + 1) * ranks})
        raise UserError(
            f"data.streams = {chunks.streams} is not a multiple of the {ranks} ranks: set it to "
            f"{' or '.join(map(str, nearest))} from the start of the run, or use another number of ranks "
            "(48 is a multiple of 1, 2, 3, 4, 6, 8, 12 and 16)"
        )


@dataclass(frozen=True, eq=False)
class ChunkedEpoch:
    """The order of one epoch."""

    rows: Indices
    """[N], the row at each position; the last ones may not fill a step and are then unused."""
    starts: Indices
    """[runs], ascending: the first row of each run. A run ends where the next one starts."""

    def run_of(self, row: int) -> range:
        """The rows of the run that contains a row."""
        number = int(np.searchsorted(self.starts, row, side="right"))
        stop = self.starts[number] if number < len(self.starts) else len(self.rows)
        return range(int(self.starts[number - 1]), int(stop))


@dataclass(frozen=True, eq=False)
class ChunkedOrder:
    """The row of every sample in chunked order; `mixture.Order` is the random order."""

    seed: int
    episodes: Indices
    """[N], the episode of each row; a run stays within one episode."""
    samples: int
    """Samples per epoch: whole steps of the global batch."""
    chunks: Chunks
    file_starts: Indices | None = None
    """By files: [F], ascending, the rows whose images are in another file than those of the row before."""

    @classmethod
    def of(cls, seed: int, source: SampleSource, samples: int, chunks: Chunks) -> ChunkedOrder:
        """The order of a source's rows.

        Raises:
            UserError: Streams are to have files of their own, and the source does not say which rows share a file.
        """
        if not chunks.by_file:
            return cls(seed, source.episodes, samples, chunks)
        if not isinstance(source, FileStreamSource):
            raise UserError(
                f'data.stream_of = "files": {type(source).__name__} does not say which rows share a file: use "runs"'
            )
        return cls(seed, source.episodes, samples, chunks, source.file_starts())

    def epoch(self, epoch: int) -> tuple[Indices, Indices]:
        """Source index (always 0) and row of each sample of an epoch, both [samples]."""
        rows = self.draw(epoch).rows[: self.samples]
        return np.zeros(self.samples, np.int64), rows

    def draw(self, epoch: int) -> ChunkedEpoch:
        """An epoch's order and its runs. Every epoch cuts runs at other rows, so that they mix differently."""
        random, rows = generator(self.seed, epoch, CHUNKS, 0), len(self.episodes)
        cuts = (self._frames + random.integers(self.chunks.frames)) % self.chunks.frames == 0
        starts = np.flatnonzero(self._begins | cuts)
        # Streams get the same number of rows, give or take one. A cut may split a run between two streams.
        streams = self.chunks.streams
        sizes = rows // streams + (np.arange(streams) < rows % streams)
        if self.file_starts is None:
            order = random.permutation(len(starts))
            # Adjacent samples of a step come from adjacent streams; permute, so that a split run's streams are apart.
            dealt = random.permutation(streams)
        else:
            dealt = spans_dealt(streams)
            spans = np.cumsum(sizes[dealt]) - sizes[dealt]
            mixed = FILES_MIXED * self.chunks.capacity
            starts, order = _order_by_file(starts, spans, self.file_starts, rows, mixed, random)
        lengths = np.diff(starts, append=rows)[order]
        sequence = np.repeat(starts[order] - (np.cumsum(lengths) - lengths), lengths) + np.arange(rows)
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


def spans_dealt(streams: int) -> Indices:
    """[streams], the stream of each span of consecutive rows, in the order of rows.

    Rank r of N takes the streams r, r + N, ...: the digits of a span's number are those of its stream, reversed. So a
    rank's streams have neighbouring spans if N is a product of the first factors of their number, smallest first.
    """
    factors: list[int] = []
    rest = streams
    for factor in range(2, streams + 1):
        while rest % factor == 0:
            factors, rest = [*factors, factor], rest // factor
    return np.arange(streams).reshape(factors[::-1]).transpose().ravel()


def _order_by_file(
    starts: Indices, spans: Indices, files: Indices, rows: int, mixed: int, random: np.random.Generator
) -> tuple[Indices, Indices]:
    """Cut runs at files and spans, and order them: by span, by some files at a time, and then at random.

    Args:
        starts: [runs], the first row of each run.
        spans: [streams], the first row of each span; spans without rows repeat the next one's.
        files: [F], the first row of each file.
        rows: Number of rows.
        mixed: Rows of a span whose files are mixed.
        random: Generator of the draws.

    Returns:
        The first row of each run, and the order of the runs.
    """
    pieces = np.union1d(spans[spans < rows], files)  # A piece is the part of a file in one span.
    sizes, span = np.diff(pieces, append=rows), np.searchsorted(spans, pieces, side="right")
    shuffled = np.lexsort((random.random(len(pieces)), span))
    before = np.cumsum(sizes[shuffled]) - sizes[shuffled] - spans[span[shuffled] - 1]
    part = np.empty(len(pieces), np.int64)
    part[shuffled] = before // mixed
    starts = np.union1d(starts, pieces)
    piece = np.searchsorted(pieces, starts, side="right") - 1
    return starts, np.lexsort((random.random(len(starts)), part[piece], span[piece]))


def _mix(sequence: Indices, first: Indices, sizes: Indices, capacity: int, random: np.random.Generator) -> Indices:
    """Draw from the streams' buffers in turn, vectorised over streams.

    Args:
        sequence: [N], the rows of all streams.
        first: [streams], start of each stream in `sequence`.
        sizes: [streams], rows of each stream; descending, by one at most.
        capacity: Rows per buffer.
        random: Generator of the draws.

    Returns:
        [N], the rows in drawing order.
    """
    last, streams = len(sequence) - 1, np.arange(len(first))
    held = sequence[np.minimum(first[:, np.newaxis] + np.arange(capacity), last)]
    drawn = np.empty((int(sizes.max()), len(first)), np.int64)
    for number, line in enumerate(drawn):
        full = np.minimum(sizes - number, capacity)
        place = (random.random(len(first)) * full).astype(np.int64)
        line[:] = held[streams, place]
        # The next row replaces the drawn one; at the end of the stream, the last row in the buffer does.
        following = number + capacity
        held[streams, place] = np.where(
            following < sizes, sequence[np.minimum(first + following, last)], held[streams, np.maximum(full - 1, 0)]
        )
    return drawn.ravel()[: len(sequence)]
