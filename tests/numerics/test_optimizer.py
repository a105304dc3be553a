"""The optimizer step against optax: schedule, clipping, AdamW."""

import json

import numpy as np
import pytest
import torch

from rlinf_core.contract.optim import OptimConfig, TrainedParameter
from rlinf_core.training.state.ema import Ema
from rlinf_core.training.state.optim import Optimizer


def test_learning_rate_is_optax_in_float32(optim_case, report):
    for name, case in json.loads((optim_case / "schedule.json").read_text()).items():
        schedule = OptimConfig(
            lr=case["peak_lr"],
            min_lr=case["decay_lr"],
            warmup_steps=case["warmup_steps"],
            decay_steps=case["decay_steps"],
        )
        ours = np.array([float(schedule.lr_at(torch.tensor(step))) for step in case["steps"]])
        theirs = np.array(case["lr"])
        report(f"optim/schedule/{name}", "lr", float(np.max(np.abs(ours / theirs - 1))), 1e-5)


def test_the_average_of_the_weights_is_the_references(optim_case, report):
    data = np.load(optim_case / "adamw_clip_ema.npz")
    decays = sorted({key.removeprefix("ema").partition("_")[0] for key in data if key.startswith("ema")})
    assert decays
    for decay in decays:
        report("optim/ema", f"average ({decay})", average_distance(data, decay), 1e-6)


def average_distance(data, decay):
    """How far averages of the recorded parameters are from the recorded averages."""
    names = sorted({key.split("/", 1)[1] for key in data if key.startswith("init/")})
    policy = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.tensor(data[f"init/{name}"])) for name in names})
    ema, worst = Ema(policy, float(decay)), 0.0
    for step in range(len({key.split("/")[0] for key in data if key.startswith("grad")})):
        for name, parameter in policy.items():
            parameter.data.copy_(torch.tensor(data[f"param{step}/{name}"]))
        ema.update(torch.tensor(0.0))
        for name, average in ema.state_dict().items():
            theirs = torch.tensor(data[f"ema{decay}_{step}/{name}"])
            worst = max(worst, float((average - theirs).abs().max() / theirs.abs().max()))
    return worst


@pytest.mark.parametrize("divisor", [1.0, 7.0])
def test_clipped_adamw_follows_optax(optim_case, report, divisor):
    data = np.load(optim_case / "adamw_clip_ema.npz")
    names = sorted({key.split("/", 1)[1] for key in data if key.startswith("init/")})
    steps = len({key.split("/")[0] for key in data if key.startswith("grad")})
    parameters = {name: torch.nn.Parameter(torch.tensor(data[f"init/{name}"])) for name in names}
    # The file does not say how it was made; section 5 of the set's README does.
    optim = OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=3, decay_steps=12, betas=(0.9, 0.95), weight_decay=1e-10)
    optimizer = Optimizer(
        [TrainedParameter(*named) for named in parameters.items()], optim, optim.lr_at, clip_grad=optim.clip_grad
    )
    worst = 0.0
    for step in range(steps):
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(data[f"grad{step}/{name}"]) * divisor
        optimizer.step(divisor)
        for name, parameter in parameters.items():
            theirs = torch.tensor(data[f"param{step}/{name}"])
            worst = max(worst, float((parameter.detach() - theirs).abs().max() / theirs.abs().max()))
    report("optim/adamw_clip", f"parameters (divisor {divisor:g})", worst, 1e-5)
