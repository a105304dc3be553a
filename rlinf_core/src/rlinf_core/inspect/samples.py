"""A few training rows and how the pipeline turns them into the model's input.

Rows are chosen to differ: from several tasks, and from the start of an episode to its end, where chunks are padded. A
row that cannot be read or encoded is replaced by the error message, which names the row.
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
from rlinf_core.data.statistics.names import Names, name_dimensions
from rlinf_core.errors import UserError
from rlinf_core.illustration import Camera, Illustration, Picture

SAMPLES = 3
DRAWS = 3
"""Uses of a row by the run whose random numbers are shown."""
EPOCHS = 8
"""Epochs in which uses are searched: a mixture rarely uses a given row of a source with a small weight."""
FRAMES = 400
"""Maximum number of frames in the curves of an episode."""

GIVEN = "given to the model"
"""The last stage of an image in the pipeline."""

Vectors = NDArray[np.floating]


@dataclass(frozen=True)
class TrainingRow:
    """A training row and its position."""

    episode: int
    """The dataset's own number."""
    frame: int
    """Frame number in the episode, from 0."""
    index: int
    """Index in the source."""
    length: int
    """Frames of the episode."""


@dataclass(frozen=True)
class Numbers:
    """Summary of an array that the model gets."""

    name: str
    dtype: str
    shape: str
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Chunk:
    """The actions that a sample is trained on, within its episode. Data's units are those of the dataset's columns."""

    frames: NDArray[np.int64]
    """[F], the frames of the curves."""
    state: Vectors | None
    """[F, D], data's units."""
    actions: Vectors
    """[F, D], the action recorded with each frame, data's units."""
    at: NDArray[np.int64]
    """[H], the frames of the chunk; they continue past the end of the episode."""
    recorded: Vectors
    """[H, D], data's units."""
    target: Vectors
    """[H, D'], after the dataset's transforms and normalisation."""
    is_pad: NDArray[np.bool_]
    """[H], true past the end of the episode."""
    normalized: bool
    """Whether the policy normalises."""
    names: Names
    """The dataset's names of the dimensions of `state` and `actions`."""
    target_names: Names
    """Those of the dimensions of `target`, under `actions`."""


@dataclass
class SampleView:
    """What is shown of a training row."""

    row: TrainingRow
    where: str
    """The row in words, as in error messages."""
    prompt: str | None = None
    cameras: list[Camera] = field(default_factory=list)
    numbers: list[Numbers] = field(default_factory=list)
    chunk: Chunk | None = None
    illustration: Illustration = field(default_factory=Illustration)
    round_trip: float | None = None
    """The largest difference between the recorded chunk and the decoded encoded one."""
    problem: str = ""
    """Why the rest is missing."""


