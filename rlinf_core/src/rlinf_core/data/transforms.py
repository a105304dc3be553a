"""Transforms: small frozen dataclasses, named by a verb, each with its inverse.

A transform returns a new sample and changes no array in place. `inverse` undoes it on a policy's output (`actions`, and
`state`, which relative actions need); a transform that changes neither inherits the identity. Every transform accepts
samples without `actions` (inference) and without `images` (statistics).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlinf_core.data.sample import Row, Sample
from rlinf_core.errors import UserError


class Transform(ABC):
    """One step of the pipeline."""

    batched: ClassVar[bool] = False
    """Whether this class's `__call__` also accepts many samples at once (arrays with the sample axis first, no images,
    `prompt` a list or a single string) and returns the same numbers. Statistics use this, as it is much faster. A class
    that overrides `__call__` must set it again."""
    resizes: ClassVar[bool] = False
    """Whether it resizes all images to one size, leaves images of that size unchanged, and changes nothing else. If a
    policy's first transform does, `rlinf cache` may store the resized images."""

    @abstractmethod
    def __call__(self, sample: Any) -> Sample:
        """Return the transformed sample; the argument is not modified."""

    def inverse(self, sample: Sample) -> Sample:
        """Undo the transform on `actions` and `state`. The identity unless overridden."""
        return sample


