"""The sources of a run, and the random order: which source and row each sample of an epoch is. Imports no torch.

A run of one dataset is a mixture of one source, whose epochs use each row once. With several sources, each sample's
source is drawn with probability `Source.share`, and an epoch has as many samples as all sources have rows.

*A source's permutations continue across epochs*: its rows are used in one permutation after another, so no row repeats
before all have been used, and an epoch continues where the previous one stopped. So all rows of a source with a low
weight are used eventually.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from rlinf_core.contract.datasets import SampleSource
from rlinf_core.contract.run import RunSource
from rlinf_core.data.loading.sampling import COUNTS, VISITS, epoch_order, generator
from rlinf_core.data.pipeline import Pipeline

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Source:
    """An open dataset of a run: its training rows, and the pipeline that encodes them."""

    rows: SampleSource
    pipeline: Pipeline
    name: str = ""
    """Name in the mixture; empty if the run has one dataset."""
    share: float = 1.0
    """Probability that a training sample comes from this source."""
    skips_bad_rows: bool = False
    """Whether rows that cannot be read are replaced (`data.on_bad_sample = "skip"`)."""
    max_bad_rows: int = 0
    """How many may be (`data.max_bad_samples`)."""

    @classmethod
    def of(cls, given: RunSource, rows: SampleSource, pipeline: Pipeline) -> Self:
        """As a run is configured."""
        data = given.run.data
        return cls(rows, pipeline, given.name, given.share, data.on_bad_sample == "skip", data.max_bad_samples)


@dataclass(frozen=True)
class Order:
    """Source and row of every sample, a pure function of seed, epoch and position."""

    seed: int
    rows: tuple[int, ...]
    """Rows of each source."""
    shares: tuple[float, ...]
    """Probability of each source; they sum to 1."""
    samples: int
    """Samples per epoch: whole steps of the global batch."""

    def epoch(self, epoch: int) -> tuple[Indices, Indices]:
        """Source index and row of each sample of an epoch, both [samples].

        Every epoch draws the number of samples from each source from a multinomial distribution, and shuffles; this is
        equivalent to drawing each sample's source independently. So the rows that earlier epochs used are known without
        going through their samples: an epoch takes as long as the first, plus microseconds for each earlier one.
        """
        if len(self.rows) == 1:
            return np.zeros(self.samples, np.int64), epoch_order(self.seed, epoch, self.rows[0])[: self.samples]
        before = np.sum([self._visits(earlier)[0] for earlier in range(epoch)], axis=0, dtype=np.int64)
        visits, draw = self._visits(epoch)
        sources = draw.permutation(np.repeat(np.arange(len(self.rows)), visits))
        rows = np.empty(self.samples, np.int64)
        for source, first in enumerate(np.broadcast_to(before, len(self.rows)).tolist()):
            rows[sources == source] = self._rows(source, first, int(visits[source]))
        return sources, rows

    def _visits(self, epoch: int) -> tuple[Indices, np.random.Generator]:
        """[sources], samples per source in an epoch, and the generator that then shuffles them."""
        draw = generator(self.seed, epoch, COUNTS, 0)
        return draw.multinomial(self.samples, self.shares), draw

    def _rows(self, source: int, first: int, count: int) -> Indices:
        """The rows of a source's samples `first` to `first + count - 1`, counted from the start of the run."""
        rows = self.rows[source]
        start = first // rows * rows
        passes = range(start // rows, -(-(first + count) // rows))
        orders = [generator(self.seed, number, VISITS, source).permutation(rows) for number in passes]
        return np.concatenate([np.empty(0, np.int64), *orders])[first - start : first - start + count]


def order_of(sources: Sequence[Source], seed: int, samples: int) -> Order:
    """The random order of a run's sources, with `samples` per epoch."""
    rows = tuple(len(source.rows) for source in sources)
    return Order(seed, rows, tuple(source.share for source in sources), samples)
