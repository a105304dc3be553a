"""How much rows look like training rows.

The cost of a row is its distance to the most similar training row, over images, state and action together, each
relative to how far training rows of different episodes are apart; and, if the state's change can be predicted from
state and action, how far the change is from the prediction. Logarithms keep a number that is far off from hiding the
others. A mistake is a transformation that raises the cost; its correction brings the cost down.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rlinf_core.triage.mistakes.rows import Rows, Vectors

IMAGE_FLOOR = 1e-4
"""Least squared distance of images (from 0 to 1) that counts as different: noise and compression."""
VECTOR_FLOOR = 1e-3
"""Least squared distance of a number, in standard deviations of training."""
FAR = 1e3
"""Largest distance of a block or a number, relative to what is usual."""
SEEN = 0.2
"""Least share of an image that must be known to compare it."""
PREDICTABLE = 0.2
"""Least share of the variance of a state's change that state and action must explain, for the change to count."""
RIDGE = 1e-3


@dataclass(frozen=True, eq=False)
class Scale:
    """Centre and spread of each number of a vector in training, and how far rows of other episodes are, squared."""

    mean: Vectors
    spread: Vectors
    usual: Vectors
    moves: NDArray[np.bool_]
    """[D], numbers that vary at all."""

    def standard(self, x: Vectors) -> Vectors:
        """[..., D] in standard deviations."""
        return np.asarray((x - self.mean) / self.spread)


@dataclass(frozen=True, eq=False)
class Motion:
    """A linear prediction of the state's change from state and action."""

    weights: Vectors
    """[1 + D + A, D]."""
    change: Vectors
    """[D], standard deviation of the change."""
    error: Vectors
    """[D], variance of what the prediction leaves, of standardised changes."""
    explained: Vectors
    """[D], the share of the variance that the prediction explains."""


