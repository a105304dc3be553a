"""A camera augmentation: one class that draws a sample's random numbers and applies them to a batch of images.

The numbers are drawn in loader workers, from the sample's own generator (contract 1), and the images are changed on the
device. A policy with cameras declares a field of the type `Augmentations`, which the config names by `type`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, SerializeAsAny, ValidationInfo

from rlinf_core.contract.registered import resolve

if TYPE_CHECKING:
    import torch


class AugmentationConfig(BaseModel):
    """A camera augmentation. A subclass gives `type` a `Literal` of its own with a default, and adds fields.

    It is a frozen config that is sent to loader workers: import torch in `apply`, not in the module.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    type: str
    """Which augmentation this is."""

    def draw(self, generator: np.random.Generator, cameras: Sequence[str]) -> Mapping[str, NDArray[Any]]:
        """Draw the random numbers of one training sample, in a loader worker.

        Args:
            generator: Keyed by (seed, epoch, position of the sample in the epoch) and by the augmentation's place in
                the list, so that no other augmentation changes these numbers. It is the only source of randomness.
            cameras: All C cameras of the policy, in its order, whether or not the sample has them.

        Returns:
            Name -> [C, ...], one row per camera, of the same shapes for every sample; float64 becomes float32. Cameras
            that are to be changed alike get equal rows.
        """
        raise NotImplementedError(f"{type(self).__name__} must define draw()")

    def apply(self, images: torch.Tensor, draws: Mapping[str, torch.Tensor], cameras: Sequence[str]) -> torch.Tensor:
        """Change a batch of images, on their device. Called in training only, without gradients.

        Nothing may be drawn here or read back to the host. A camera that only some samples have is black for the
        others, and what becomes of these images is not read.

        Args:
            images: [B, C, height, width, 3], float32 RGB in [0, 1], of the policy's size. Not to be changed in place.
            draws: The names of `draw` -> [B, C, ...].
            cameras: Names of the C cameras that the batch has: a part of those of `draw`, in the same order.

        Returns:
            Images like those that were given: same shape, float32 in [0, 1].
        """
        raise NotImplementedError(f"{type(self).__name__} must define apply()")

    def describe(self, draws: Mapping[str, NDArray[Any]], camera: str) -> str:
        """What the augmentation does to one image, in a few words for the page of `rlinf inspect`.

        Args:
            draws: The names of `draw` -> [...], the numbers of this sample and camera.
            camera: Name of the camera.
        """
        return ""


def _resolve(entry: object, info: ValidationInfo) -> AugmentationConfig:
    found: AugmentationConfig = resolve(entry, info, "augmentation", AugmentationConfig, "an augmentation")
    return found


Augmentations = tuple[Annotated[SerializeAsAny[AugmentationConfig], BeforeValidator(_resolve)], ...]
"""Type of a config's list of augmentations, applied in order: names, tables with `type`, or instances."""
