"""A plugin as users write one: a trained low-rank change of linear layers, while the policy itself is frozen."""

import math
import re

import torch
from pydantic import BaseModel
from torch import nn

from rlinf_core import hookimpl


class LowRankOptions(BaseModel):
    """`[plugins.low_rank]`."""

    model_config = {"frozen": True, "extra": "forbid"}

    rank: int = 0
    alpha: float = 8.0
    layers: str = r"(^|\.)(qkv|kv|q_proj|v_proj|gate_up)$"


class LowRank(nn.Linear):
    """A linear layer with the weight W + alpha / rank · up · down, of which only up and down are trained."""

    def __init__(self, layer, rank, alpha):
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None)
        self.weight, self.bias = layer.weight, layer.bias  # Under their own names, where weights find them.
        self.scale = alpha / rank
        self.down = nn.Parameter(torch.empty(rank, layer.in_features))
        self.up = nn.Parameter(torch.empty(layer.out_features, rank))

    def forward(self, x):
        change = nn.functional.linear(nn.functional.linear(x, self.down), self.up)
        return super().forward(x) + self.scale * change

    def initial_value(self, name, shape, generator):
        if name == "up":  # The first step starts from the policy as it is.
            return torch.zeros(shape)
        return torch.randn(shape, generator=generator) / math.sqrt(shape[1])

    def merged(self, tensors):
        return {"weight": tensors["weight"] + self.scale * (tensors["up"] @ tensors["down"])}


@hookimpl
def rlinf_register_options():
    return {"low_rank": LowRankOptions}


@hookimpl
def rlinf_policy_built(policy, run):
    options = run.plugin_options(LowRankOptions)
    if not options.rank:
        return
    policy.requires_grad_(False)
    for name, layer in list(policy.named_modules()):
        if isinstance(layer, nn.Linear) and re.search(options.layers, name):
            policy.set_submodule(name, LowRank(layer, options.rank, options.alpha))
