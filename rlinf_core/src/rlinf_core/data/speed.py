"""Measure the speed of a run's data loading: open its train loader and read it as the trainer does, without training.

With `num_workers`, loading overlaps with training, so samples per second are what matters. The time of each stage is
measured separately, in this process, batch by batch.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from rlinf_core.contract.datasets import LeRobotDatasetConfig, SampleSource
from rlinf_core.contract.policy import PolicyConfig
from rlinf_core.contract.run import RunConfig
from rlinf_core.data.frame_cache.source import CachedSource
from rlinf_core.data.images.video import VideoReader
from rlinf_core.data.lerobot.source import LeRobotSource
from rlinf_core.data.loading.chunked_batches import ChunkedMicroBatches
from rlinf_core.data.loading.chunked_sampling import Chunks, chunks_of
from rlinf_core.data.loading.loader import TrainLoader, build_train_loader
from rlinf_core.data.loading.micro_batches import MicroBatches
from rlinf_core.data.loading.mixture import Source
from rlinf_core.data.loading.sampling import Batching
from rlinf_core.data.sample import Batch, Row, Sample
from rlinf_core.data.splits import open_split
from rlinf_core.data.statistics.run import diagnosed_pipeline
from rlinf_core.plugins.registry import Plugins
from rlinf_core.preflight import DIAGNOSED_ROWS

ENDLESS = 10**9
"""Steps; the measurement ends by time."""


@dataclass(frozen=True)
class Speed:
    """The result of a measurement."""

    ranks: int
    workers: int
    """Loader workers per rank."""
    micro_batch_size: int
    samples: int
    """Samples counted, over all ranks."""
    samples_per_second: float
    """Over all ranks."""
    first_batch_s: float
    """Seconds from opening the loader to its first batch, on the slowest rank."""
    shares: dict[str, float]
    """Shares of one process's time: `read` (with images), `pictures` (their part of it), `transform`, `collate`."""
    decoder: str
    worker_mb: float | None
    """Private memory of the largest worker; None without workers, or if the system does not report it."""
    most_held_mb: float
    """Chunked order: memory of the full shuffle buffers over all ranks; else 0."""
    steady: bool
    """Chunked order: whether buffers were full when counting began, as filling them takes time; else true."""


def open_sources(run: RunConfig, plugins: Plugins) -> tuple[Source, ...]:
    """Open the run's datasets, with statistics of a part of their rows; they do not affect the speed."""
    sources = []
    for given in run.sources:
        with given.naming():
            rows = open_split(given.run, plugins, "train")
            pipeline, _ = diagnosed_pipeline(given.run, rows, rows=DIAGNOSED_ROWS)
            sources.append(Source.of(given, rows, pipeline))
    return tuple(sources)


def measure(run: RunConfig, plugins: Plugins, *, ranks: int, seconds: float) -> Speed:
    """Read for some seconds like `ranks` ranks on this machine, each with its workers.

    Raises:
        UserError: The data are unavailable or unreadable, or the batch sizes do not divide evenly.
    """
    sources, chunks = open_sources(run, plugins), chunks_of(run.data)
    loaders = [_loader(run, sources, chunks, rank, ranks, run.data.num_workers) for rank in range(ranks)]
    with ThreadPoolExecutor(ranks) as threads:
        counts = list(threads.map(lambda loader: _count(loader, chunks, seconds), loaders))
    worker_mb = _largest_worker()
    del loaders  # Ends their workers, which would disturb the next measurement.
    shares, held = _shares(run, sources, chunks, seconds / 2)
    micro = run.trainer.micro_batch_size
    return Speed(
        ranks=ranks,
        workers=run.data.num_workers,
        micro_batch_size=micro,
        samples=sum(one.batches for one in counts) * micro,
        samples_per_second=sum(one.batches / one.seconds for one in counts) * micro,
        first_batch_s=max(one.first for one in counts),
        shares=shares,
        decoder=", ".join(dict.fromkeys(_decoders(run, sources))),
        worker_mb=worker_mb,
        most_held_mb=held,
        steady=all(one.steady for one in counts),
    )


def _loader(
    run: RunConfig, sources: Sequence[Source], chunks: Chunks | None, rank: int, ranks: int, workers: int
) -> TrainLoader:
    batching = Batching.of(run, rank, ranks)
    return build_train_loader(sources, run.policy, batching, (0, ENDLESS), num_workers=workers, chunks=chunks)


@dataclass(frozen=True)
class _Count:
    first: float
    batches: int
    seconds: float
    steady: bool


