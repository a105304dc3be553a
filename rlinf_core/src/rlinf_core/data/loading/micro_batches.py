"""The micro batches of a rank, by number: rows are read, encoded, given random numbers and collated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from rlinf_core.contract.policy import PolicyConfig
from rlinf_core.data.loading.encoding import add_draws
from rlinf_core.data.loading.mixture import Indices, Source, order_of
from rlinf_core.data.loading.replacement import load_samples, take_marks
from rlinf_core.data.loading.sampling import Batching, sample_generator, steps_per_epoch
from rlinf_core.data.sample import REPLACED, SOURCE, Batch, Sample
from rlinf_core.errors import RunError, UserError
from rlinf_core.plugins.owners import exiting_code


@dataclass
class MicroBatches(Dataset[Any]):
    """The micro batches of one rank by number: with `a` per step, number i is the `i % a`-th of step `i // a`."""

    sources: Sequence[Source]
    policy: PolicyConfig
    batching: Batching

    def __post_init__(self) -> None:
        self.accumulation = self.batching.accumulation
        rows = sum(len(source.rows) for source in self.sources)
        self.steps_per_epoch = steps_per_epoch(rows, self.batching.global_batch_size)
        self.epoch_samples = self.steps_per_epoch * self.batching.global_batch_size
        self._order = order_of(self.sources, self.batching.seed, self.epoch_samples)
        self._epoch: tuple[int, tuple[Indices, Indices]] | None = None

    def __getitem__(self, number: int) -> Batch | UserError | RunError:
        """A collated micro batch; an error with a message is returned, as torch rewraps those raised in workers."""
        epoch, positions = self.positions(number)
        numbers, indices = (order[positions] for order in self._order_of_epoch(epoch))
        generators = [sample_generator(self.batching.seed, epoch, position) for position in positions.tolist()]
        try:
            batch = self.collate(add_draws(self._samples(epoch, numbers, indices), self.policy, generators))
        except (UserError, RunError) as e:
            return e
        except SystemExit as e:  # It would end a worker without a word.
            return exiting_code(e)
        return batch if len(self.sources) == 1 else {**batch, SOURCE: torch.from_numpy(numbers)}

    def positions(self, number: int) -> tuple[int, Indices]:
        """The epoch of a micro batch, and [B], its samples' positions in the epoch."""
        step, micro = divmod(number, self.accumulation)
        epoch, step = divmod(step, self.steps_per_epoch)
        return epoch, step * self.batching.global_batch_size + self.places(micro, self.batching.rank)

    def places(self, micro: int, rank: int) -> Indices:
        """[B], indices in a step of the samples of a rank's micro batch number `micro`."""
        first: int = (micro * self.batching.ranks + rank) * self.batching.micro_batch_size
        return np.arange(first, first + self.batching.micro_batch_size)

    def global_batch(self, step: int) -> tuple[Indices, Indices]:
        """Source index and row of each sample of a step (from 0) over all ranks, both [global batch]."""
        epoch, step = divmod(step, self.steps_per_epoch)
        positions = slice(step * self.batching.global_batch_size, (step + 1) * self.batching.global_batch_size)
        numbers, indices = (order[positions] for order in self._order_of_epoch(epoch))
        return numbers, indices

    def collate(self, samples: list[Sample]) -> Batch:
        """The batch of samples; those of replaced rows are listed under `REPLACED`."""
        replaced = take_marks(samples)
        batch = self.policy.collate(samples)
        return {**batch, REPLACED: replaced} if replaced else batch

    def _samples(self, epoch: int, numbers: Indices, indices: Indices) -> list[Sample]:
        """The samples of a micro batch, without draws; the rows of a source are read together."""
        samples: dict[int, Sample] = {}
        for number in np.unique(numbers):
            source, places = self.sources[number], np.flatnonzero(numbers == number).tolist()
            own = indices[places].tolist()
            loaded = load_samples(source, int(number), own, seed=self.batching.seed, epoch=epoch)
            samples |= zip(places, loaded, strict=True)
        return [samples[place] for place in range(len(numbers))]

    def _order_of_epoch(self, epoch: int) -> tuple[Indices, Indices]:
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self._order.epoch(epoch)
        return self._epoch[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_epoch": None}
