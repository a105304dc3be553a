"""Which rows a step takes, in which order, and with which random numbers.

Everything is a pure function of (seed, step): the order of an epoch and the draws of a sample come from counter-based
generators, so ranks, workers and resumes change nothing (contract 1), and a resumed run needs to know nothing but its
step. Imports no torch: what does not divide is told before anything starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import NDArray

from rlinf_core.contract.run import RunConfig
from rlinf_core.errors import UserError

# The third word of Philox's counter separates the uses of one key; the first counts blocks of a use.
ORDER, TRAINING, VALIDATION, COUNTS, VISITS, CHUNKS = range(6)


@dataclass(frozen=True)
class Batching:
    """How samples are divided into steps, ranks and micro batches, and what keys their order."""

    global_batch_size: int
    """Samples a step, over all ranks."""
    micro_batch_size: int
    """Samples a rank computes at a time."""
    seed: int = 0
    """Keys order and draws."""
    rank: int = 0
    """This process."""
    ranks: int = 1
    """Number of processes."""

    @classmethod
    def of(cls, run: RunConfig, rank: int, ranks: int) -> Self:
        """As a run is configured."""
        return cls(run.trainer.global_batch_size, run.trainer.micro_batch_size, run.seed, rank, ranks)

    @property
    def accumulation(self) -> int:
        """Micro batches a rank computes for a step. Raises `UserError` if the sizes do not divide."""
        return check_batch(self.global_batch_size, self.micro_batch_size, self.ranks)


def epoch_order(seed: int, epoch: int, rows: int) -> NDArray[np.int64]:
    """The order in which an epoch visits the rows: a permutation of `range(rows)`."""
    return generator(seed, epoch, ORDER, 0).permutation(rows)


def sample_generator(seed: int, epoch: int, position: int) -> np.random.Generator:
    """The random numbers of the sample at a position of an epoch's order."""
    return generator(seed, epoch, TRAINING, position)


def validation_generator(seed: int, row: int) -> np.random.Generator:
    """The random numbers of a held-out row: the same in each validation."""
    return generator(seed, 0, VALIDATION, row)


def generator(seed: int, epoch: int, use: int, position: int) -> np.random.Generator:
    """The random numbers of one use; `epoch` and `position` tell its instances apart, whatever they count there."""
    return np.random.Generator(np.random.Philox(_Key(seed, epoch), counter=[0, position, use, 0]))  # type: ignore[arg-type]  # NumPy's stubs


class _Key(ISeedSequence):
    """`Philox(key=...)` asks the system for random bytes that it does not use, which takes most of its time."""

    def __init__(self, *words: int) -> None:
        self._words = words

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> NDArray[Any]:
        """The key."""
        return np.asarray(self._words).astype(dtype)


def check_batch(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """How many micro batches each rank computes for a step.

    Raises:
        UserError: The global batch is no multiple of ranks × micro batch; it names the nearest legal values.
    """
    together = world_size * micro_batch_size
    if global_batch_size % together == 0:
        return global_batch_size // together
    below = global_batch_size // together * together
    way_out = f"set global_batch_size to {' or '.join(str(size) for size in (below, below + together) if size)}"
    share, rest = divmod(global_batch_size, world_size)
    if not rest:
        way_out += f", or micro_batch_size to {max(m for m in range(1, micro_batch_size + 1) if share % m == 0)}"
    raise UserError(
        f"trainer.global_batch_size = {global_batch_size} is no multiple of {world_size} ranks x "
        f"trainer.micro_batch_size = {micro_batch_size}: {way_out}"
    )


def steps_per_epoch(rows: int, global_batch_size: int) -> int:
    """Steps of an epoch; rows that do not fill a last step are left out of it.

    Raises:
        UserError: The rows do not fill one step.
    """
    if rows < global_batch_size:
        raise UserError(
            f"the training split has {rows} rows, fewer than trainer.global_batch_size = {global_batch_size}: "
            "make the batch smaller"
        )
    return rows // global_batch_size
