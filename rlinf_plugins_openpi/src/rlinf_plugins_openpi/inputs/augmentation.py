"""Image augmentation: openpi's own as a registered class, and the random numbers of all that a policy uses.

Importing this loads no torch: the images are changed by `model.augment`, on the device.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from rlinf_core import AugmentationConfig, PluginError
from rlinf_plugins_openpi.model.dimensions import CAMERAS

if TYPE_CHECKING:
    import torch


MAX_SHIFT = 6.0
"""In pixels: a crop of 212 out of 224 stays within the image."""
MAX_ANGLE = math.radians(5.0)
JITTER_PROBABILITY = 0.5
MAX_BRIGHTNESS, MAX_CONTRAST = 0.3, 0.4
MAX_HUE = 0.1
"""In turns. The reference does not set it, but the default of its library applies."""


class OpenpiAugmentationConfig(AugmentationConfig):
    """The reference's augmentation (openpi, `models/model.py`), with its ranges.

    Colour jitter for all cameras, random crop and rotation for cameras that are not on a wrist: the view of a wrist
    camera is fixed to the hand. Cameras of one kind share their numbers.
    """

    type: Literal["openpi"] = "openpi"

    def draw(self, generator: np.random.Generator, cameras: Sequence[str]) -> Mapping[str, NDArray[Any]]:
        """Draw `crop_and_rotation` [C, 3] and `color_jitter` [C, 4]; see the functions of these numbers in `augment`.

        The former is 0 and not used for wrist cameras.
        """
        crop_and_rotation = generator.uniform(-1.0, 1.0, 3) * (MAX_SHIFT, MAX_SHIFT, MAX_ANGLE)
        applied = generator.uniform(size=(2, 1)) < JITTER_PROBABILITY
        amounts = generator.uniform(-1.0, 1.0, (2, 3)) * (MAX_BRIGHTNESS, MAX_CONTRAST, MAX_HUE)
        jitter = np.concatenate((applied, amounts), axis=1, dtype=np.float32)
        wrist = np.array([is_on_wrist(name) for name in cameras], dtype=np.int64)
        moved = np.where(wrist[:, None], 0.0, crop_and_rotation)
        return {"crop_and_rotation": moved.astype(np.float32), "color_jitter": jitter[wrist]}

    def apply(self, images: torch.Tensor, draws: Mapping[str, torch.Tensor], cameras: Sequence[str]) -> torch.Tensor:
        """Crop, rotate and jitter images [B, C, height, width, 3]."""
        import torch

        from rlinf_plugins_openpi.model.augment import crop_and_rotate, jitter_colors

        columns, numbers = list(images.unbind(1)), draws["crop_and_rotation"].unbind(1)
        if moving := [column for column, name in enumerate(cameras) if not is_on_wrist(name)]:
            still, amounts = (torch.stack([one[i] for i in moving], dim=1) for one in (columns, numbers))
            moved = crop_and_rotate(still.flatten(0, 1), amounts.flatten(0, 1)).view_as(still)
            for place, column in enumerate(moving):
                columns[column] = moved[:, place]
            images = torch.stack(columns, dim=1)
        return jitter_colors(images.flatten(0, 1), draws["color_jitter"].flatten(0, 1)).view_as(images)

    def describe(self, draws: Mapping[str, NDArray[Any]], camera: str) -> str:
        """The crop, the angle and the change of colours."""
        parts = []
        if not is_on_wrist(camera):
            down, right, angle = draws["crop_and_rotation"]
            parts.append(f"crop {down:+.1f}, {right:+.1f} px, turned {math.degrees(angle):+.1f}°")
        applied, brightness, contrast, turn = draws["color_jitter"]
        if applied:
            parts.append(f"brightness {brightness:+.2f}, contrast {contrast:+.2f}, hue {turn * 360:+.0f}°")
        return "; ".join(parts) or "unchanged"


def is_on_wrist(camera: str) -> bool:
    """Whether a camera is on a wrist; the reference also decides by the name."""
    return "wrist" in camera


def labelled(augmentations: Sequence[AugmentationConfig]) -> dict[str, AugmentationConfig]:
    """The augmentations by label: their `type`, for the second of one type `<type>-2`, and so on."""
    found: dict[str, AugmentationConfig] = {}
    for augmentation in augmentations:
        count = 1 + sum(other.type == augmentation.type for other in found.values())
        found[augmentation.type if count == 1 else f"{augmentation.type}-{count}"] = augmentation
    return found


def draw_augmentations(
    augmentations: Sequence[AugmentationConfig], generator: np.random.Generator
) -> dict[str, NDArray[Any]]:
    """The random numbers of a sample: `<label>.<name>` -> [all cameras, ...].

    Raises:
        PluginError: An augmentation draws something else than one row per camera.
    """
    drawn: dict[str, NDArray[Any]] = {}
    generators = _generators(generator, len(augmentations))
    for (label, augmentation), own in zip(labelled(augmentations).items(), generators, strict=True):
        try:
            found = augmentation.draw(own, CAMERAS)
        except Exception as error:
            error.add_note(f"in draw() of the augmentation {label!r} ({type(augmentation)!r})")
            raise
        for name, numbers in found.items():
            rows = np.asarray(numbers)
            if "." in name or rows.dtype.kind not in "biuf" or rows.shape[:1] != (len(CAMERAS),):
                raise PluginError(
                    f"augmentation {label!r} ({type(augmentation)!r}): draw() gave {name!r} as {rows.dtype} "
                    f"{list(rows.shape)}, but must give a name without dots and numbers, one row for each of the "
                    f"{len(CAMERAS)} cameras"
                )
            drawn[f"{label}.{name}"] = rows.astype(np.float32) if rows.dtype == np.float64 else rows
    return drawn


def _generators(generator: np.random.Generator, count: int) -> Iterator[np.random.Generator]:
    """A generator for each place in the list: the sample's own, then streams that do not depend on how it is used."""
    words = copy.deepcopy(generator.bit_generator).random_raw(2) if count > 1 else None
    for place in range(count):
        yield np.random.Generator(np.random.Philox(key=words, counter=[0, 0, 0, place])) if place else generator
