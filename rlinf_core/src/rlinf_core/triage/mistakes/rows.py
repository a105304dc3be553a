"""Rows as the tests compare them: small images, states, actions and prompts of a few hundred rows, as arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rlinf_core.contract.datasets import SampleSource
from rlinf_core.contract.evaluation import EvaluationPipeline
from rlinf_core.data.loading.encoding import read_rows

SIDE = 32
"""Pixels of a small image's sides."""
AT_A_TIME = 32
"""Rows that are read together: their images are in memory at full size."""

Vectors = NDArray[np.floating]


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of a dataset in the data's own units, after repacking."""

    indices: NDArray[np.int64]
    """[N], rows of the source."""
    episodes: NDArray[np.int64]
    """[N]."""
    images: Mapping[str, NDArray[np.float32]]
    """Camera -> [N, SIDE, SIDE, 3] from 0 to 1, with the aspect ratio kept and black borders, as policies see them."""
    sizes: Mapping[str, tuple[int, int]]
    """Camera -> height and width of the first image."""
    state: Vectors | None
    """[N, D]; None if the dataset has none."""
    after: Vectors | None
    """[N, D], the state one frame later; NaN after the last frame of an episode."""
    actions: Vectors
    """[N, H, D]."""
    within: NDArray[np.bool_]
    """[N, H], False past the end of the episode."""
    prompts: tuple[str, ...]
    runs: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """[N], the number of the run of consecutive rows that a row is in."""

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, chosen: NDArray[Any]) -> Rows:
        """Some of the rows, by their positions or a mask."""
        at = np.flatnonzero(chosen) if chosen.dtype == np.bool_ else chosen
        return Rows(
            self.indices[at],
            self.episodes[at],
            {camera: images[at] for camera, images in self.images.items()},
            self.sizes,
            None if self.state is None else self.state[at],
            None if self.after is None else self.after[at],
            self.actions[at],
            self.within[at],
            tuple(self.prompts[i] for i in at.tolist()),
            self.runs[at],
        )


def spread(count: int, most: int) -> NDArray[np.int64]:
    """Up to `most` evenly spread numbers below `count`."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def choose_runs(episodes: NDArray[np.int64], runs: int, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Runs of consecutive rows, spread over the episodes and over each episode's time.

    Args:
        episodes: [N], the episode of each row.
        runs: Runs to choose, at most.
        length: Rows of a run; a shorter episode is one run.

    Returns:
        The rows, and the number of each row's run.
    """
    starts = np.flatnonzero(np.r_[True, episodes[1:] != episodes[:-1]])
    ends = np.r_[starts[1:], len(episodes)]
    per_episode = max(1, -(-runs // len(starts)))
    chosen = spread(len(starts), runs)
    rows, numbers = [], []
    for order, episode in enumerate(chosen.tolist()):
        first, last = int(starts[episode]), int(ends[episode])
        room = max(0, last - first - length)
        # One run of each episode: early in the first, later in the next, so that all parts of episodes are there.
        places = np.linspace(0, room, per_episode + 2)[1:-1] if per_episode > 1 else [room * ((order * 0.382) % 1)]
        for place in places:
            begin = first + round(float(place))
            rows.append(np.arange(begin, min(begin + length, last)))
            numbers.append(np.full(len(rows[-1]), len(rows) - 1))
    return np.concatenate(rows), np.concatenate(numbers)


def read(
    source: SampleSource,
    pipeline: EvaluationPipeline,
    indices: NDArray[np.int64],
    runs: NDArray[np.int64] | None = None,
    *,
    images: bool = True,
) -> Rows:
    """Read rows.

    Args:
        source: The rows.
        pipeline: Repacks them.
        indices: Which rows.
        runs: The number of each row's run; default: each row is one of its own.
        images: Whether to read images.
    """
    samples: list[Any] = []
    small: dict[str, list[NDArray[np.float32]]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for sample in _samples(source, pipeline, indices.tolist(), images=images):
        for camera, image in sample.pop("images", {}).items():
            sizes.setdefault(camera, image.shape[:2])
            small.setdefault(camera, []).append(shrink(image))
        samples.append(sample)
    complete = {camera: np.stack(found) for camera, found in small.items() if len(found) == len(samples)}
    state = np.stack([s["state"] for s in samples]).astype(np.float64) if "state" in samples[0] else None
    return Rows(
        indices=indices,
        episodes=source.episodes[indices],
        images=complete,
        sizes=sizes,
        state=state,
        after=None if state is None else _states_after(source, pipeline, indices, state),
        actions=np.stack([s["actions"] for s in samples]).astype(np.float64),
        within=~np.stack([s["actions_is_pad"] for s in samples]),
        prompts=tuple(str(s.get("prompt", "")) for s in samples),
        runs=np.arange(len(indices)) if runs is None else runs,
    )


def _samples(
    source: SampleSource, pipeline: EvaluationPipeline, indices: Sequence[int], *, images: bool
) -> Iterator[dict[str, Any]]:
    for start in range(0, len(indices), AT_A_TIME):
        part = indices[start : start + AT_A_TIME]
        rows = read_rows(source, part) if images else source.without_images(part)
        for row in rows:
            yield dict(pipeline.target(row))


def _states_after(
    source: SampleSource, pipeline: EvaluationPipeline, indices: NDArray[np.int64], state: Vectors
) -> Vectors:
    following = np.minimum(indices + 1, len(source) - 1)
    there = (source.episodes[following] == source.episodes[indices]) & (following > indices)
    after = np.full_like(state, np.nan)
    rows = source.without_images(following[there].tolist())
    if rows:
        after[there] = [pipeline.target(row)["state"] for row in rows]
    return after


def shrink(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """An image as a small one, [SIDE, SIDE, 3] from 0 to 1: the aspect ratio is kept, the borders are black."""
    height, width = image.shape[:2]
    ratio = max(height, width) / SIDE
    size = max(1, round(width / ratio)), max(1, round(height / ratio))
    small = np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize(size, Image.Resampling.BOX), np.float32)
    out = np.zeros((SIDE, SIDE, 3), np.float32)
    top, left = (SIDE - size[1]) // 2, (SIDE - size[0]) // 2
    out[top : top + size[1], left : left + size[0]] = small / 255
    return out
