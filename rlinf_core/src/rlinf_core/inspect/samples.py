"""A few training rows on their way to the model, and what of each is shown.

Rows are chosen so that they differ: of several tasks, from the beginning of an episode to its end, past which chunks
run. What cannot be read or encoded is shown in words, with the row's place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlinf_core.contract.datasets import LeRobotDatasetConfig, SampleSource
from rlinf_core.contract.run import RunConfig
from rlinf_core.data.loading.chunked_sampling import ChunkedOrder
from rlinf_core.data.loading.mixture import Order
from rlinf_core.data.loading.sampling import sample_generator
from rlinf_core.data.pipeline import Pipeline
from rlinf_core.data.sample import Row, Sample
from rlinf_core.errors import UserError
from rlinf_core.illustration import Camera, Illustration, Picture

SAMPLES = 3
DRAWS = 3
"""Meetings with the run whose random numbers are shown."""
EPOCHS = 8
"""Within which they are looked for: a mixture meets a row of a light source rarely."""
FRAMES = 400
"""Frames of an episode's curves at most."""

GIVEN = "given to the model"
"""The last stage of an image that the data path knows."""

Vectors = NDArray[np.floating]


@dataclass(frozen=True)
class Place:
    """A training row."""

    episode: int
    """The dataset's own number."""
    frame: int
    """Counted from 0 in the episode."""
    row: int
    """Index in the source."""
    length: int
    """Frames of the episode."""


@dataclass(frozen=True)
class Numbers:
    """An array that the model gets, in a line."""

    name: str
    dtype: str
    shape: str
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Chunk:
    """The actions a sample is trained on, within its episode. Data's units are those of the dataset's own columns."""

    frames: NDArray[np.int64]
    """[F], the frames of the curves."""
    state: Vectors | None
    """[F, D], data's units."""
    actions: Vectors
    """[F, D], the action recorded with each frame, data's units."""
    at: NDArray[np.int64]
    """[H], the frames of the chunk; past the end of the episode they go on."""
    recorded: Vectors
    """[H, D], data's units."""
    target: Vectors
    """[H, D'], after the dataset's transforms and normalisation."""
    is_pad: NDArray[np.bool_]
    """[H], past the end of the episode."""
    normalized: bool
    """Whether the policy normalises."""


@dataclass
class SampleView:
    """What is shown of a training row."""

    place: Place
    where: str
    """The row in words, as errors name it."""
    prompt: str | None = None
    cameras: list[Camera] = field(default_factory=list)
    numbers: list[Numbers] = field(default_factory=list)
    chunk: Chunk | None = None
    illustration: Illustration = field(default_factory=Illustration)
    round_trip: float | None = None
    """The largest difference between the recorded chunk and what decoding makes of the encoded one."""
    problem: str = ""
    """Why there is no more."""


