"""What training saw, kept with an exported policy: tasks, image sizes, the range of states.

A run measures it once, on rank 0 when it begins (`measure`), and writes `coverage.json` into its folder. `rlinf export`
copies it into `rlinf.json`, and `LoadedPolicy.infer` compares observations with it: an observation that is outside
gives one warning with the numbers, and one that the policy cannot have learned to act on is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlinf_core.data.sample import Sample
from rlinf_core.data.transforms import Transform
from rlinf_core.errors import UserError

FILE = "coverage.json"
"""Its name in a run's folder: the dataset's name in a mixture, or an empty one -> its `Coverage`."""
MARGIN = 0.1
"""A state is reported if it is outside the range of training by more than this share of the range."""
SAME_SHAPE = 0.01
"""Aspect ratios that differ by a smaller share are the same."""
MOST_TASKS = 64
"""Tasks that are listed."""
LONGEST_TASK = 300
"""Characters of a task that is listed."""
LISTED = 4
"""A warning lists at most this many dimensions or sizes."""

Size = tuple[int, int]
"""Height and width in pixels."""
Range = tuple[float, float]
Vector = NDArray[np.floating]
Report = Callable[[str, str], None]
"""Called with what a warning is about, of which each gives one warning, and its text."""


class Coverage(BaseModel):
    """What the training rows of one dataset covered; an empty value of a field means that it is not known."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    rows: int = Field(default=0, ge=0)
    """Number of rows, spread over the data, that tasks and measured numbers are from."""
    empty_tasks: bool | None = None
    """Whether a row had an empty task; None: samples have no task."""
    images: dict[str, tuple[Size, ...]] = {}
    """The policy's camera -> sizes of its images before any transform."""
    measured: dict[str, Range] = {}
    """The range of each number that the policy measures (`PolicyConfig.measured`)."""
    state_low: tuple[float, ...] = ()
    """[D], the smallest state of all rows, after the dataset's transforms and before normalisation."""
    state_high: tuple[float, ...] = ()
    """[D], the largest one."""
    tasks: tuple[str, ...] = Field(default=(), max_length=MOST_TASKS)
    """The first different tasks of the training rows."""
    num_tasks: int = Field(default=0, ge=0)
    """Number of different tasks."""
    fps: float = Field(default=0.0, ge=0)
    """Actions of a chunk per second; 0: not known."""
    names: dict[str, tuple[str, ...]] = {}
    """`state` and `actions` -> the dataset's name of each of their numbers, before the dataset's transforms."""

    @property
    def state(self) -> tuple[Vector, Vector] | None:
        """The range of states, [D] each; None if it is not known."""
        if not self.state_low or len(self.state_low) != len(self.state_high):
            return None
        return np.array(self.state_low), np.array(self.state_high)


def measure(
    samples: Iterable[Sample],
    measured: Callable[[Sample], Mapping[str, float]],
    images: Iterable[Mapping[str, NDArray[Any]]],
    state: tuple[Vector, Vector] | None,
) -> Coverage:
    """Measure what training rows cover.

    Args:
        samples: Encoded rows spread over the data, without images.
        measured: `PolicyConfig.measured`.
        images: The images of some rows before any transform, by camera.
        state: The smallest and the largest state, [D] each; None if it is not known.
    """
    rows, empty, numbers = 0, None, dict[str, Range]()
    for sample in samples:
        rows += 1
        if "prompt" in sample:
            empty = bool(empty) or is_empty(sample["prompt"])
        for name, value in measured(sample).items():
            low, high = numbers.get(name, (value, value))
            numbers[name] = min(low, value), max(high, value)
    sizes: dict[str, dict[Size, None]] = {}
    for row in images:
        for camera, image in row.items():
            sizes.setdefault(camera, {})[image.shape[0], image.shape[1]] = None
    return Coverage(
        rows=rows,
        empty_tasks=empty,
        images={camera: tuple(found) for camera, found in sizes.items()},
        measured=numbers,
        state_low=tuple(state[0].tolist()) if state else (),
        state_high=tuple(state[1].tolist()) if state else (),
    )


