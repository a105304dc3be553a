"""Behaviour cloning of action chunks: what rlinf_core sees of it. Imports no torch: listings and workers stay light."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from rlinf_core import LeRobotDatasetConfig, PolicyConfig, Sample, hookimpl


class ChunkCloningConfig(PolicyConfig):
    """A camera and the state to a chunk of actions, by a convolutional network and its squared error."""

    run_defaults: ClassVar[Mapping[str, Any]] = {"optim": {"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 20}}
    normalization: ClassVar[Literal["mean_std", "quantile", "none"]] = "mean_std"

    type: Literal["chunk_cloning"] = "chunk_cloning"
    state_dim: int = 4
    """Numbers of the state."""
    action_dim: int = 4
    """Numbers of an action."""
    action_horizon: int = 5
    """Actions in a chunk."""
    width: int = 128
    """Of the hidden layers."""

    def chunk_length(self) -> int:
        """Number of actions in a sample."""
        return self.action_horizon

    def draw(self, generator: np.random.Generator) -> dict[str, Any]:
        """The noise from which policies with actions sample; this one does not look at it."""
        return {"noise": generator.standard_normal((self.action_horizon, self.action_dim), np.float32)}

    def collate(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """State, action chunk and the camera, if there is one, each with the sample axis first."""
        import torch

        keys = ("state", "actions", "actions_is_pad", "noise")
        batch = {key: torch.from_numpy(np.stack([s[key] for s in samples])) for key in keys if key in samples[0]}
        if samples[0].get("images"):
            pictures = [next(iter(s["images"].values())) for s in samples]
            batch["images"] = torch.from_numpy(np.stack(pictures))
        return batch

    def build(self) -> Any:
        """The module, on the meta device."""
        from chunk_cloning_model import ChunkCloning

        return ChunkCloning(self.state_dim, self.action_horizon, self.action_dim, self.width)

    def save_weights(self, tensors: Mapping[str, Any], folder: Path) -> None:
        """Write what `open_weights` reads."""
        from safetensors.torch import save_file

        save_file(dict(tensors), folder / "model.safetensors")

    def open_weights(self) -> Any:
        """Read what `save_weights` wrote."""
        from chunk_cloning_model import Weights

        return Weights(Path(self.weights).expanduser())


class CloningMetaworld(LeRobotDatasetConfig):
    """MetaWorld in the columns of the example dataset."""

    run_defaults: ClassVar[Mapping[str, Any]] = {"policy": {"type": "chunk_cloning"}}

    images: dict[str, str] = {"front": "observation.image"}


@hookimpl
def rlinf_register_policies() -> list[type[PolicyConfig]]:
    """Offer the policy."""
    return [ChunkCloningConfig]
