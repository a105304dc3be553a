"""Preprocessing of images on the device: augmentation for training, and resizing if they are of another size.

Follows the reference's `preprocess_observation` (openpi, `models/model.py`), which uses augmax and jax.image. Torch,
the standard library and core's errors only. Nothing is drawn here: each sample brings its own random numbers
(`inputs.augmentation`), so that it looks the same in every batch. All computations are float32. Axes: B batch, C
camera, N images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

from rlinf_core.errors import PluginError

CROP = 0.95
"""Fraction of height and width that a crop keeps, rounded down to whole pixels."""


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Images uint8 -> float32 in [-1, 1]; other dtypes are assumed to be in [-1, 1] already."""
    return images.float() / 255.0 * 2.0 - 1.0 if images.dtype == torch.uint8 else images.float()


class Augmentation(Protocol):
    """What the model needs from an augmentation; see `rlinf_core.AugmentationConfig`."""

    def apply(self, images: torch.Tensor, draws: Mapping[str, torch.Tensor], cameras: Sequence[str]) -> torch.Tensor:
        """Change images [B, C, height, width, 3], float32 in [0, 1]."""
        ...


@torch.no_grad()
def augment(
    images: torch.Tensor,
    draws: Mapping[str, Mapping[str, torch.Tensor]],
    augmentations: Mapping[str, Augmentation],
) -> torch.Tensor:
    """Augment images for training.

    Args:
        images: [B, C, height, width, 3], uint8 or in [-1, 1].
        draws: The C cameras in order -> `<label>.<name>` -> [B, ...].
        augmentations: Label -> what to apply, in order.

    Returns:
        [B, C, height, width, 3] float32 in [-1, 1].
    """
    pixels, cameras = normalise(images) / 2.0 + 0.5, tuple(draws)
    for label, augmentation in augmentations.items():
        pixels = apply_one(label, augmentation, pixels, _own(draws, label), cameras)
    return pixels * 2.0 - 1.0


def apply_one(
    label: str,
    augmentation: Augmentation,
    pixels: torch.Tensor,
    draws: Mapping[str, torch.Tensor],
    cameras: Sequence[str],
) -> torch.Tensor:
    """Apply an augmentation to images [B, C, height, width, 3], float32 in [0, 1].

    Raises:
        PluginError: The result has another shape or dtype; the message names the class.
    """
    try:
        changed = augmentation.apply(pixels, draws, cameras)
    except Exception as error:
        error.add_note(f"in apply() of the augmentation {label!r} ({type(augmentation)!r})")
        raise
    if changed.shape != pixels.shape or changed.dtype != pixels.dtype:
        raise PluginError(
            f"augmentation {label!r} ({type(augmentation)!r}): apply() gave images {changed.dtype} "
            f"{list(changed.shape)}, but must give {pixels.dtype} {list(pixels.shape)}, as it gets"
        )
    return changed


def _own(draws: Mapping[str, Mapping[str, torch.Tensor]], label: str) -> dict[str, torch.Tensor]:
    """The numbers of one augmentation: name -> [B, C, ...]."""
    names = [key for key in next(iter(draws.values())) if key.rpartition(".")[0] == label]
    return {name.rpartition(".")[2]: torch.stack([of[name] for of in draws.values()], dim=1) for name in names}


def crop_and_rotate(images: torch.Tensor, crop_and_rotation: torch.Tensor) -> torch.Tensor:
    """Crop, resize back and rotate in one bilinear resampling; black outside the image.

    Args:
        images: [N, height, width, 3] float32; black is 0.
        crop_and_rotation: [N, 3]: offset of the crop's centre from the image's, down and right (in pixels, may be
            fractional), and the angle (radians).
    """
    height, width = images.shape[1:3]
    down, right, angle = (column[:, None, None] for column in crop_and_rotation.float().unbind(-1))
    y, x = (torch.arange(n, dtype=torch.float32, device=images.device) - (n - 1) / 2 for n in (height, width))
    y, x = y[:, None], x[None]  # Output pixels, relative to the centre. Their sources:
    from_y = (angle.cos() * y + angle.sin() * x) * (int(CROP * height) / height) + (down + (height - 1) / 2)
    from_x = (angle.cos() * x - angle.sin() * y) * (int(CROP * width) / width) + (right + (width - 1) / 2)
    return _bilinear(images, from_y, from_x)


