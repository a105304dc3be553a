"""Transforms: small frozen values, named by a verb, each with its inverse beside it.

A transform maps a sample to a new sample and changes no array in place. `inverse` undoes it on what a policy returns
(`actions`, and `state`, which relative actions need); a transform that touches neither inherits the identity.
All of them accept samples without `actions` (inference) and without `images` (statistics).
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
    """A step of the pipeline."""

    batched: ClassVar[bool] = False
    """Whether `__call__` of this very class also takes many samples at once, each array with their axis first (no
    images, `prompt` a list or one text), and makes the same numbers of them. Statistics use it, as it is much faster.
    A class that overrides `__call__` says it anew."""
    resizes: ClassVar[bool] = False
    """Whether it brings all images to one size, leaves those of that size as they are, and changes nothing else. If a
    policy's first transform does, `rlinf cache` may keep images as it leaves them."""

    @abstractmethod
    def __call__(self, sample: Any) -> Sample:
        """The transformed sample; the argument is left as it is."""

    def inverse(self, sample: Sample) -> Sample:
        """Undo the transform on `actions` and `state`. The identity unless a subclass says otherwise."""
        return sample


class Box(NamedTuple):
    """A part of an image, in pixels."""

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
                f"image has {height} rows and {width} columns: correct it, or record images of the size it is made for"
            )
        return image[self.top : self.top + self.height, self.left : self.left + self.width]


@dataclass(frozen=True)
class Concatenate(Transform):
    """Repack a row: rename its columns to a sample's keys, concatenating several columns of one kind.

    The first step of every pipeline. What comes out is in the data's own units: predictions are compared with it.
    """

    batched = True

    images: dict[str, str]
    state: tuple[str, ...]
    actions: tuple[str, ...]
    default_prompt: str = ""
    prompt_from_task: bool = True
    """Whether the prompt is the row's task, and `default_prompt` only that of rows without one."""
    crops: Mapping[str, Box] = field(default_factory=dict)
    """Camera -> the part of its image that is kept."""

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
        """The row's prompt; those of a batch."""
        if not self.prompt_from_task or (self.default_prompt and "task" not in row):
            return self.default_prompt
        task = row["task"]
        return (task or self.default_prompt) if isinstance(task, str) else [one or self.default_prompt for one in task]


@dataclass(frozen=True)
class CheckState(Transform):
    """Hold the data to the width of the robot's state that its config states; changes nothing."""

    batched = True

    width: int

    def __call__(self, sample: Sample) -> Sample:
        """The sample as it is; raises `UserError` if `state` is not [width]."""
        if "state" in sample and sample["state"].shape[-1] != self.width:
            raise UserError(
                f"a state of the dataset has {sample['state'].shape[-1]} numbers, its config says {self.width}: "
                f"correct data.state_width, or name other columns in data.state"
            )
        return sample


@dataclass(frozen=True)
class SliceActions(Transform):
    """Keep the first `width` columns of the policy's actions: policies pad actions to a width of their own.

    On the way in it only checks that the data are that wide. It stands before `RelativeActions` in a dataset's
    transforms, so that its inverse runs last.
    """

    batched = True

    width: int

    def __call__(self, sample: Sample) -> Sample:
        """The sample as it is; raises `UserError` if `actions` is not [H, width]."""
        if "actions" in sample and sample["actions"].shape[-1] != self.width:
            raise UserError(
                f"an action of the dataset has {sample['actions'].shape[-1]} numbers, its config says {self.width}: "
                f"correct data.action_width, or name other columns in data.actions"
            )
        return sample

    def inverse(self, sample: Sample) -> Sample:
        """Actions [H, A] -> [H, width]."""
        return {**sample, "actions": sample["actions"][..., : self.width]}


@dataclass(frozen=True)
class RelativeActions(Transform):
    """Train on actions relative to the state: a masked number of the action becomes its distance to the state's.

    The whole chunk is relative to the state of its first step, not each step to the one before ("delta" in openpi).
    Where the action runs on beyond the mask it stays absolute.
    """

    batched = True

    mask: tuple[bool, ...]

    def __call__(self, sample: Sample) -> Sample:
        """Subtract `state[i]` from `actions[:, i]` where `mask[i]`; nothing to do without actions."""
        if "actions" not in sample:
            return sample
        return {**sample, "actions": self._shift(sample["actions"], sample["state"], -1)}

    def inverse(self, sample: Sample) -> Sample:
        """Add the state again; `sample` holds it in the data's units."""
        return {**sample, "actions": self._shift(sample["actions"], sample["state"], 1)}

    def _shift(self, actions: NDArray[np.floating], state: NDArray[np.floating], sign: int) -> NDArray[np.floating]:
        width = 1 + max((i for i, relative in enumerate(self.mask) if relative), default=-1)
        if width > min(actions.shape[-1], state.shape[-1]):
            raise UserError(
                f"number {width - 1} of the action is to be relative to that of the state, counted from 0, but an "
                f"action has {actions.shape[-1]} numbers and the state {state.shape[-1]}: shorten data.relative, or "
                "name what has no counterpart in data.gripper"
            )
        offset = np.where(self.mask[:width], state[..., :width], 0)[..., np.newaxis, :]
        return np.concatenate([actions[..., :width] + sign * offset, actions[..., width:]], axis=-1)


@dataclass(frozen=True)
class RelativeUnless(Transform):
    """`RelativeActions` for all numbers of the action, however many there are, but for those named in `absolute`."""

    batched = True

    absolute: tuple[int, ...]

    def __call__(self, sample: Sample) -> Sample:
        """Subtract `state[i]` from `actions[:, i]`; raises `UserError` if `absolute` names a number there is not."""
        if "actions" not in sample:
            return sample
        width = sample["actions"].shape[-1]
        if missing := [index for index in self.absolute if index >= width]:
            raise UserError(f"data.gripper names number {missing[0]}, but an action has the numbers 0 to {width - 1}")
        return RelativeActions(self._mask(width))(sample)

    def inverse(self, sample: Sample) -> Sample:
        """Add the state again; a policy's padding, for which the state may have no number, stays as it is."""
        width = min(sample["actions"].shape[-1], sample["state"].shape[-1])
        return RelativeActions(self._mask(width)).inverse(sample)

    def _mask(self, width: int) -> tuple[bool, ...]:
        return tuple(index not in self.absolute for index in range(width))
