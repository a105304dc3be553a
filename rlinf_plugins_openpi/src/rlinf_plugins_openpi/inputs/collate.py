"""Stack samples into a batch of tensors, in loader workers. Cameras that no sample of the batch has are left out.

Cameras that a sample lacks and padding of its prompt are masked; `packing` leaves them out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlinf_core import PluginError, UserError
from rlinf_core.data.batch_memory import batch_tensor
from rlinf_plugins_openpi.model.dimensions import CAMERAS, IMAGE_SIZE
from rlinf_plugins_openpi.model.draws import AUGMENTATION, DELAY

Image = NDArray[np.uint8]

TOKEN_STEP = 16
"""Prompts are padded to a multiple of this many tokens, so that compiled code sees few shapes."""


def stack(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stack samples.

    Args:
        samples: Encoded samples, all with actions (training) or all without (inference).

    Returns:
        `images` uint8 [B, C, 224, 224, 3] and `image_mask` bool [B, C]: the cameras that any sample has, in the order
        of `CAMERAS`, black and masked where a sample lacks one; at least one camera.
        `tokens` int64 [B, T] and `token_mask` bool [B, T]: cut to the longest prompt, rounded up to `TOKEN_STEP`.
        `state` float32 [B, A]. If the samples have them: `actions` float32 [B, H, A], `actions_is_pad` bool [B, H] and
        `action_width` int64 [B], the robot's own share of A; `noise` float32 [B, H, A], `time` float32 [B];
        `augmentation`: the C cameras in order -> `<label>.<name>` -> [B, ...], the numbers of `draw_augmentations`;
        `rtc_delay` int64 [B].

    Raises:
        PluginError: An augmentation drew numbers of different shapes for different samples.
    """
    cameras, images, image_mask = _stack_images([sample.get("images", {}) for sample in samples])
    token_mask = np.stack([sample["token_mask"] for sample in samples])
    longest = int(token_mask.sum(axis=1).max())
    length = min(-(-longest // TOKEN_STEP) * TOKEN_STEP, token_mask.shape[1])
    batch: dict[str, Any] = {
        "images": images,
        "image_mask": torch.from_numpy(image_mask),
        "tokens": torch.from_numpy(np.stack([sample["tokens"][:length] for sample in samples])),
        "token_mask": torch.from_numpy(token_mask[:, :length].copy()),
        "state": _stack_floats(samples, "state"),
    }
    batch |= {key: _stack_floats(samples, key) for key in ("actions", "noise", "time") if key in samples[0]}
    if "actions_is_pad" in samples[0]:
        batch["actions_is_pad"] = torch.from_numpy(np.stack([sample["actions_is_pad"] for sample in samples]))
    if "action_width" in samples[0]:
        batch["action_width"] = torch.tensor([sample["action_width"] for sample in samples])
    if DELAY in samples[0]:
        batch[DELAY] = torch.tensor([int(sample[DELAY]) for sample in samples])
    if AUGMENTATION in samples[0]:
        batch[AUGMENTATION] = _stack_draws([sample[AUGMENTATION] for sample in samples], cameras)
    return batch


def _stack_draws(draws: Sequence[Mapping[str, NDArray[Any]]], cameras: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """The augmentations' random numbers of each camera of the batch, whose names the model reads off the keys."""
    stacked = {}
    for key in draws[0]:
        if len(shapes := {drawn[key].shape for drawn in draws}) > 1:
            found = " and ".join(str(list(shape)) for shape in sorted(shapes))
            raise PluginError(f"augmentation {key!r}: draw() gave shapes {found}, but must give one for all samples")
        stacked[key] = np.stack([drawn[key] for drawn in draws])
    rows = {name: CAMERAS.index(name) for name in cameras}
    return {
        name: {key: torch.from_numpy(numbers[:, row].copy()) for key, numbers in stacked.items()}
        for name, row in rows.items()
    }


def _stack_floats(samples: Sequence[Mapping[str, Any]], key: str) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(sample[key], dtype=np.float32) for sample in samples]))


def _stack_images(images: Sequence[Mapping[str, Image]]) -> tuple[list[str], Tensor, NDArray[np.bool_]]:
    present = {name for cameras in images for name in cameras}
    if unknown := sorted(present - set(CAMERAS)):
        raise UserError(f"the policy has no camera {unknown[0]!r}: the keys of data.images are {', '.join(CAMERAS)}")
    cameras = [name for name in CAMERAS if name in present] or [CAMERAS[0]]
    batch = batch_tensor((len(images), len(cameras), IMAGE_SIZE, IMAGE_SIZE, 3), torch.uint8)
    out: Image = batch.numpy()
    mask = np.zeros((len(images), len(cameras)), dtype=np.bool_)
    for row, sample in enumerate(images):
        for column, name in enumerate(cameras):
            if name in sample:
                out[row, column] = sample[name]
                mask[row, column] = True
            else:
                out[row, column] = 0
    return cameras, batch, mask