def _bilinear(images: torch.Tensor, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Sample images [N, height, width, 3] at fractional pixels y and x [N, any height, any width]; 0 outside.

    `grid_sample` does the same in coordinates over [-1, 1], but with twice the error to the reference (4e-5).
    """
    height, width = images.shape[1:3]
    pixels = F.pad(images, (0, 0, 1, 1, 1, 1)).flatten(0, 2)  # Pixels outside are read from a border of zeros.
    first = torch.arange(len(images), device=images.device)[:, None, None] * ((height + 2) * (width + 2))
    top, left = y.floor(), x.floor()
    out = torch.zeros((), device=images.device)
    for row in (top, top + 1):
        for column in (left, left + 1):
            share = (1 - (y - row).abs()) * (1 - (x - column).abs())
            framed_row, framed_column = (row.clamp(-1, height) + 1).long(), (column.clamp(-1, width) + 1).long()
            out = out + pixels[first + framed_row * (width + 2) + framed_column] * share[..., None]
    return out


def jitter_colors(images: torch.Tensor, color_jitter: torch.Tensor) -> torch.Tensor:
    """Change brightness, contrast and hue, not saturation: the reference computes that change and discards it.

    Args:
        images: [N, height, width, 3] float32 RGB in [0, 1].
        color_jitter: [N, 4]: 1 to change an image or 0 to keep it, brightness and contrast in (-1, 1), and the shift
            of the hue as a fraction of a full turn.
    """
    applied, brightness, contrast, turn = (column[:, None, None] for column in color_jitter.float().unbind(-1))
    hue, saturation, value = _hue_saturation_value(images)
    value = torch.where(brightness < 0, value * (1 + brightness), value * (1 - brightness) + brightness)
    value = _change_contrast(value, contrast)
    changed = _rgb(hue + 6 * turn, saturation, value)
    return torch.where(applied[..., None] > 0, changed, images)


def _change_contrast(value: torch.Tensor, contrast: torch.Tensor) -> torch.Tensor:
    """A piecewise linear curve: slope tan(...) in the middle, its inverse at both ends, so that 0 and 1 are fixed."""
    slope = torch.tan((contrast + 1) * (math.pi / 4))
    # Equals the reference's (s - s²) / (2 (1 - s²)), without 0/0 at contrast 0.
    bend = slope / (2 * (1 + slope))
    middle = slope * (value - 0.5) + 0.5
    upper = value / slope + 1 - 1 / slope
    return torch.where(value < bend, value / slope, torch.where(value > 1 - bend, upper, middle))


def _hue_saturation_value(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """RGB [N, height, width, 3] -> hue in sixths of a turn, saturation, and value (the largest of the three)."""
    red, green, blue = images.unbind(-1)
    value, least = images.amax(-1), images.amin(-1)
    chroma = value - least
    divisor = torch.where(chroma > 0, chroma, 1.0)
    hue = torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4)
    hue = torch.where(value == red, (green - blue) / divisor, hue)
    return hue, chroma / torch.where(value > 0, value, 1.0), value


def _rgb(hue: torch.Tensor, saturation: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The inverse of `_hue_saturation_value`; the hue may be outside [0, 6)."""
    channels = []
    for offset in (5, 3, 1):  # red, green, blue
        k = (hue + offset).remainder(6)
        channels.append(value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, dim=-1)


def resize_with_pad(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Fit images into `height` x `width` as the reference does: same aspect ratio, bilinear, antialiased, padded.

    The pipeline resizes on the CPU with `transforms.ResizeWithPad`, whose pixels differ by at most one grey level.

    Args:
        images: [..., any height, any width, 3], uint8 or float32 in [-1, 1]; padded with 0 or -1.
        height: Height of the result in pixels.
        width: Width of the result in pixels.

    Returns:
        [..., height, width, 3] of the same dtype.
    """
    if images.dtype not in (torch.uint8, torch.float32):
        raise ValueError(f"images must be uint8, or float32 in [-1, 1]: {images.dtype}")
    old_height, old_width = images.shape[-3:-1]
    if (old_height, old_width) == (height, width):
        return images
    ratio = max(old_width / width, old_height / height)
    new_height, new_width = int(old_height / ratio), int(old_width / ratio)
    above, left = (height - new_height) // 2, (width - new_width) // 2
    pad = (left, width - new_width - left, above, height - new_height - above)
    flat = images.reshape(-1, old_height, old_width, 3).movedim(-1, 1).float()
    flat = F.interpolate(flat, (new_height, new_width), mode="bilinear", align_corners=False, antialias=True)
    if images.dtype == torch.uint8:
        padded = F.pad(flat.round().clamp(0, 255), pad, value=0.0).to(torch.uint8)
    else:
        padded = F.pad(flat.clamp(-1, 1), pad, value=-1.0)
    return padded.movedim(1, -1).reshape(*images.shape[:-3], height, width, 3)