def _count(loader: TrainLoader, chunks: Chunks | None, seconds: float) -> _Count:
    """Read until the time is over, not counting prefetched batches nor (for up to as long) filling buffers."""
    begin = time.perf_counter()
    batches, made = iter(loader), cast(MicroBatches, loader.dataset)
    next(batches)
    first = time.perf_counter() - begin
    for _ in range(2 * loader.num_workers):
        next(batches)
    filling = 1 + chunks.buffer // (made.batching.micro_batch_size * made.batching.ranks) if chunks else 0
    begin = time.perf_counter()
    while filling and time.perf_counter() - begin < seconds:
        next(batches)
        filling -= 1
    begin, count, elapsed = time.perf_counter(), 0, 0.0
    while elapsed < seconds:
        next(batches)
        count, elapsed = count + 1, time.perf_counter() - begin
    return _Count(first, count, elapsed, not filling)


def _largest_worker() -> float | None:
    """Private memory of this process's largest child, in MB; None if unknown."""
    sizes = []
    for child in multiprocessing.active_children():
        status = Path(f"/proc/{child.pid}/status")
        if status.is_file():
            lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
            sizes.append(int(lines["RssAnon"].split()[0]) / 1000)
    return max(sizes, default=None)


@dataclass
class _Clock:
    """Seconds by name."""

    seconds: dict[str, float] = field(default_factory=lambda: {"read": 0.0, "numbers": 0.0, "collate": 0.0})
    rows: int = 0
    """Rows read; in chunked order, at first more than are drawn."""
    images: bool = False
    """Whether any rows have images."""

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - begin


class _TimedRows:
    """A source whose reading is timed; everything else is delegated."""

    def __init__(self, rows: SampleSource, clock: _Clock) -> None:
        self._rows, self._clock = rows, clock

    def __len__(self) -> int:
        return len(self._rows)

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        self._clock.rows += len(indices)
        with self._clock.time("read"):
            rows = self._rows.__getitems__(indices)
        with self._clock.time("numbers"):
            numbers = self._rows.without_images(indices)
        self._clock.images |= any(row.keys() != number.keys() for row, number in zip(rows, numbers, strict=True))
        return rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rows, name)


class _TimedPolicy:
    """A policy's config whose `collate` is timed."""

    def __init__(self, policy: PolicyConfig, clock: _Clock) -> None:
        self.draw, self._policy, self._clock = policy.draw, policy, clock

    def collate(self, samples: Sequence[Sample]) -> Batch:
        with self._clock.time("collate"):
            return self._policy.collate(samples)


def _shares(
    run: RunConfig, sources: Sequence[Source], chunks: Chunks | None, seconds: float
) -> tuple[dict[str, float], float]:
    """The shares of a process's time, and in chunked order the MB of full buffers."""
    clock = _Clock()
    rows = [cast(SampleSource, _TimedRows(source.rows, clock)) for source in sources]
    timed = [replace(source, rows=own) for source, own in zip(sources, rows, strict=True)]
    loader = _loader(run, timed, chunks, 0, 1, 0)
    made: Any = loader.dataset
    made.policy = _TimedPolicy(run.policy, clock)
    begin, whole, samples = time.perf_counter(), 0.0, 0
    for _ in loader:
        samples += made.batching.micro_batch_size
        whole = time.perf_counter() - begin
        if whole > seconds:
            break
    took = clock.seconds
    read = took["read"] / clock.rows
    # Numbers are read a second time, to separate their time from that of images.
    images = max(0.0, took["read"] - took["numbers"]) / clock.rows if clock.images else 0.0
    transform = (whole - sum(took.values())) / clock.rows
    collate = took["collate"] / samples
    sample = read + transform + collate
    shares = {"read": read, "pictures": images, "transform": transform, "collate": collate}
    held = 0.0
    if chunks and isinstance(made, ChunkedMicroBatches) and len(made.held):
        held = made.held.bytes / len(made.held) * chunks.most_held / 1e6
    return {name: share / sample for name, share in shares.items()}, held


def _decoders(run: RunConfig, sources: Sequence[Source]) -> Iterator[str]:
    """The image decoder of each source."""
    for given, source in zip(run.sources, sources, strict=True):
        rows, data = source.rows, given.run.data
        if isinstance(rows, CachedSource):
            yield f"none, {rows.format} frames of a cache"
        elif isinstance(rows, LeRobotSource) and isinstance(data, LeRobotDatasetConfig):
            reader = VideoReader(decoder=None if data.decoder == "auto" else data.decoder)
            for column in rows.images:
                video = rows.metadata.features[column]["dtype"] == "video"
                yield reader.decoder if video else "Pillow"
