"""Ranks for test_muon.py: Muon's steps on sharded parameters, with the same gradients on any number of ranks.

Arguments are `FOLDER REPLICAS`: leaves `FOLDER/RANKS.REPLICAS.safetensors`, the weights and momenta after a few steps.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import fully_shard

from rlinf_core.contract.optim import TrainedParameter
from rlinf_core.training.distributed.processes import processes
from rlinf_core.training.recipes import MuonConfig
from rlinf_core.training.state.fsdp import ranks_mesh
from rlinf_core.training.state.optim import Optimizer

SHAPES = {
    "packed": (7 + 12, 6),
    "wide": (5, 16),
    "tall": (17, 4),
    "twin": (17, 4),
    "one_row": (1, 6),
    "bias": (5,),
    "head": (9, 6),
}
PARTS = {"packed": {"first": 7, "second": 12}}
OUTSIDE = ("head",)
STEPS, SKIPPED, SCALE = 4, 2, 3.0
LR = 2e-2


class Module(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))


def gradient(name, shape, step):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * step + list(SHAPES).index(name)))


def trained(parameters):
    return [TrainedParameter(name, p, name not in OUTSIDE, PARTS.get(name, {})) for name, p in parameters]


def train(module, like, **settings):
    """Steps with gradients that are `SCALE` times too large; one of them has a NaN.

    Args:
        module: Has the parameters of `SHAPES`.
        like: Gives a whole gradient the layout of a parameter.
    """
    optimizer = make(module, **settings)
    for step in range(STEPS):
        for name, parameter in module.named_parameters():
            whole = SCALE * gradient(name, SHAPES[name], step)
            if step == SKIPPED and name == "wide":
                whole[0, 0] = float("nan")
            parameter.grad = like(whole, parameter)
        optimizer.step(torch.tensor(SCALE))
    return optimizer


def make(module, **settings):
    recipe = MuonConfig(lr=LR, weight_decay=0.1, **settings)
    rate = lambda step: torch.full_like(step, LR) * (1.0 - 0.1 * step)  # noqa: E731
    return Optimizer(trained(module.named_parameters()), recipe, rate, clip_grad=1e9)


def main(arguments):
    from torch.distributed.tensor import distribute_tensor

    folder, replicas = Path(arguments[0]), int(arguments[1])
    with processes("cpu") as group:
        module = Module()
        fully_shard(module, mesh=ranks_mesh("cpu", group.size, replicas))
        optimizer = train(module, lambda whole, p: distribute_tensor(whole, p.device_mesh, p.placements))
        found = {**dict(module.named_parameters()), **optimizer.state_dict()}
        whole = {name: getattr(t.detach(), "full_tensor", t.detach)().clone().contiguous() for name, t in found.items()}
        if group.rank == 0:
            save_file(whole, folder / f"{group.size}.{replicas}.safetensors")
