"""A policy that trains in milliseconds: two blocks on the state of a toy row, the whole `Policy` protocol."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn
from toy_data import HORIZON, Repack, Rows, ToyDataset, ToyPolicy

from rlinf_core import PolicyOutput, ShardUnit, hookimpl

CONFIG = """
[data]
config_name = "toy"
num_workers = 0
validation_fraction = 0.1
[trainer]
device = "cpu"
param_dtype = "fp32"
global_batch_size = 20
micro_batch_size = 10
[optim]
lr = 1e-2
warmup_steps = 0
"""
WIDTH = 16


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        x = x.to(self.up.weight.dtype)
        return x + self.down(nn.functional.gelu(self.up(x)))


class ToyModule(nn.Module):
    def __init__(self, action_dim):
        super().__init__()
        self.shape = (HORIZON, action_dim)
        self.enter = nn.Linear(3, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.leave = nn.Linear(WIDTH, HORIZON * action_dim)

    def _actions(self, batch):
        x = self.enter(batch["state"].to(self.enter.weight.dtype))
        for block in self.blocks:
            x = block(x)
        return self.leave(x.to(self.leave.weight.dtype)).float().view(-1, *self.shape)

    def forward(self, batch):
        shifted = self._actions(batch) + batch["noise"].mean((1, 2), keepdim=True)
        error = (shifted - batch["actions"]).square().mean((1, 2))
        each = torch.stack((error.detach(), torch.ones_like(error)), dim=1)
        return PolicyOutput(error.sum(), torch.tensor(float(len(error))), {}, each)

    def sample_actions(self, batch, noise):
        return self._actions(batch)

    def shard_units(self):
        yield from (ShardUnit(block, block=True) for block in self.blocks)

    def initial_value(self, name, shape, generator):
        return torch.randn(shape, generator=generator) * 0.2

    def rebuild_buffers(self):
        pass


class TrainableToyPolicy(ToyPolicy):
    """The toy policy with a model; actions are padded to width 5."""

    type: Literal["trainable_toy"] = "trainable_toy"
    seconds_a_step: float = 0.0

    def chunk_length(self):
        return HORIZON

    def draw(self, generator):
        return {"noise": generator.standard_normal((HORIZON, 5), "float32")}

    def build(self):
        return ToyModule(action_dim=5)


@dataclass(frozen=True)
class RepackWhole(Repack):
    """No chunk extends past the end of its episode."""

    def __call__(self, row):
        return super().__call__(row) | {"actions_is_pad": np.zeros(HORIZON, bool)}


class TrainableToyDataset(ToyDataset):
    """Rows in memory; the last tenth is held out."""

    run_defaults = {"policy": {"type": "trainable_toy"}}
    rows: int = 200

    def repack(self):
        return RepackWhole()


@hookimpl
def rlinf_register_policies():
    return [TrainableToyPolicy]


@hookimpl
def rlinf_open_dataset(dataset, split):
    if isinstance(dataset, TrainableToyDataset):
        return Rows(dataset.rows if split == "train" else dataset.rows // 10)
    return None
