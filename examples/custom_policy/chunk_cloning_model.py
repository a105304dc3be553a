"""Behaviour cloning of action chunks: the model, single-device code. B samples, H actions in a chunk, A numbers."""

import math

import torch
from safetensors.torch import load_file
from torch import nn

from rlinf_core import PolicyOutput, ShardUnit, UserError

SIZE = 64
"""Pictures are shrunk to so many pixels a side."""


class ChunkCloning(nn.Module):
    """Picture and state -> chunk of actions."""

    def __init__(self, state_dim, horizon, action_dim, width):
        super().__init__()
        self.shape = (horizon, action_dim)
        layers = [nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in ((3, 16), (16, 32), (32, 32), (32, 32))]
        self.eye = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())), nn.Flatten())
        self.enter = nn.Linear(32 * (SIZE // 16) ** 2 + state_dim, width)
        self.body = nn.Sequential(
            nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, math.prod(self.shape))
        )

    def forward(self, batch):
        """The squared error, summed over the samples; the trainer divides by their number."""
        error = (self._actions(batch) - batch["actions"]).square().mean(-1)
        within = ~batch["actions_is_pad"]  # Past the end of an episode the last action repeats.
        losses = (error * within).sum(1) / within.sum(1)
        return PolicyOutput(losses.sum(), torch.tensor(float(len(losses)), device=losses.device), {})

    def sample_actions(self, batch, noise):
        """[B, H, A] normalised actions; nothing is random."""
        return self._actions(batch)

    def _actions(self, batch):
        state = batch["state"]
        if "images" in batch:
            picture = batch["images"].permute(0, 3, 1, 2).float() / 127.5 - 1.0
            seen = self.eye(nn.functional.interpolate(picture, (SIZE, SIZE), mode="bilinear", antialias=True))
        else:
            seen = state.new_zeros(len(state), self.enter.in_features - state.shape[1])
        return self.body(self.enter(torch.cat((seen, state), dim=1))).view(-1, *self.shape)

    def shard_units(self):
        """What is gathered together. The network is small and stays in float32."""
        yield ShardUnit(self.eye, "fp32")
        yield ShardUnit(self.body, "fp32", block=True)

    def initial_value(self, name, shape, generator):
        """Normal with variance 2 / inputs; biases are zero."""
        if len(shape) == 1:
            return torch.zeros(shape)
        return torch.randn(shape, generator=generator) * math.sqrt(2.0 / math.prod(shape[1:]))

    def rebuild_buffers(self):
        """There are none."""


class Weights:
    """The tensors of a folder that `save_weights` wrote."""

    def __init__(self, folder):
        self.folder, self.tensors = folder, load_file(folder / "model.safetensors")

    def tensor(self, name):
        """One of them."""
        return self.tensors[name]

    def check(self, shapes):
        """They are those of the model."""
        found = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        if found != shapes:
            wrong = sorted(name for name in found.keys() | shapes if found.get(name) != shapes.get(name))
            raise UserError(f"policy.weights: {self.folder} does not fit the model: {', '.join(wrong)}")
