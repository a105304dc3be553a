"""Behaviour cloning of action chunks: the config. It imports torch late, so that listings and workers stay light."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from rlinf_core import LeRobotDatasetConfig, Policy, PolicyConfig, hookimpl


class ChunkCloningConfig(PolicyConfig):
    """Predicts a chunk of actions from a camera and the state: a convolutional network with squared error."""

    run_defaults: ClassVar[Mapping[str, Any]] = {"optim": {"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 20}}
    normalization: ClassVar[Literal["mean_std", "quantile", "none"]] = "mean_std"

    type: Literal["chunk_cloning"] = "chunk_cloning"
    state_dim: int = 4
    """Dimensions of the state."""
    action_dim: int = 4
    """Dimensions of an action."""
    action_horizon: int = 5
    """Actions in a chunk."""
    width: int = 128
    """Width of the hidden layers."""

    def chunk_length(self) -> int:
        """Number of actions in a sample."""
        return self.action_horizon

    def draw(self, generator: np.random.Generator) -> dict[str, Any]:
        """Noise for policies that sample their actions; this one is deterministic and ignores it."""
        return {"noise": generator.standard_normal((self.action_horizon, self.action_dim), np.float32)}

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Stack state, action chunk and, if there is one, the camera's image along a new first axis."""
        import torch

        keys = ("state", "actions", "actions_is_pad", "noise")
        batch = {key: torch.from_numpy(np.stack([s[key] for s in samples])) for key in keys if key in samples[0]}
        if samples[0].get("images"):
            images = [next(iter(s["images"].values())) for s in samples]
            batch["images"] = torch.from_numpy(np.stack(images))
        return batch

    def build(self) -> Policy:
        """Build the module; it is called on the meta device."""
        from chunk_cloning_model import ChunkCloning

        return ChunkCloning(self.state_dim, self.action_horizon, self.action_dim, self.width)


class CloningMetaworld(LeRobotDatasetConfig):
    """MetaWorld with the columns of the example dataset."""

    run_defaults: ClassVar[Mapping[str, Any]] = {"policy": {"type": "chunk_cloning"}}

    images: dict[str, str] = {"front": "observation.image"}


@hookimpl
def rlinf_register_policies() -> list[type[PolicyConfig]]:
    """Register the policy."""
    return [ChunkCloningConfig]
