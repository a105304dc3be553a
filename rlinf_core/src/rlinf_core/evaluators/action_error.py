"""Errors of sampled actions in the data's units, per step of the chunk and dimension, beside two baselines.

Both baselines ignore the observation: one always outputs the mean action of the training rows, the other repeats the
robot's last action.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rlinf_core.contract.datasets import SampleSource
from rlinf_core.contract.evaluation import EvaluationPipeline, ValidationRow
from rlinf_core.errors import UserError
from rlinf_core.results import ActionErrors, Matrix, PredictedChunk

Vectors = NDArray[np.floating]

ROWS_FOR_THE_MEAN = 4096
"""Evenly spaced training rows from which the mean action is computed."""
GUESSES = ("policy", "mean action", "repeated action")
"""What is compared with the recorded actions: the policy, and the baselines."""
MOST_CHUNKS = 3
"""Chunks of an evaluation that are kept to be drawn."""


@dataclass
class ActionSums:
    """Summed errors; those of several ranks or rows add up."""

    squared: NDArray[np.float64]
    """[G, H, D], squared errors of `GUESSES`."""
    absolute: NDArray[np.float64]
    """[G, H, D], absolute errors."""
    counts: NDArray[np.float64]
    """[H], compared actions per step of the chunk."""
    rows: float = 0.0

    @classmethod
    def zeros(cls, steps: int, width: int) -> ActionSums:
        """No errors yet."""
        shape = (len(GUESSES), steps, width)
        return cls(np.zeros(shape), np.zeros(shape), np.zeros(steps))

    def flat(self) -> NDArray[np.float64]:
        """All numbers in one vector, to be summed over ranks."""
        return np.concatenate([self.squared.ravel(), self.absolute.ravel(), self.counts, [self.rows]])

    def unflat(self, values: Sequence[float]) -> ActionSums:
        """Sums of the same shape from such a vector."""
        numbers, size = np.asarray(values, np.float64), self.squared.size
        shape = self.squared.shape
        squared, absolute = numbers[:size].reshape(shape), numbers[size : 2 * size].reshape(shape)
        return ActionSums(squared, absolute, numbers[2 * size : -1], float(numbers[-1]))

    def __iadd__(self, other: ActionSums) -> ActionSums:
        self.squared += other.squared
        self.absolute += other.absolute
        self.counts += other.counts
        self.rows += other.rows
        return self

    def mean_squared(self) -> list[float]:
        """The mean squared error of each of `GUESSES`, over steps within the episode and dimensions."""
        compared = max(self.counts.sum() * self.squared.shape[2], 1.0)
        return [float(total) / compared for total in self.squared.sum((1, 2))]

    def errors(self, names: Sequence[str], chunks: Sequence[PredictedChunk] = ()) -> ActionErrors:
        """The errors as written to a file.

        Args:
            names: Names of the dimensions; may be shorter than an action.
            chunks: Chunks to draw.
        """
        per_step = np.maximum(self.counts, 1)[:, None]
        rmse, mae = np.sqrt(self.squared / per_step), self.absolute / per_step
        compared = self.counts > 0
        width = self.squared.shape[2]
        return ActionErrors(
            rows=int(self.rows),
            names=tuple([*names, *[""] * width][:width]),
            counts=tuple(self.counts.astype(int).tolist()),
            rmse=as_matrix(rmse[0], compared),
            mae=as_matrix(mae[0], compared),
            baselines={name: as_matrix(one, compared) for name, one in zip(GUESSES[1:], rmse[1:], strict=True)},
            chunks=tuple(chunks),
        )


@dataclass(frozen=True)
class ActionComparison:
    """Compares sampled chunks with the recorded ones, and with what the baselines output."""

    source: SampleSource
    """The rows whose actions are compared."""
    pipeline: EvaluationPipeline
    mean: Vectors
    """[D], the output of the baseline that always outputs the mean action."""
    steps: int
    """Actions in a chunk."""
    chunks: list[PredictedChunk] = field(default_factory=list)
    """The first few chunks."""

    def empty(self) -> ActionSums:
        """Sums of no rows."""
        return ActionSums.zeros(self.steps, len(self.mean))

    def compare(self, actions: Vectors, row: ValidationRow) -> ActionSums:
        """The errors of a row's sampled actions.

        Args:
            actions: [H, A], as the policy sampled them.
            row: The row.
        """
        return self.compare_decoded(self.pipeline.decode(actions, row.sample), row)

    def compare_decoded(self, decoded: Vectors, row: ValidationRow) -> ActionSums:
        """The errors of actions [H, D] that are in the data's units already."""
        within = ~row.target["actions_is_pad"]
        target = row.target["actions"]
        if decoded.shape != target.shape:
            raise UserError(
                f"the policy's actions have {decoded.shape[-1]} numbers in the data's units, the dataset's have "
                f"{target.shape[-1]}: cut them in the dataset's transforms (data.action_width, where it has that key)"
            )
        if len(self.chunks) < MOST_CHUNKS:
            kept = np.flatnonzero(within)
            where = self.source.describe(row.row)
            both = (as_matrix(one[kept], np.isfinite(one[kept]).all(1)) for one in (target, decoded))
            self.chunks.append(PredictedChunk(where=where, recorded=next(both), predicted=next(both)))
        difference = np.stack([decoded, *(np.broadcast_to(one, target.shape) for one in self._guesses(row))]) - target
        difference = np.where(within[:, None], difference, 0.0).astype(np.float64)
        return ActionSums(np.square(difference), np.abs(difference), within.astype(np.float64), 1.0)

    def _guesses(self, row: ValidationRow) -> tuple[Vectors, Vectors]:
        return self.mean, last_action(self.source, self.pipeline, row.row, self.mean)


def as_matrix(values: Vectors, known: NDArray[np.bool_]) -> Matrix:
    """A matrix [rows, columns] for a file, with None in unknown rows and for numbers that are not finite."""
    rows = np.asarray(values, np.float64)
    good = np.isfinite(rows) & known[:, None]
    return [
        [value if ok else None for value, ok in zip(row, oks, strict=True)]
        for row, oks in zip(rows.tolist(), good.tolist(), strict=True)
    ]


def last_action(source: SampleSource, pipeline: EvaluationPipeline, row: int, mean: Vectors) -> Vectors:
    """[D], the action before a row; for the first row of an episode, the mean action."""
    episodes = source.episodes
    if row == 0 or episodes[row - 1] != episodes[row]:
        return mean
    (before,) = source.without_images([row - 1])
    last: Vectors = pipeline.target(before)["actions"][0]
    return last


def mean_action(source: SampleSource, pipeline: EvaluationPipeline) -> Vectors:
    """[D], the mean action of the rows, in the data's own units."""
    indices = np.unique(np.linspace(0, len(source) - 1, min(len(source), ROWS_FOR_THE_MEAN)).astype(np.int64))
    actions = [pipeline.target(row)["actions"][0] for row in source.without_images(indices.tolist())]
    return np.asarray(np.mean(actions, axis=0, dtype=np.float64))
