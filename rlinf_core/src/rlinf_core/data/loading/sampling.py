"""The order of rows and the random numbers of samples, as pure functions of (seed, step).

Both come from counter-based generators, so they do not depend on ranks, workers or resumes (contract 1), and a resumed
run needs only its step. Imports no torch, so that invalid batch sizes are reported before anything starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import NDArray

from rlinf_core.contract.run import RunConfig
from rlinf_core.errors import UserError

# The third word of Philox's counter separates the uses of a key; the first counts blocks within a use.
ORDER, TRAINING, VALIDATION, COUNTS, VISITS, CHUNKS, REPLACEMENTS = range(7)


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
    """The order of the rows in an epoch, a permutation of `range(rows)`."""
    return generator(seed, epoch, ORDER, 0).permutation(rows)


def sample_generator(seed: int, epoch: int, position: int) -> np.random.Generator:
    """The generator for the sample at a position of an epoch."""
    return generator(seed, epoch, TRAINING, position)


def validation_generator(seed: int, row: int) -> np.random.Generator:
    """The generator for a held-out row, the same in every validation."""
    return generator(seed, 0, VALIDATION, row)


def generator(seed: int, epoch: int, use: int, position: int) -> np.random.Generator:
    """The generator for one use; `epoch` and `position` separate its instances, and may count anything."""
    return np.random.Generator(np.random.Philox(_Key(seed, epoch), counter=[0, position, use, 0]))  # type: ignore[arg-type]  # NumPy's stubs


class _Key(ISeedSequence):
    """A seed sequence that returns the key; `Philox(key=...)` would spend most of its time on unused entropy."""

    def __init__(self, *words: int) -> None:
        self._words = words

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> NDArray[Any]:
        """The key."""
        return np.asarray(self._words).astype(dtype)


def check_batch(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Return the number of micro batches per rank and step.

    Raises:
        UserError: The global batch is not a multiple of ranks × micro batch; the message names the nearest valid sizes.
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
        f"trainer.global_batch_size = {global_batch_size} is not a multiple of {world_size} ranks x "
        f"trainer.micro_batch_size = {micro_batch_size}: {way_out}"
    )


def steps_per_epoch(rows: int, global_batch_size: int) -> int:
    """Steps per epoch; rows that do not fill a last step are skipped.

    Raises:
        UserError: The rows do not fill one step.
    """
    if rows < global_batch_size:
        raise UserError(
            f"the training split has {rows} rows, fewer than trainer.global_batch_size = {global_batch_size}: "
            "make the batch smaller"
        )
    return rows // global_batch_size