def choose(source: SampleSource, tasks: Mapping[int, str], count: int = SAMPLES) -> list[TrainingRow]:
    """Choose rows that differ: from tasks spread over all; a third into the episode, at its start, near its end, ...

    Args:
        source: The rows.
        tasks: Episode -> its task.
        count: How many rows; fewer if there are not enough different ones.
    """
    episodes = _Episodes(source)
    by_task: dict[str, list[int]] = {}
    for episode in episodes.first:
        by_task.setdefault(tasks.get(episode, ""), []).append(episode)
    texts = [list(by_task)[i] for i in np.linspace(0, len(by_task) - 1, min(count, len(by_task))).astype(int)]
    rows: list[TrainingRow] = []
    for number in range(count):
        members, turn = by_task[texts[number % len(texts)]], number // len(texts)
        episode = members[(len(members) // 2 + turn) % len(members)]
        length = episodes.length[episode]
        rows.append(episodes.row(episode, (length // 3, 0, max(0, length - 2))[number % 3]))
    return list(dict.fromkeys(rows))


def find(source: SampleSource, episode: int, frame: int, held_out: SampleSource | None = None) -> TrainingRow:
    """The row of an episode and frame. Raises `UserError` if it is not a training row."""
    episodes = _Episodes(source)
    if episode not in episodes.first:
        if held_out is not None and episode in held_out.episodes:
            raise UserError(
                f"--at {episode}:{frame}: episode {episode} is held out for validation: give a training episode"
            )
        known = list(episodes.first)
        raise UserError(
            f"--at {episode}:{frame}: episode {episode} is not one of the {len(known)} training episodes, which are "
            f"numbered {min(known)} to {max(known)}"
        )
    if frame >= episodes.length[episode]:
        frames = episodes.length[episode]
        raise UserError(f"--at {episode}:{frame}: episode {episode} has {frames} frames, numbered from 0")
    return episodes.row(episode, frame)


class _Episodes:
    """First row and length of each episode of a source; the rows of an episode are consecutive."""

    def __init__(self, source: SampleSource) -> None:
        numbers, first, lengths = np.unique(source.episodes, return_index=True, return_counts=True)
        order = np.argsort(first)
        self.first = dict(zip(numbers[order].tolist(), first[order].tolist(), strict=True))
        self.length = dict(zip(numbers.tolist(), lengths.tolist(), strict=True))

    def row(self, episode: int, frame: int) -> TrainingRow:
        return TrainingRow(episode, frame, self.first[episode] + frame, self.length[episode])


def occurrences(
    order: Order | ChunkedOrder, steps_per_epoch: int, stop_step: int, number: int, row: int
) -> Iterator[tuple[str, int, int]]:
    """The first `DRAWS` times that the run uses a row: step in words, epoch, position in the epoch's order.

    Args:
        order: The run's sampling order.
        steps_per_epoch: The run's steps per epoch.
        stop_step: The run's last step; uses after it are marked.
        number: Number of the row's source.
        row: The row's index in the source.
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
    row: TrainingRow,
    uses: Sequence[tuple[str, int, int]],
) -> SampleView:
    """Read a row, encode it as training does, and let the policy illustrate it.

    Args:
        run: The run, with the row's dataset as its `data`.
        source: The rows.
        pipeline: Encodes them.
        row: The row to show.
        uses: When the run uses it, see `occurrences`.
    """
    shown = SampleView(row, source.describe(row.index))
    try:
        (raw,) = source.__getitems__([row.index])
        target = pipeline.target(raw)
        shown.prompt = target.get("prompt")
        shown.cameras = _cameras(run, raw, target, {})
        sample = pipeline.encode(raw)
        shown.cameras = _cameras(run, raw, target, sample)
        shown.numbers = list(_numbers(sample))
        if "actions" in target and target["actions"].size:
            shown.chunk = _chunk(run, source, pipeline, row, raw)
            decoded = pipeline.decode(sample["actions"], sample)
            shown.round_trip = float(np.abs(decoded - target["actions"]).max())
        draws = {words: run.policy.draw(sample_generator(run.seed, epoch, at)) for words, epoch, at in uses}
        shown.illustration = run.policy.illustrate(sample, draws)
    except UserError as error:
        shown.problem = f"{error} [{shown.where}]"
    except Exception as error:
        error.add_note(f"while preparing the row {shown.where}")
        raise
    return shown


def _cameras(run: RunConfig, row: Row, target: Sample, sample: Sample | Mapping[str, Any]) -> list[Camera]:
    """Every camera's image as recorded, cropped, and given to the model, if these differ."""
    columns = run.data.images if isinstance(run.data, LeRobotDatasetConfig) else {}
    cameras = []
    for name, image in target.get("images", {}).items():
        stages = [
            ("recorded", row.get(columns.get(name, ""))),
            ("cropped", image),
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
        images = tuple(_captioned(names, pixels) for names, pixels in found)
        column = f"Column {columns[name]}." if name in columns else ""
        cameras.append(Camera(name, images, column))
    return cameras


def _captioned(stages: Sequence[str], pixels: NDArray[np.uint8]) -> Picture:
    """An image, captioned with the stages at which it is the same."""
    height, width = pixels.shape[:2]
    named = [stage for stage in stages if stage in (stages[0], GIVEN)]  # Stages that changed nothing are left out.
    return Picture(f"{' and '.join(named)}, {width} x {height}", pixels)


def _numbers(sample: Sample) -> Iterator[Numbers]:
    for name, value in sample.items():
        if isinstance(value, np.ndarray) and value.size:
            shape = " x ".join(map(str, value.shape))
            yield Numbers(name, str(value.dtype), shape, float(value.min()), float(value.max()))


def _chunk(run: RunConfig, source: SampleSource, pipeline: Pipeline, row: TrainingRow, raw: Row) -> Chunk:
    every = max(1, -(-row.length // FRAMES))
    frames = np.arange(0, row.length, every)
    of_episode = [pipeline.target(one) for one in source.without_images((row.index - row.frame + frames).tolist())]
    recorded = pipeline.target(raw)
    target = recorded
    for transform in (*pipeline.dataset, *((pipeline.normalize,) if pipeline.normalize else ())):
        target = transform(target)
    steps = len(recorded["actions"])
    stride = run.data.stride if isinstance(run.data, LeRobotDatasetConfig) else 1
    return Chunk(
        frames=frames,
        state=np.stack([one["state"] for one in of_episode]) if "state" in recorded else None,
        actions=np.stack([one["actions"][0] for one in of_episode]),
        at=row.frame + stride * np.arange(steps),
        recorded=recorded["actions"],
        target=target["actions"],
        is_pad=np.asarray(recorded.get("actions_is_pad", np.zeros(steps, np.bool_))),
        normalized=pipeline.normalize is not None,
        names=name_dimensions(run.data, source, [run.data.repack()]),
        target_names=name_dimensions(run.data, source, [run.data.repack(), *run.data.transforms()]),
    )
