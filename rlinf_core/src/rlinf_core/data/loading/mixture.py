"""The datasets of a run as the loader sees them, and which of their rows each sample of an epoch is.

A run of one dataset is a mixture of one, whose epochs take each row once. With several, each sample's source is drawn
with the probability `Source.share`, and an epoch has as many samples as all sources have rows.

*A source's visits go on across epochs*: its rows are taken by one permutation after another, none again before all
have been, and an epoch continues where the last one stopped. So a source with a low weight is seen wholly in time.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlinf_core.contract.datasets import SampleSource
from rlinf_core.data.loading.sampling import COUNTS, VISITS, epoch_order, generator
from rlinf_core.data.pipeline import Pipeline

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Source:
    """A dataset of a run, open: its training rows, and what makes samples of them."""

    rows: SampleSource
    pipeline: Pipeline
    name: str = ""
    """Its name in a mixture; empty for the dataset of a run that has one."""
    share: float = 1.0
    """The probability that a training sample comes from here."""


@dataclass(frozen=True)
class Order:
    """Source and row of every sample: a pure function of seed, epoch and position."""

    seed: int
    rows: tuple[int, ...]
    """Number of rows of each source."""
    shares: tuple[float, ...]
    """Probability of each source; they sum to 1."""
    samples: int
    """Samples an epoch takes: whole steps of the global batch."""

    def epoch(self, epoch: int) -> tuple[Indices, Indices]:
        """Number of the source and row in it, both [samples], in the order of an epoch.

        A mixture's number of visits to each source is drawn anew for every epoch (multinomially, so that with the
        shuffling each sample's source is drawn independently). What earlier epochs visited is thus known without going
        through their samples: any epoch takes as long as the first, but for microseconds an earlier one.
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
        """[sources], how many samples an epoch takes of each, and the generator that goes on to shuffle them."""
        draw = generator(self.seed, epoch, COUNTS, 0)
        return draw.multinomial(self.samples, self.shares), draw

    def _rows(self, source: int, first: int, count: int) -> Indices:
        """The rows of a source's visits `first` to `first + count - 1`, counted from the start of the run."""
        rows = self.rows[source]
        start = first // rows * rows
        passes = range(start // rows, -(-(first + count) // rows))
        orders = [generator(self.seed, number, VISITS, source).permutation(rows) for number in passes]
        return np.concatenate([np.empty(0, np.int64), *orders])[first - start : first - start + count]


def order_of(sources: Sequence[Source], seed: int, samples: int) -> Order:
    """The order in which a run takes the rows of its sources, `samples` an epoch."""
    rows = tuple(len(source.rows) for source in sources)
    return Order(seed, rows, tuple(source.share for source in sources), samples)
