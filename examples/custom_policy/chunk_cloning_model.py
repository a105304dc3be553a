"""Behaviour cloning of action chunks: the model. Axes: B samples, H actions in a chunk, A action dimensions."""

import math

import torch
from torch import nn

from rlinf_core import PolicyOutput, ShardUnit

SIZE = 64
"""Images are resized to this many pixels per side."""


class ChunkCloning(nn.Module):
    """Image and state -> chunk of actions."""

    def __init__(self, state_dim: int, horizon: int, action_dim: int, width: int) -> None:
        super().__init__()
        self.shape = (horizon, action_dim)
        layers = [nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in ((3, 16), (16, 32), (32, 32), (32, 32))]
        self.eye = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())), nn.Flatten())
        self.enter = nn.Linear(32 * (SIZE // 16) ** 2 + state_dim, width)
        self.body = nn.Sequential(
            nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, math.prod(self.shape))
        )

    def forward(self, batch):
        """Squared error summed over the samples; the trainer divides by their number."""
        error = (self._actions(batch) - batch["actions"]).square().mean(-1)
        within = ~batch["actions_is_pad"]  # Past the end of an episode the last action is repeated; it does not count.
        losses = (error * within).sum(1) / within.sum(1)
        return PolicyOutput(losses.sum(), torch.tensor(float(len(losses)), device=losses.device), {})

    def sample_actions(self, batch, noise):
        """Normalised actions [B, H, A]; deterministic, so `noise` is unused."""
        return self._actions(batch)

    def _actions(self, batch):
        state = batch["state"]
        if "images" in batch:
            image = batch["images"].permute(0, 3, 1, 2).float() / 127.5 - 1.0
            seen = self.eye(nn.functional.interpolate(image, (SIZE, SIZE), mode="bilinear", antialias=True))
        else:
            seen = state.new_zeros(len(state), self.enter.in_features - state.shape[1])
        return self.body(self.enter(torch.cat((seen, state), dim=1))).view(-1, *self.shape)

    def shard_units(self):
        """Modules whose parameters are gathered together. The network is small and stays in float32."""
        yield ShardUnit(self.eye, "fp32")
        yield ShardUnit(self.body, "fp32", block=True)

    def initial_value(self, name, shape, generator):
        """Normal with variance 2 / number of inputs; zero for biases."""
        if len(shape) == 1:
            return torch.zeros(shape)
        return torch.randn(shape, generator=generator) * math.sqrt(2.0 / math.prod(shape[1:]))

    def rebuild_buffers(self):
        """The model has no buffers."""