def choose(source: SampleSource, tasks: Mapping[int, str], count: int = SAMPLES) -> list[Place]:
    """Rows that differ: of tasks spread over all, within the episode a third in, at the start, near the end, ...

    Args:
        source: The rows.
        tasks: Episode -> its task.
        count: How many, if there are as many rows that differ.
    """
    episodes = _Episodes(source)
    by_task: dict[str, list[int]] = {}
    for episode in episodes.first:
        by_task.setdefault(tasks.get(episode, ""), []).append(episode)
    texts = [list(by_task)[i] for i in np.linspace(0, len(by_task) - 1, min(count, len(by_task))).astype(int)]
    places: list[Place] = []
    for number in range(count):
        members, turn = by_task[texts[number % len(texts)]], number // len(texts)
        episode = members[(len(members) // 2 + turn) % len(members)]
        length = episodes.length[episode]
        places.append(episodes.place(episode, (length // 3, 0, max(0, length - 2))[number % 3]))
    return list(dict.fromkeys(places))


def find(source: SampleSource, episode: int, frame: int, held_out: SampleSource | None = None) -> Place:
    """A row by episode and frame. Raises `UserError` if there is none among the training rows."""
    episodes = _Episodes(source)
    if episode not in episodes.first:
        if held_out is not None and episode in held_out.episodes:
            raise UserError(
                f"--at {episode}:{frame}: episode {episode} is held out for validation: name one that is trained on"
            )
        known = list(episodes.first)
        raise UserError(
            f"--at {episode}:{frame}: episode {episode} is none of the {len(known)} that are trained on, which are "
            f"numbered {min(known)} to {max(known)}"
        )
    if frame >= episodes.length[episode]:
        raise UserError(f"--at {episode}:{frame}: episode {episode} has {episodes.length[episode]} frames, from 0")
    return episodes.place(episode, frame)


class _Episodes:
    """Where the episodes of a source lie; their rows follow one another."""

    def __init__(self, source: SampleSource) -> None:
        numbers, first, lengths = np.unique(source.episodes, return_index=True, return_counts=True)
        order = np.argsort(first)
        self.first = dict(zip(numbers[order].tolist(), first[order].tolist(), strict=True))
        self.length = dict(zip(numbers.tolist(), lengths.tolist(), strict=True))

    def place(self, episode: int, frame: int) -> Place:
        return Place(episode, frame, self.first[episode] + frame, self.length[episode])


def meetings(
    order: Order | ChunkedOrder, steps_per_epoch: int, stop_step: int, number: int, row: int
) -> Iterator[tuple[str, int, int]]:
    """Where the run meets a row, the first `DRAWS` times: in words, epoch, position in its order.

    Args:
        order: Of the run.
        steps_per_epoch: Of the run.
        stop_step: Where the run ends; meetings after it are said to be.
        number: Of the row's source.
        row: Its index there.
    """
    batch = order.samples // steps_per_epoch
    found = 0
    for epoch in range(EPOCHS):
        sources, rows = order.epoch(epoch)
        for position in np.flatnonzero((sources == number) & (rows == row)).tolist():
            if found == DRAWS:
                return
            found += 1
            step = epoch * steps_per_epoch + position // batch
            after = ", after the run's end" if step >= stop_step else ""
            yield f"step {step} (epoch {epoch}{after})", epoch, position


def view(
    run: RunConfig,
    source: SampleSource,
    pipeline: Pipeline,
    place: Place,
    met: Sequence[tuple[str, int, int]],
) -> SampleView:
    """Read a row, encode it as training does, and ask the policy what it shows of it.

    Args:
        run: With the row's dataset as its `data`.
        source: The rows.
        pipeline: Encodes them.
        place: Which row.
        met: Where the run meets it, see `meetings`.
    """
    shown = SampleView(place, source.describe(place.row))
    try:
        (row,) = source.__getitems__([place.row])
        target = pipeline.target(row)
        shown.prompt = target.get("prompt")
        shown.cameras = _cameras(run, row, target, {})
        sample = pipeline.encode(row)
        shown.cameras = _cameras(run, row, target, sample)
        shown.numbers = list(_numbers(sample))
        if "actions" in target and target["actions"].size:
            shown.chunk = _chunk(run, source, pipeline, place, row)
            decoded = pipeline.decode(sample["actions"], sample)
            shown.round_trip = float(np.abs(decoded - target["actions"]).max())
        draws = {words: run.policy.draw(sample_generator(run.seed, epoch, at)) for words, epoch, at in met}
        shown.illustration = run.policy.illustrate(sample, draws)
    except UserError as error:
        shown.problem = f"{error} [{shown.where}]"
    except Exception as error:
        error.add_note(f"while preparing the row {shown.where}")
        raise
    return shown


def _cameras(run: RunConfig, row: Row, target: Sample, sample: Sample | Mapping[str, Any]) -> list[Camera]:
    """Every camera's image as recorded, cut, and given to the model, where these differ."""
    columns = run.data.images if isinstance(run.data, LeRobotDatasetConfig) else {}
    cameras = []
    for name, image in target.get("images", {}).items():
        stages = [
            ("recorded", row.get(columns.get(name, ""))),
            ("cut", image),
            (GIVEN, sample.get("images", {}).get(name)),
        ]
        found: list[tuple[list[str], NDArray[np.uint8]]] = []
        for stage, pixels in stages:
            if pixels is None:
                continue
            if found and np.array_equal(found[-1][1], pixels):
                found[-1][0].append(stage)
            else:
                found.append(([stage], pixels))
        pictures = tuple(_captioned(names, pixels) for names, pixels in found)
        column = f"Column {columns[name]}." if name in columns else ""
        cameras.append(Camera(name, pictures, column))
    return cameras


def _captioned(stages: Sequence[str], pixels: NDArray[np.uint8]) -> Picture:
    """A picture that stands at several stages."""
    height, width = pixels.shape[:2]
    told = [stage for stage in stages if stage in (stages[0], GIVEN)]  # What cuts nothing is not told.
    return Picture(f"{' and '.join(told)}, {width} x {height}", pixels)


def _numbers(sample: Sample) -> Iterator[Numbers]:
    for name, value in sample.items():
        if isinstance(value, np.ndarray) and value.size:
            shape = " x ".join(map(str, value.shape))
            yield Numbers(name, str(value.dtype), shape, float(value.min()), float(value.max()))


def _chunk(run: RunConfig, source: SampleSource, pipeline: Pipeline, place: Place, row: Row) -> Chunk:
    every = max(1, -(-place.length // FRAMES))
    frames = np.arange(0, place.length, every)
    of_episode = [pipeline.target(one) for one in source.without_images((place.row - place.frame + frames).tolist())]
    recorded = pipeline.target(row)
    target = recorded
    for transform in (*pipeline.dataset, *((pipeline.normalize,) if pipeline.normalize else ())):
        target = transform(target)
    steps = len(recorded["actions"])
    stride = run.data.stride if isinstance(run.data, LeRobotDatasetConfig) else 1
    return Chunk(
        frames=frames,
        state=np.stack([one["state"] for one in of_episode]) if "state" in recorded else None,
        actions=np.stack([one["actions"][0] for one in of_episode]),
        at=place.frame + stride * np.arange(steps),
        recorded=recorded["actions"],
        target=target["actions"],
        is_pad=np.asarray(recorded.get("actions_is_pad", np.zeros(steps, np.bool_))),
        normalized=pipeline.normalize is not None,
    )