def list_tasks(tasks: Iterable[str]) -> dict[str, Any]:
    """The fields of a `Coverage` that are about tasks, of different texts."""
    texts = list(dict.fromkeys(tasks))
    return {"tasks": tuple(text[:LONGEST_TASK] for text in texts[:MOST_TASKS]), "num_tasks": len(texts)}


def is_empty(task: object) -> bool:
    """Whether a task says nothing."""
    return not str(task).strip()


def parse_coverage(tables: object, name: str, where: str) -> Coverage | None:
    """The coverage of a dataset, out of `coverage.json` or of an exported description.

    Args:
        tables: The dataset's name -> its table; None in folders that were exported before there was one.
        name: The dataset's name in a mixture; if it is empty and there is only one dataset, that one.
        where: The file, for messages.

    Raises:
        UserError: It is not a table of coverages.
    """
    if not tables:
        return None
    try:
        if not isinstance(tables, Mapping):
            raise TypeError("it must be a table")
        table = next(iter(tables.values())) if len(tables) == 1 else tables.get(name)
        return None if table is None else Coverage.model_validate(table)
    except (TypeError, ValidationError) as error:
        raise UserError(f"{where}: its coverage is not valid: {' '.join(str(error).split())}") from error


@dataclass(frozen=True)
class CompareObservation(Transform):
    """Compare a repacked observation's task and image sizes with training; changes nothing."""

    coverage: Coverage
    report: Report

    def __call__(self, sample: Sample) -> Sample:
        """Return the sample unchanged; raise `UserError` for an empty task if training had none."""
        if "prompt" in sample and is_empty(sample["prompt"]) and self.coverage.empty_tasks is False:
            raise UserError(
                "the observation's 'task' is empty, but no task of the training data was: the policy has not learned "
                "to act without one. Give it a task in words like those of the training data"
            )
        for camera, image in sample.get("images", {}).items():
            sizes = self.coverage.images.get(camera)
            if sizes and isinstance(image, np.ndarray) and image.ndim >= 2 and image.shape[:2] not in sizes:
                self.report(f"images of {camera}", _other_size(camera, (image.shape[0], image.shape[1]), sizes))
        return sample


@dataclass(frozen=True)
class CompareState(Transform):
    """Compare a state with the range of training, after the dataset's transforms; changes nothing."""

    low: Vector
    high: Vector
    report: Report

    def __call__(self, sample: Sample) -> Sample:
        """Return the sample unchanged."""
        state = sample.get("state")
        if state is not None and state.shape == self.low.shape:
            room = MARGIN * (self.high - self.low) + 1e-3 * np.maximum(np.abs(self.low), np.abs(self.high)) + 1e-6
            outside = np.flatnonzero((state < self.low - room) | (state > self.high + room)).tolist()
            low, high = self.low, self.high
            if found := [f"[{i}] is {state[i]:.4g}, in training {low[i]:.4g} to {high[i]:.4g}" for i in outside]:
                self.report(
                    "the state",
                    f"the state is outside the range of the training data: {listed(found)}. Check its units and the "
                    "order of its numbers",
                )
        return sample


def _other_size(camera: str, size: Size, sizes: Sequence[Size]) -> str:
    known = listed([_pixels(one) for one in sizes])
    ratio = size[1] / max(size[0], 1)
    same = any(abs(ratio / (width / height) - 1) < SAME_SHAPE for height, width in sizes if height and width)
    text = f"the image of camera {camera!r} is {_pixels(size)}, in training {known}"
    if same:
        return f"{text}: its details are finer or coarser"
    return f"{text}: another aspect ratio shows objects elsewhere and in other sizes. Record or crop it as in training"


def _pixels(size: Size) -> str:
    return f"{size[1]} x {size[0]} pixels"


def listed(texts: Sequence[str]) -> str:
    """The first few texts, and how many more there are."""
    return ", ".join(texts[:LISTED]) + f" and {len(texts) - LISTED} more" * (len(texts) > LISTED)
