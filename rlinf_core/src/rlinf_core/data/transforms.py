"""Transforms: small frozen values, named by a verb, each with its inverse beside it.

A transform maps a sample to a new sample and changes no array in place. `inverse` undoes it on what a policy returns
(`actions`, and `state`, which relative actions need); a transform that touches neither inherits the identity.
All of them accept samples without `actions` (inference) and without `images` (statistics).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlinf_core.data.sample import Row, Sample
from rlinf_core.errors import UserError


class Transform(ABC):
    """A step of the pipeline."""

    @abstractmethod
    def __call__(self, sample: Any) -> Sample:
        """The transformed sample; the argument is left as it is."""

    def inverse(self, sample: Sample) -> Sample:
        """Undo the transform on `actions` and `state`. The identity unless a subclass says otherwise."""
        return sample


@dataclass(frozen=True)
class Concatenate(Transform):
    """Repack a row: rename its columns to a sample's keys, concatenating several columns of one kind.

    The first step of every pipeline. What comes out is in the data's own units: predictions are compared with it.
    """

    images: dict[str, str]
    state: tuple[str, ...]
    actions: tuple[str, ...]
    default_prompt: str = ""

    def __call__(self, sample: Row) -> Sample:
        """Row -> sample: state [sum of widths], actions [H, sum of widths]."""
        out = Sample(images={name: sample[column] for name, column in self.images.items() if column in sample})
        if self.state:
            out["state"] = np.concatenate([np.atleast_1d(sample[column]) for column in self.state])
        if self.actions and self.actions[0] in sample:
            out["actions"] = np.concatenate([np.asarray(sample[column]) for column in self.actions], axis=-1)
            out["actions_is_pad"] = sample[f"{self.actions[0]}_is_pad"]
        out["prompt"] = self.default_prompt or sample["task"]
        return out


@dataclass(frozen=True)
class SliceActions(Transform):
    """Keep the first `width` columns of the policy's actions: policies pad actions to a width of their own.

    On the way in it only checks that the data are that wide. It stands before `RelativeActions` in a dataset's
    transforms, so that its inverse runs last.
    """

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
        width = len(self.mask)
        if width > min(actions.shape[-1], state.shape[-1]):
            raise UserError(
                f"the mask of relative actions has {width} entries, but an action has {actions.shape[-1]} numbers and "
                f"the state {state.shape[-1]}: shorten data.relative"
            )
        offset = np.where(self.mask, state[..., :width], 0)[..., np.newaxis, :]
        return np.concatenate([actions[..., :width] + sign * offset, actions[..., width:]], axis=-1)
