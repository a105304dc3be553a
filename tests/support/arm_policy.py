"""A policy and a dataset that keep every rule of `rlinf_core.testing`, to be broken one rule at a time."""

import itertools
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch
from torch import nn

from rlinf_core import DatasetConfig, LeRobotDatasetConfig, PolicyConfig, PolicyOutput, ShardUnit, hookimpl
from rlinf_core.data.transforms import Transform

WIDTH = 8
"""Width of states and actions inside the policy."""


@dataclass(frozen=True)
class Pad(Transform):
    """Pad with zeros to the policy's width."""

    width: int

    def __call__(self, sample):
        keys = [key for key in ("state", "actions") if key in sample]
        missing = {key: self.width - sample[key].shape[-1] for key in keys}
        return {**sample} | {
            key: np.pad(sample[key], [(0, 0)] * (sample[key].ndim - 1) + [(0, missing[key])]) for key in keys
        }


class Layer(nn.Linear):
    """Takes any dtype: inside its forward, its weights have the one in which its unit is gathered."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


class Arm(nn.Module):
    """Actions from the state by two layers, with a mask of steps past the end of the episode."""

    def __init__(self, horizon):
        super().__init__()
        self.horizon = horizon
        self.enter = Layer(WIDTH, 16)
        self.blocks = nn.Sequential(Layer(16, 16), nn.GELU())
        self.leave = Layer(16, horizon * WIDTH)
        self.register_buffer("scale", torch.empty(WIDTH), persistent=False)

    def actions(self, batch):
        return self.leave(self.blocks(self.enter(batch["state"]))).view(-1, self.horizon, WIDTH) * self.scale

    def forward(self, batch):
        counts = (~batch["actions_is_pad"]).float()
        error = (self.actions(batch) + batch["noise"] - batch["actions"]).square().mean(-1) * counts
        return PolicyOutput(error.sum(), counts.sum(), {"error": error.detach().sum()})

    def sample_actions(self, batch, noise):
        return self.actions(batch) + noise

    def shard_units(self):
        yield ShardUnit(self.enter)
        yield ShardUnit(self.blocks, block=True)

    def initial_value(self, name, shape, generator):
        return torch.randn(shape, generator=generator)

    def rebuild_buffers(self):
        self.scale.fill_(0.5)


class ArmPolicy(PolicyConfig):
    """A policy for the state of an arm."""

    normalization: ClassVar[Literal["mean_std", "quantile", "none"]] = "mean_std"
    run_defaults: ClassVar = {"optim": {"lr": 1e-3}}

    type: Literal["arm"] = "arm"
    horizon: int = 3

    def chunk_length(self):
        return self.horizon

    def transforms(self):
        return (Pad(WIDTH),)

    def draw(self, generator):
        return {"noise": generator.standard_normal((self.horizon, WIDTH), np.float32)}

    def collate(self, samples):
        keys = ("state", "actions", "actions_is_pad", "noise")
        batch = {key: torch.from_numpy(np.stack([sample[key] for sample in samples])) for key in keys}
        return batch | {"images": {"front": torch.zeros(len(samples), 2, 2, 3, dtype=torch.uint8)}}

    def build(self):
        return Arm(self.horizon)


class ArmDataset(LeRobotDatasetConfig):
    """What `write_tiny_dataset` writes."""

    run_defaults: ClassVar = {"policy": {"type": "arm", "horizon": 3}}

    images: dict[str, str] = {"front": "observation.images.front"}


class OtherDataset(DatasetConfig):
    """A dataset that no plugin opens."""

    run_defaults: ClassVar = {"policy": {"type": "arm"}}


@hookimpl
def rlinf_register_policies():
    return [ArmPolicy]


def findings(check, *arguments, **options):
    """A check's findings, one per line."""
    with pytest.raises(AssertionError) as caught:
        check(*arguments, **options)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    return [line for line in lines[1:] if not line.startswith("(not checked")]


@dataclass(frozen=True)
class Stateful(Transform):
    count = itertools.count()

    def __call__(self, sample):
        return {**sample, "actions": sample.get("actions", np.zeros(1)) + float(next(Stateful.count))}


@dataclass(frozen=True)
class Needs(Transform):
    key: str

    def __call__(self, sample):
        return {**sample, "seen": sample[self.key]}


@dataclass(frozen=True)
class Unpicklable(Transform):
    def __call__(self, sample):
        return sample

    def __reduce__(self):
        raise TypeError("no copy of me")
