"""Images on their way into the model, on the device: changed at random for training, resized if of another size.

After the reference's `preprocess_observation` (openpi, `models/model.py`), whose parts are augmax's and jax.image's.
Torch and the standard library only. Nothing is drawn here: a sample brings its own numbers (`draws.py`), so that it
looks the same in every batch it may stand in. All is float32. Axes: B batch, C camera, G cameras that are moved, N
images.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

CROP = 0.95
"""Share of height and width that is left of a cropped image, rounded down to whole pixels."""


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Images uint8 -> float32 in [-1, 1]; what is no uint8 is taken to be that already."""
    return images.float() / 255.0 * 2.0 - 1.0 if images.dtype == torch.uint8 else images.float()


@torch.no_grad()
def augment(images: torch.Tensor, crop_and_rotation: torch.Tensor, color_jitter: torch.Tensor) -> torch.Tensor:
    """Images as a training step sees them.

    Args:
        images: [B, C, height, width, 3], uint8 or in [-1, 1].
        crop_and_rotation: [B, G, 3] for the first G cameras, see `crop_and_rotate`. The others, those on wrists, stay
            as they are: what they show has its place in the hand.
        color_jitter: [B, C, 4], see `jitter_colors`.

    Returns:
        [B, C, height, width, 3] float32 in [-1, 1].
    """
    pixels = normalise(images) / 2.0 + 0.5
    if moving := crop_and_rotation.shape[1]:
        moved = crop_and_rotate(pixels[:, :moving].flatten(0, 1), crop_and_rotation.flatten(0, 1))
        pixels = torch.cat((moved.view(-1, moving, *images.shape[2:]), pixels[:, moving:]), dim=1)
    return jitter_colors(pixels.flatten(0, 1), color_jitter.flatten(0, 1)).view_as(pixels) * 2.0 - 1.0


def crop_and_rotate(images: torch.Tensor, crop_and_rotation: torch.Tensor) -> torch.Tensor:
    """Crop, resize back and rotate in one bilinear resampling; black where there was no image.

    Args:
        images: [N, height, width, 3] float32; black is 0.
        crop_and_rotation: [N, 3]: how far the crop's centre lies below and right of the image's (pixels, fractions
            allowed), and the angle (radians).
    """
    height, width = images.shape[1:3]
    down, right, angle = (column[:, None, None] for column in crop_and_rotation.float().unbind(-1))
    y, x = (torch.arange(n, dtype=torch.float32, device=images.device) - (n - 1) / 2 for n in (height, width))
    y, x = y[:, None], x[None]  # Pixels from the centre. What is there in the output comes from:
    from_y = (angle.cos() * y + angle.sin() * x) * (int(CROP * height) / height) + (down + (height - 1) / 2)
    from_x = (angle.cos() * x - angle.sin() * y) * (int(CROP * width) / width) + (right + (width - 1) / 2)
    return _bilinear(images, from_y, from_x)


def _bilinear(images: torch.Tensor, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Images [N, height, width, 3] at real-valued pixels y and x [N, any height, any width]; 0 outside.

    `grid_sample` would do the same in coordinates over [-1, 1], which double the distance to the reference (4e-5).
    """
    height, width = images.shape[1:3]
    pixels = F.pad(images, (0, 0, 1, 1, 1, 1)).flatten(0, 2)  # What is outside is read from a frame of zeros.
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
    """Change brightness, contrast and hue. The saturation stays: the reference asks for it and drops the result.

    Args:
        images: [N, height, width, 3] float32 RGB in [0, 1].
        color_jitter: [N, 4]: 1 to change an image or 0 to keep it, brightness and contrast in (-1, 1), and by how much
            of a turn the hue moves.
    """
    applied, brightness, contrast, turn = (column[:, None, None] for column in color_jitter.float().unbind(-1))
    hue, saturation, value = _hue_saturation_value(images)
    value = torch.where(brightness < 0, value * (1 + brightness), value * (1 - brightness) + brightness)
    value = _change_contrast(value, contrast)
    changed = _rgb(hue + 6 * turn, saturation, value)
    return torch.where(applied[..., None] > 0, changed, images)


def _change_contrast(value: torch.Tensor, contrast: torch.Tensor) -> torch.Tensor:
    """Steeper by the tangent in the middle and by its inverse at both ends, so that 0 and 1 keep their places."""
    slope = torch.tan((contrast + 1) * (math.pi / 4))
    # The reference's (s - s²) / (2 (1 - s²)) without its 0/0 at a contrast of 0.
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
    """The inverse of `_hue_saturation_value`; the hue may lie outside of its circle."""
    channels = []
    for offset in (5, 3, 1):  # red, green, blue
        k = (hue + offset).remainder(6)
        channels.append(value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, dim=-1)


def resize_with_pad(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Fit images into `height` x `width` as the reference's model does, aspect kept: bilinear, antialiased, padded.

    The pipeline resizes on the CPU with `transforms.ResizeWithPad`, whose pixels differ by up to one grey level.

    Args:
        images: [..., any height, any width, 3], uint8 or float32 in [-1, 1]; they are filled up with 0 or -1.
        height: Pixels of the result.
        width: Pixels of the result.

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
