"""The config of a policy, which knows its data; `contract.module` is what the trainer needs from the module it builds.

Transforms, random draws and collation live on the config, because loader workers must not receive the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from rlinf_core.contract.policy_options import (
    Adapted,
    Begun,
    BoundToData,
    Checked,
    Compared,
    Continued,
    Counted,
    Described,
    Exported,
    Measured,
    Published,
    Sampled,
)
from rlinf_core.contract.policy_options import TrainedOn as TrainedOn  # Its address for plugins.
from rlinf_core.contract.weight_file import WeightFile, write_weights
from rlinf_core.data.sample import Batch, Sample
from rlinf_core.data.transforms import Transform
from rlinf_core.errors import UserError
from rlinf_core.lora.config import LoraConfig

if TYPE_CHECKING:
    import torch

    from rlinf_core.contract.module import Policy, WeightSource


class PolicyConfig(
    Described,
    Measured,
    BoundToData,
    Begun,
    Counted,
    Sampled,
    Compared,
    Published,
    Checked,
    Exported,
    Adapted,
    Continued,
    BaseModel,
):
    """The `[policy]` table. A subclass narrows `type` to a `Literal` of its own and adds fields.

    A policy defines `collate` and `build`, and one with actions `chunk_length` and `draw`, too. The others have a
    default, and so have the optional methods, which are in the classes that this one inherits from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    run_defaults: ClassVar[Mapping[str, Any]] = {}
    """Run defaults set by this policy, as a TOML table: `{"optim": {"lr": 2.5e-5}}`."""
    normalization: ClassVar[Literal["mean_std", "quantile", "none"]] = "none"
    """How `state` and `actions` are normalised before `transforms()`."""

    type: str
    """Which policy this is."""
    weights: str = ""
    """Pretrained weights: a folder or a file. `"random"`: train from random initialisation."""
    lora: LoraConfig | None = None
    """Train low-rank adapters (LoRA) instead of all weights."""

    def chunk_length(self) -> int:
        """Number of actions in a sample; 0 for policies without actions."""
        return 0

    def transforms(self) -> Sequence[Transform]:
        """Transforms after normalisation; the inverses run first, in reverse, on the policy's actions."""
        return ()

    def draw(self, generator: np.random.Generator) -> dict[str, Any]:
        """Draw the random numbers of one training sample, which are merged into it.

        A policy with actions draws `noise`, [H, A], standard normal, float32; validation samples actions from it.

        Args:
            generator: Keyed by (seed, epoch, position of the sample in the epoch), so that a sample's random numbers
                do not depend on ranks, workers or resumes.
        """
        return {}

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Stack samples into tensors on the CPU. Images stay uint8."""
        raise self._lacks("collate", "no batch can be made")

    def build(self) -> Policy:
        """Build the module. Called under `torch.device("meta")`: allocate no real memory."""
        raise self._lacks("build", "it cannot be trained")

    def save_weights(self, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
        """Write whole tensors, keyed by the module's own names, to a folder that `open_weights` can read.

        Default: `model.safetensors`, with the names of `published_name` and `published_parts`.
        """
        write_weights(self, tensors, folder)

    def open_weights(self) -> WeightSource:
        """Open `weights` for reading; raise `UserError` that names every missing, unexpected or misshapen tensor.

        Default: the file that the default of `save_weights` writes, by its path or its folder's.
        """
        return WeightFile(self.weights, self)

    def _lacks(self, method: str, effect: str) -> UserError:
        where = f"{type(self).__module__}.{type(self).__qualname__}"
        return UserError(f"the policy {self.type!r} has no {method}(), so {effect}: define it in {where}")