class Box(NamedTuple):
    """A rectangle in an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def cut(self, image: NDArray[np.uint8], name: str) -> NDArray[np.uint8]:
        """[H, W, 3] -> [height, width, 3]; raises `UserError` naming the camera if the image is smaller."""
        height, width = image.shape[:2]
        if self.top + self.height > height or self.left + self.width > width:
            raise UserError(
                f"data.crops.{name} reaches row {self.top + self.height} and column {self.left + self.width}, but the "
                f"image has {height} rows and {width} columns: correct the crop, or use images of its size"
            )
        return image[self.top : self.top + self.height, self.left : self.left + self.width]


@dataclass(frozen=True)
class Concatenate(Transform):
    """Repack a row: map its columns to a sample's keys, concatenating several state or action columns.

    The first step of every pipeline. The result is in the data's own units; predictions are compared with it.
    """

    batched = True

    images: dict[str, str]
    state: tuple[str, ...]
    actions: tuple[str, ...]
    default_prompt: str = ""
    prompt_from_task: bool = True
    """Use the row's task as the prompt, and `default_prompt` only for rows without a task."""
    crops: Mapping[str, Box] = field(default_factory=dict)
    """Camera -> the rectangle of its image to keep."""

    def __call__(self, sample: Row) -> Sample:
        """Row -> sample: state [sum of widths], actions [H, sum of widths]."""
        out = Sample(images={name: self._image(name, sample[c]) for name, c in self.images.items() if c in sample})
        if self.state:
            out["state"] = np.concatenate([np.atleast_1d(sample[column]) for column in self.state], axis=-1)
        if self.actions and self.actions[0] in sample:
            out["actions"] = np.concatenate([np.asarray(sample[column]) for column in self.actions], axis=-1)
            out["actions_is_pad"] = sample[f"{self.actions[0]}_is_pad"]
        out["prompt"] = self._prompt(sample)
        return out

    def _image(self, name: str, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return self.crops[name].cut(image, name) if name in self.crops else image

    def _prompt(self, row: Row) -> Any:
        """The prompt of a row, or the prompts of a batch of rows."""
        if not self.prompt_from_task or (self.default_prompt and "task" not in row):
            return self.default_prompt
        task = row["task"]
        return self._or_default(task) if isinstance(task, str) else [*map(self._or_default, task)]

    def _or_default(self, task: str) -> str:
        return task if task.strip() else self.default_prompt or task


@dataclass(frozen=True)
class CheckState(Transform):
    """Check that the state is as wide as the config says; changes nothing."""

    batched = True

    width: int

    def __call__(self, sample: Sample) -> Sample:
        """Return the sample unchanged; raises `UserError` if `state` is not [width]."""
        if "state" in sample and sample["state"].shape[-1] != self.width:
            raise UserError(
                f"a state of the dataset has {sample['state'].shape[-1]} numbers, the config says {self.width}: "
                f"correct data.state_width, or name other columns in data.state"
            )
        return sample


@dataclass(frozen=True)
class SliceActions(Transform):
    """Keep the first `width` columns of the policy's actions; policies pad actions to their own width.

    The forward direction only checks that the data have this width. Put it before `RelativeActions` in a dataset's
    transforms, so that its inverse runs last.
    """

    batched = True

    width: int

    def __call__(self, sample: Sample) -> Sample:
        """Return the sample unchanged; raises `UserError` if `actions` is not [H, width]."""
        if "actions" in sample and sample["actions"].shape[-1] != self.width:
            raise UserError(
                f"an action of the dataset has {sample['actions'].shape[-1]} numbers, the config says {self.width}: "
                f"correct data.action_width, or name other columns in data.actions"
            )
        return sample

    def inverse(self, sample: Sample) -> Sample:
        """Actions [H, A] -> [H, width]."""
        return {**sample, "actions": sample["actions"][..., : self.width]}


@dataclass(frozen=True)
class RelativeActions(Transform):
    """Train on actions relative to the state: where `mask` is True, subtract the state from the action.

    The whole chunk is relative to the state at its first step, not each step to the previous one (openpi calls this
    "delta"). Action dimensions beyond the mask stay absolute.
    """

    batched = True

    mask: tuple[bool, ...]

    def __call__(self, sample: Sample) -> Sample:
        """Subtract `state[i]` from `actions[:, i]` where `mask[i]`; a no-op without actions."""
        if "actions" not in sample:
            return sample
        return {**sample, "actions": self._shift(sample["actions"], sample["state"], -1)}

    def inverse(self, sample: Sample) -> Sample:
        """Add the state back; `sample` contains it in the data's units."""
        return {**sample, "actions": self._shift(sample["actions"], sample["state"], 1)}

    def _shift(self, actions: NDArray[np.floating], state: NDArray[np.floating], sign: int) -> NDArray[np.floating]:
        width = 1 + max((i for i, relative in enumerate(self.mask) if relative), default=-1)
        if width > min(actions.shape[-1], state.shape[-1]):
            raise UserError(
                f"dimension {width - 1} of the action (counted from 0) is to be relative to the state, but the action "
                f"has {actions.shape[-1]} numbers and the state {state.shape[-1]}: shorten data.relative, or list "
                "dimensions without a counterpart in data.gripper"
            )
        offset = np.where(self.mask[:width], state[..., :width], 0)[..., np.newaxis, :]
        return np.concatenate([actions[..., :width] + sign * offset, actions[..., width:]], axis=-1)


@dataclass(frozen=True)
class RelativeUnless(Transform):
    """`RelativeActions` for every action dimension except those in `absolute`, whatever the width."""

    batched = True

    absolute: tuple[int, ...]

    def __call__(self, sample: Sample) -> Sample:
        """Subtract `state[i]` from `actions[:, i]`; raises `UserError` if `absolute` names a missing dimension."""
        if "actions" not in sample:
            return sample
        width = sample["actions"].shape[-1]
        if missing := [index for index in self.absolute if index >= width]:
            raise UserError(f"data.gripper names dimension {missing[0]}, but an action has dimensions 0 to {width - 1}")
        return RelativeActions(self._mask(width))(sample)

    def inverse(self, sample: Sample) -> Sample:
        """Add the state back; the policy's padding, which may be wider than the state, is unchanged."""
        width = min(sample["actions"].shape[-1], sample["state"].shape[-1])
        return RelativeActions(self._mask(width)).inverse(sample)

    def _mask(self, width: int) -> tuple[bool, ...]:
        return tuple(index not in self.absolute for index in range(width))
