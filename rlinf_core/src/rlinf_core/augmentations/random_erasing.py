"""Random erasing (Zhong et al. 2017, arXiv 1708.04896): a rectangle of the image is replaced, as if it were hidden.

The rectangle is drawn as torchvision's `RandomErasing` draws it, but in fractions of the image, because the image's
size is known only where it is applied; and each sample has its own, where torchvision gives a batch one rectangle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from rlinf_core.contract.augmentation import AugmentationConfig

if TYPE_CHECKING:
    import torch

ATTEMPTS = 10
"""Rectangles that are drawn for one that fits into the image; if none does, the image stays as it is."""


class RandomErasingConfig(AugmentationConfig):
    """Replaces a random rectangle of an image."""

    type: Literal["random_erasing"] = "random_erasing"
    probability: float = Field(default=0.5, ge=0.0, le=1.0)
    """Fraction of images of which a rectangle is replaced."""
    area: tuple[float, float] = (0.02, 0.33)
    """Smallest and largest area of the rectangle, as a fraction of the image's; uniform."""
    aspect: tuple[float, float] = (0.3, 3.3)
    """Smallest and largest ratio of the rectangle's height to its width; its logarithm is uniform."""
    value: Literal["random", "black", "mean"] = "random"
    """What the rectangle shows: `random` colours, one per pixel; `black`; or the image's `mean` colour."""
    per_camera: bool = True
    """Whether each camera of a sample has its own rectangle; false: all cameras have the same."""

    @model_validator(mode="after")
    def _ranges_are_in_order(self) -> RandomErasingConfig:
        if not 0.0 < self.area[0] <= self.area[1] <= 1.0:
            raise ValueError(f"area = {list(self.area)} must be two fractions above 0 and up to 1, in order")
        if not 0.0 < self.aspect[0] <= self.aspect[1] < math.inf:
            raise ValueError(f"aspect = {list(self.aspect)} must be two ratios above 0, in order")
        return self

    def draw(self, generator: np.random.Generator, cameras: Sequence[str]) -> Mapping[str, NDArray[Any]]:
        """Draw `rectangle` [C, 5] and, for random colours, `seed` [C].

        The columns of `rectangle`: 1 to replace it or 0 to keep the image; its height and width as fractions of the
        image's; and where it is, from 0 (top, left) to 1 (bottom, right).
        """
        count = len(cameras) if self.per_camera else 1
        chosen = generator.uniform(size=count) < self.probability
        area = generator.uniform(*self.area, (count, ATTEMPTS))
        aspect = np.exp(generator.uniform(math.log(self.aspect[0]), math.log(self.aspect[1]), (count, ATTEMPTS)))
        sizes = np.sqrt(np.stack((area * aspect, area / aspect), axis=-1))
        fits = (sizes < 1.0).all(axis=-1)
        size = sizes[np.arange(count), fits.argmax(axis=1)]
        place = generator.uniform(size=(count, 2))
        replaced = (chosen & fits.any(axis=1))[:, None]
        drawn: dict[str, NDArray[Any]] = {
            "rectangle": np.concatenate((replaced, size, place), axis=1, dtype=np.float32)
        }
        if self.value == "random":
            drawn["seed"] = generator.integers(2**32, size=count)
        return drawn if self.per_camera else {name: numbers.repeat(len(cameras), 0) for name, numbers in drawn.items()}

    def apply(self, images: torch.Tensor, draws: Mapping[str, torch.Tensor], cameras: Sequence[str]) -> torch.Tensor:
        """Replace the rectangles of images [B, C, height, width, 3]."""
        import torch

        replaced, high, wide, down, right = draws["rectangle"].unbind(-1)
        rows = _within(images.shape[2], high, down, images.device)
        columns = _within(images.shape[3], wide, right, images.device)
        mask = rows[..., :, None] & columns[..., None, :] & (replaced > 0)[..., None, None]
        match self.value:
            case "black":
                shown = images.new_zeros(())
            case "mean":
                shown = images.mean((2, 3), keepdim=True)
            case "random":
                shown = _random_colors(draws["seed"], images.shape[2], images.shape[3])
        return torch.where(mask[..., None], shown, images)

    def describe(self, draws: Mapping[str, NDArray[Any]], camera: str) -> str:
        """The size of the rectangle."""
        replaced, high, wide, _, _ = draws["rectangle"]
        return f"{high:.0%} of the height x {wide:.0%} of the width erased" if replaced else "nothing erased"


def _within(length: int, size: torch.Tensor, place: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Which pixels of an axis a rectangle covers, bool [B, C, length].

    Args:
        length: Pixels of the axis.
        size: [B, C], fraction of the axis that it covers; at least one pixel.
        place: [B, C], from 0 (as near to the first pixel as possible) to 1.
        device: Where the result is.
    """
    import torch

    pixels = (size * length).round().clamp(1, length)
    first = torch.minimum((place * (length - pixels + 1)).floor(), length - pixels)  # `place` may round to 1.
    index = torch.arange(length, device=device)
    return (index >= first[..., None]) & (index < (first + pixels)[..., None])


def _random_colors(seed: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Uniform colours [B, C, height, width, 3] in [0, 1] that depend on `seed` int64 [B, C] and the pixel alone.

    Drawn numbers would be 600 KB per image to send. A hash of 32 bits (C. Wellons' lowbias32) gives ten bits for each
    channel; products stay within int64.
    """
    import torch

    pixel = torch.arange(height * width, device=seed.device).view(height, width) * 0x9E3779B1
    bits = (seed[..., None, None] + pixel) & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32)):
        bits = ((bits ^ (bits >> shift)) * factor) & 0xFFFFFFFF
    bits = bits ^ (bits >> 16)
    return torch.stack([(bits >> shift) & 0x3FF for shift in (0, 10, 20)], dim=-1).float() / 0x3FF
