"""Transforms of a normalised sample for π0 and π0.5: resize, tokenise, pad. NumPy and PIL only.

The order matters: the prompt is tokenised before the state is padded, because π0.5 can read the state as text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rlinf_core import Sample, UserError
from rlinf_core.data.sample import Row
from rlinf_core.data.transforms import Transform
from rlinf_plugins_openpi.inputs.tokenizer import PromptTokenizer, load_processor


class OpenpiSample(Sample, total=False):
    """An encoded sample, the input of the policies' `collate`."""

    tokens: NDArray[np.int64]
    """[T], prompt ids, padded with 0."""
    token_mask: NDArray[np.bool_]
    """[T], True where there is a token."""
    action_width: int
    """Width of the robot's own action; the policy's action is padded with zeros."""
    prompt_length: int
    """Tokens of the whole prompt, including those that were cut."""


@dataclass(frozen=True)
class ResizeWithPad(Transform):
    """Fit every camera's image into `height` x `width`: same aspect ratio, bilinear (antialiased), black borders."""

    resizes: ClassVar[bool] = True

    height: int
    width: int

    def __call__(self, sample: Sample) -> Sample:
        """Images uint8 [any height, any width, 3] -> uint8 [height, width, 3]."""
        if "images" not in sample:
            return sample
        return {**sample, "images": {name: self._resize(name, image) for name, image in sample["images"].items()}}

    def _resize(self, name: str, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if not isinstance(image, np.ndarray):
            raise UserError(f"camera {name!r} is a {type(image).__name__}: images are NumPy arrays")
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise UserError(
                f"camera {name!r} is {image.dtype} {list(image.shape)}: images are uint8 [height, width, 3]"
            )
        height, width = image.shape[:2]
        if (height, width) == (self.height, self.width):
            return image
        # Rounded as in openpi's image_tools.resize_with_pad_pil: one pixel more or less would shift the whole image.
        ratio = max(width / self.width, height / self.height)
        new_height, new_width = int(height / ratio), int(width / ratio)
        top, left = (self.height - new_height) // 2, (self.width - new_width) // 2
        resized = Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BILINEAR)
        out = np.zeros((self.height, self.width, 3), dtype=np.uint8)
        out[top : top + new_height, left : left + new_width] = np.asarray(resized)
        return out


@dataclass(frozen=True)
class TokenizePrompt(Transform):
    """Turn the prompt into `tokens` and `token_mask`, with the state as text if `discrete_state`."""

    tokenizer: PromptTokenizer
    discrete_state: bool
    allowed: frozenset[int] | None = None
    """The tokens that prompts may contain; other rows of the embedding are not trained. None: all."""

    def __call__(self, sample: Sample) -> Sample:
        """Needs the prompt and, with `discrete_state`, a `state` that is normalised and not yet padded."""
        if self.discrete_state and "state" not in sample:
            raise UserError("policy.discrete_state_input is true but the dataset has no state: set it to false")
        ids = self.tokenizer.encode(sample["prompt"], sample["state"] if self.discrete_state else None)
        tokens, token_mask = self.tokenizer.fill(ids)
        if self.allowed is not None and not self.allowed.issuperset(ids[: len(tokens)]):
            raise self._not_allowed(sample["prompt"], ids[: len(tokens)])
        out = cast("OpenpiSample", sample.copy())
        out["tokens"], out["token_mask"], out["prompt_length"] = tokens, token_mask, len(ids)
        return out

    def _not_allowed(self, prompt: str, ids: Sequence[int]) -> UserError:
        assert self.allowed is not None
        token = next(token for token in ids if token not in self.allowed)
        return UserError(
            f"the prompt {prompt!r} has the token {token}, {load_processor(self.tokenizer.path).id_to_piece(token)!r}, "
            'that none of the run\'s rows had when it started, and policy.train_embedding = "used_rows" trains only '
            'theirs: set it to "all", or start a new run with the data as they are now'
        )


@dataclass(frozen=True)
class PadToActionDim(Transform):
    """Pad `state` and `actions` with zeros to the width of the policy; a missing state becomes all zeros.

    The inverse is the identity: actions are unnormalised at the policy's width, then the dataset cuts them.
    """

    batched: ClassVar[bool] = True

    action_dim: int
    pad_state: bool = True

    def __call__(self, sample: Sample) -> Sample:
        """State [D] -> [A], actions [H, D] -> [H, A] with `action_width` = D."""
        out = cast("OpenpiSample", sample.copy())
        axes = sample["actions"].shape[:-2] if "actions" in sample else ()
        if self.pad_state:
            out["state"] = self._pad("state", sample.get("state", np.zeros((*axes, 0), dtype=np.float32)))
        if "actions" in sample:
            # If the dataset's own transforms padded the actions, they have recorded the width already.
            out["action_width"] = out.get("action_width", sample["actions"].shape[-1])
            out["actions"] = self._pad("actions", sample["actions"])
        return out

    def _pad(self, name: str, vector: NDArray[np.floating]) -> NDArray[np.floating]:
        missing = self.action_dim - vector.shape[-1]
        if missing < 0:
            raise UserError(
                f"`{name}` has {vector.shape[-1]} numbers, the policy takes at most {self.action_dim}: "
                f"name fewer columns in data.{name} (policy.action_dim is fixed for pretrained weights)"
            )
        return np.pad(vector, [(0, 0)] * (vector.ndim - 1) + [(0, missing)])


@dataclass(frozen=True)
class OrderState(Transform):
    """Repack with `repack`, then keep the numbers of the state that `order` names, in its order."""

    batched: ClassVar[bool] = True

    repack: Transform
    order: tuple[int, ...]

    def __call__(self, sample: Row) -> Sample:
        """Row -> sample with state [len(order)]; raises `UserError` if the recorded state is too narrow."""
        out = self.repack(sample)
        if "state" not in out:
            return out
        if (last := max(self.order)) >= (width := out["state"].shape[-1]):
            raise UserError(
                f"data.state_order names number {last} of the state (counted from 0), which has {width} numbers: name "
                "other columns in data.state, or correct data.state_order"
            )
        return {**out, "state": out["state"][..., list(self.order)]}


@dataclass(frozen=True)
class SignOf(Transform):
    """Turn a predicted number of the action into its sign, -1 or 1, as grippers with two commands need it."""

    batched: ClassVar[bool] = True

    index: int
    """The number of the action, counted from 0."""

    def __call__(self, sample: Sample) -> Sample:
        """Return the sample unchanged: the policy is trained on the numbers as recorded."""
        return sample

    def inverse(self, sample: Sample) -> Sample:
        """Replace the number by its sign; 0 stays 0."""
        actions = sample["actions"].copy()
        actions[..., self.index] = np.sign(actions[..., self.index])
        return {**sample, "actions": actions}