class Likeness:
    """Compares rows with training rows."""

    def __init__(self, reference: Rows, wide: Rows) -> None:
        """Measure what is usual.

        Args:
            reference: Training rows with images, of at least two episodes.
            wide: More training rows, without images.
        """
        self.reference = reference
        self._other = reference.episodes[:, None] != reference.episodes[None]
        self._pixels = {camera: _flat(images) for camera, images in reference.images.items()}
        self._usual = {
            camera: max(self._nearest(_squares(flat, flat)), IMAGE_FLOOR) for camera, flat in self._pixels.items()
        }
        self.state = None if wide.state is None else self._scale(wide.state, reference.state)
        self.action = self._scale(_ends(wide), _ends(reference))
        self.motion = self._fit(wide) if self.state is not None else None

    def _nearest(self, distance: NDArray[np.floating]) -> float:
        """The median distance to the nearest row of another episode."""
        apart = np.where(self._other, distance, np.inf).min(1)
        return float(np.median(apart[np.isfinite(apart)])) if np.isfinite(apart).any() else 0.0

    def _scale(self, wide: Vectors, reference: Vectors | None) -> Scale:
        assert reference is not None
        mean, spread = wide.mean(0), wide.std(0)
        moves = spread > 1e-6 * np.maximum(np.abs(mean), 1e-3)
        spread = np.where(moves, spread, np.maximum(0.05 * np.abs(mean), 1e-3))
        x = (reference - mean) / spread
        usual = [max(self._nearest(np.square(x[:, None, d] - x[None, :, d])), VECTOR_FLOOR) for d in range(x.shape[1])]
        # The nearest row in one number is much nearer than the nearest in all: the whole vector sets the scale.
        joint = self._nearest(np.square(x[:, None] - x[None]).mean(-1))
        return Scale(mean, spread, np.maximum(np.array(usual), max(joint, VECTOR_FLOOR)), moves)

    def _fit(self, wide: Rows) -> Motion | None:
        assert self.state is not None
        if wide.after is None:
            return None
        pairs = wide.take(np.asarray(~np.isnan(wide.after).any(1)))
        assert pairs.after is not None
        assert pairs.state is not None
        if len(pairs) < 4 * (1 + pairs.state.shape[1] + pairs.actions.shape[2]):
            return None
        change = pairs.after - pairs.state
        size = np.maximum(change.std(0), 1e-9)
        target = change / size
        x = self._features(pairs)
        train = pairs.episodes % 2 == 0 if len(np.unique(pairs.episodes)) > 3 else np.ones(len(pairs), np.bool_)
        weights = _ridge(x[train], target[train])
        tested = ~train if (~train).any() else train
        left = np.square(target[tested] - x[tested] @ weights).mean(0)
        explained = 1 - left / np.maximum(target[tested].var(0), 1e-9)
        if not (explained > PREDICTABLE).any():
            return None
        weights = _ridge(x, target)
        return Motion(weights, size, np.maximum(left, 0.02), np.clip(explained, 0, 1))

    def _features(self, rows: Rows) -> Vectors:
        assert self.state is not None
        assert rows.state is not None
        state = np.clip(self.state.standard(rows.state), -30, 30)
        action = np.clip(
            (rows.actions[:, 0] - self.action.mean[: rows.actions.shape[2]])
            / self.action.spread[: rows.actions.shape[2]],
            -30,
            30,
        )
        return np.concatenate([np.ones((len(rows), 1)), state, action], 1)

    def motion_cost(self, rows: Rows) -> Vectors:
        """[N], the cost of the state's change; 0 where it is unknown."""
        if self.motion is None or rows.after is None or rows.state is None:
            return np.zeros(len(rows))
        known = ~np.isnan(rows.after).any(1)
        cost = np.zeros(len(rows))
        pairs = replace(rows, images={}).take(np.asarray(known))
        if not len(pairs):
            return cost
        assert pairs.after is not None
        assert pairs.state is not None
        left = (pairs.after - pairs.state) / self.motion.change - self._features(pairs) @ self.motion.weights
        far = np.minimum(np.square(left) / self.motion.error, FAR)
        counted = self.motion.explained > PREDICTABLE
        cost[known] = (np.log1p(far) * self.motion.explained)[:, counted].sum(1)
        return cost

    def speed(self, rows: Rows) -> float | None:
        """How many times the change is what state and action predict; None if training allows no prediction."""
        if self.motion is None or rows.after is None or rows.state is None:
            return None
        pairs = rows.take(np.asarray(~np.isnan(rows.after).any(1)))
        counted = self.motion.explained > PREDICTABLE
        if len(pairs) < 4 or pairs.after is None or pairs.state is None:
            return None
        change = (pairs.after - pairs.state) / self.motion.change
        predicted = self._features(pairs) @ self.motion.weights
        change, predicted = change[:, counted], predicted[:, counted]
        size = np.square(predicted).sum(0)
        slopes = (change * predicted).sum(0)[size > 1e-9] / size[size > 1e-9]
        return float(np.median(slopes)) if len(slopes) and np.median(slopes) > 0.05 else None

    def image_cost(self, camera: str, images: NDArray[np.float32]) -> Vectors:
        """[M, N], the cost of images of one camera beside each reference image."""
        there, usual = self._pixels[camera], self._usual[camera]
        flat = _flat(images)
        known = ~np.isnan(flat[0])  # Pixels outside of a zoomed image are unknown in all of them.
        if known.mean() < SEEN:
            return np.full((len(flat), len(there)), np.log1p(FAR))
        if not known.all():
            flat, there = flat[:, known], there[:, known]
        distance = _squares(flat, there)
        return np.asarray(np.log1p(np.minimum(distance / usual, FAR)))

    def number_cost(self, scale: Scale, x: Vectors, reference: Vectors, number: int) -> NDArray[np.float32]:
        """[M, N], the cost of one number of vectors beside that of each reference row."""
        shift, spread = scale.mean[number], scale.spread[number] * np.sqrt(scale.usual[number])
        here, there = (np.clip((one[:, number] - shift) / spread, -1e6, 1e6) for one in (x, reference))
        apart = np.square(here.astype(np.float32)[:, None] - there.astype(np.float32)[None])
        cost: NDArray[np.float32] = np.log1p(np.minimum(apart, np.float32(FAR), out=apart), out=apart)
        return cost

    def vector_cost(self, scale: Scale, x: Vectors, reference: Vectors) -> Vectors:
        """[M, N], the cost of vectors beside those of each reference row: the mean over their numbers."""
        total = np.zeros((len(x), len(reference)))
        for number in range(x.shape[1]):
            total += self.number_cost(scale, x, reference, number)
        return total / x.shape[1]

    def vectors(self, rows: Rows, key: str) -> tuple[Scale, Vectors, Vectors] | None:
        """Scale, rows and reference of `state` or `action`; None if they cannot be compared."""
        there = self.reference.state
        if key == "state":
            if self.state is None or rows.state is None or there is None or rows.state.shape[1] != there.shape[1]:
                return None
            return self.state, rows.state, there
        if rows.actions.shape[2] != self.reference.actions.shape[2]:
            return None
        return self.action, _ends(rows), _ends(self.reference)

    def blocks(self, rows: Rows) -> dict[str, Vectors]:
        """[M, N] costs of each camera, of the state and of the action beside each reference row."""
        found = {
            f"image {camera}": self.image_cost(camera, images)
            for camera, images in rows.images.items()
            if camera in self._pixels
        }
        for key in ("state", "action"):
            if (compared := self.vectors(rows, key)) is not None:
                found[key] = self.vector_cost(*compared)
        return found

    def cost_matrix(self, rows: Rows, *, other_episodes: bool = False) -> Vectors:
        """[M, N], the cost of rows beside each reference row; infinite for those of the same episode if asked."""
        total = np.sum(list(self.blocks(rows).values()), axis=0)
        if other_episodes:
            total = np.where(rows.episodes[:, None] != self.reference.episodes[None], total, np.inf)
        return np.asarray(total)

    def cost(
        self,
        rows: Rows,
        known: dict[str, Vectors] | None = None,
        motion: Vectors | None = None,
        *,
        other_episodes: bool = False,
    ) -> Vectors:
        """[M], the cost of rows.

        Args:
            rows: The rows.
            known: Blocks that have not changed since they were computed.
            motion: The cost of the state's change, if that has not changed either.
            other_episodes: Compare with training rows of other episodes only: the rows are of training.
        """
        found = known if known is not None else self.blocks(rows)
        total = np.sum(list(found.values()), axis=0)
        if other_episodes:
            total = np.where(rows.episodes[:, None] != self.reference.episodes[None], total, np.inf)
        return np.asarray(total.min(1) + (self.motion_cost(rows) if motion is None else motion))


def _ends(rows: Rows) -> Vectors:
    """[N, 2 D], the first action of each chunk, and the last within the episode."""
    last = np.maximum(rows.within.sum(1) - 1, 0)
    return np.concatenate([rows.actions[:, 0], rows.actions[np.arange(len(rows)), last]], 1)


def _flat(images: NDArray[np.float32]) -> NDArray[np.float32]:
    return images.reshape(len(images), -1)


def _squares(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """[M, N], mean squared differences."""
    square = np.square(a).sum(1)[:, None] + np.square(b).sum(1)[None] - 2 * (a @ b.T)
    return np.asarray(np.maximum(square.astype(np.float64), 0.0) / max(a.shape[1], 1))


def _ridge(x: Vectors, y: Vectors) -> Vectors:
    gram = x.T @ x + RIDGE * len(x) * np.eye(x.shape[1])
    return np.asarray(np.linalg.solve(gram, x.T @ y))
