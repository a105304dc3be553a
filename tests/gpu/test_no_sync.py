"""A step waits for nothing on a CUDA device: neither its batches, nor its optimizer, nor its numbers.

It needs torch, NumPy and pytest alone, as test_step_on_cuda.py does: `PYTHONPATH=rlinf_core/src python -m pytest
--noconftest -m gpu tests/gpu/test_no_sync.py`. `RLINF_CHECK_DEVICE=cpu` tries the test itself where there is no GPU.
"""

import contextlib
import itertools
import math
import os
from collections import deque
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.utils import get_total_norm

from rlinf_core.optimizers.adamw import AdamW
from rlinf_core.optimizers.muon import Muon, Settings, is_matrix
from rlinf_core.optimizers.orthogonal import Iterations
from rlinf_core.optimizers.parameters import TrainedParameter
from rlinf_core.optimizers.schedules import openpi_cosine
from rlinf_core.plugins.owners import Implementation, Owner
from rlinf_core.training.distributed.processes import Processes
from rlinf_core.training.gradients import GradientHooks
from rlinf_core.training.monitor.flight_recorder import FlightRecorder
from rlinf_core.training.monitor.metrics import PHASES
from rlinf_core.training.state.adapters import Original, find_adapters
from rlinf_core.training.state.ema import Ema
from rlinf_core.training.state.fsdp import materialize, shard
from rlinf_core.training.state.optim import Optimizer
from rlinf_core.training.step import TrainStep

DEVICE = torch.device(os.environ.get("RLINF_CHECK_DEVICE", "cuda"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="there is no CUDA device"),
]
WIDTH, MICRO_BATCH, ACCUMULATION, WARM_UP, STEPS, LAG = 512, 8, 2, 3, 8, 1


class Block(nn.Linear):
    def forward(self, x):
        return nn.functional.gelu(super().forward(x.to(self.weight.dtype)))


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block(WIDTH, WIDTH) for _ in range(3))

    def forward(self, batch):
        x = batch["state"]
        for block in self.blocks:
            x = block(x)
        error = (x.float() - batch["actions"]).square().mean(1)
        each = torch.stack((error.detach(), torch.ones_like(error)), dim=1)
        weight = torch.full((), float(len(error)), device=error.device)
        return SimpleNamespace(loss_sum=error.sum(), weight=weight, metrics={}, sample_losses=each)

    def shard_units(self):
        return (SimpleNamespace(module=block, dtype="compute", reached=True) for block in self.blocks)

    def rebuild_buffers(self):
        pass


def batch():
    """As the loader makes it: in page-locked memory; of a mixture of two datasets."""
    generator = torch.Generator().manual_seed(0)
    numbers = {key: torch.randn(MICRO_BATCH, WIDTH, generator=generator) for key in ("state", "actions")}
    numbers["rlinf_source"] = torch.arange(MICRO_BATCH) % 2
    return {key: value.pin_memory() if DEVICE.type == "cuda" else value for key, value in numbers.items()}


@pytest.fixture
def group():
    backend = "cpu:gloo,cuda:nccl" if DEVICE.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield Processes(DEVICE)
    dist.destroy_process_group()


@contextlib.contextmanager
def waiting_is_an_error():
    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    yield
    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode("default")


def measure(policy, step, scale, **_):
    """What a plugin measures of the gradients."""
    norms = {name: get_total_norm([parameter.grad]) * scale for name, parameter in policy.named_parameters()}
    return {f"norm/{name}": norm for name, norm in norms.items()} | {"number": float(step)}


ADAMW = AdamW(1e-3, (0.9, 0.95), 1e-8, 1e-10)


class MuonRecipe:
    """`optim.type = "muon"` without pydantic."""

    lr, unused_weight_decay, elementwise = 1e-3, 0.0, False

    def build(self, parameters):
        return Muon(
            parameters, Settings(1e-3, 0.95, True, Iterations(5, torch.bfloat16), 1e-10, "match_rms_adamw"), ADAMW
        )

    def initial_state(self, one):
        return {"momentum_buffer": torch.zeros_like(one.parameter)} if is_matrix(one) else ADAMW.initial_state(one)


@pytest.mark.parametrize("recipe", [ADAMW, MuonRecipe()], ids=["adamw", "muon"])
@pytest.mark.parametrize("decay", [0.0, 0.9], ids=["plain", "averaged"])
@pytest.mark.parametrize("reshard", [True, False], ids=["resharded", "kept"])
def test_steps_wait_for_nothing_and_their_numbers_come_late(group, tmp_path, decay, reshard, recipe):
    with torch.device("meta"):
        policy = Policy()
    shard(policy, init_device_mesh(DEVICE.type, (1,)), compute_dtype=torch.bfloat16, reshard_after_forward=reshard)
    materialize(
        policy,
        DEVICE,
        lambda name, shape: torch.randn(shape, generator=torch.Generator().manual_seed(len(name))) * 0.02,
    )
    schedule = partial(openpi_cosine, lr=1e-3, min_lr=1e-4, warmup_steps=0, decay_steps=100)
    trained = [TrainedParameter(*named, in_block=True) for named in policy.named_parameters()]
    optimizer = Optimizer(trained, recipe, schedule, clip_grad=1.0)
    size = MICRO_BATCH * ACCUMULATION
    places = [np.arange(micro * MICRO_BATCH, (micro + 1) * MICRO_BATCH) for micro in range(ACCUMULATION)]
    order = SimpleNamespace(accumulation=ACCUMULATION, sources=(1, 2), places=lambda micro, rank: places[micro])
    order.batching = SimpleNamespace(seed=0)
    config = SimpleNamespace(global_batch_size=size, reduce_every_micro_batch=False, reshard_after_forward=reshard)
    adapters = find_adapters(Original.of(policy), policy, lambda: "no plugin")
    ema = Ema(policy, decay) if decay else None
    state = SimpleNamespace(policy=policy, optimizer=optimizer, ema=ema, adapters=adapters)
    hooks = GradientHooks(None, policy, group, [Implementation("hook", Owner("toy", "1.0", "toy"), measure)])
    step = TrainStep(config, group, order, state, FlightRecorder(tmp_path, 0, timeout=600.0), gradients=hooks)
    waiting, read, stream = deque(), [], itertools.repeat(batch())
    for number in range(WARM_UP):
        step(number, stream, asked=lambda: False).read(size)
    with waiting_is_an_error():
        for number in range(WARM_UP, WARM_UP + STEPS):
            waiting.append(step(number, stream, asked=lambda number=number: number == WARM_UP + 2, times=(0.1, 0.2)))
            while len(waiting) > LAG:
                read.append(waiting.popleft().read(size))
    read += [record.read(size) for record in waiting]
    losses = [numbers.metrics["loss"] for numbers in read]
    assert losses == sorted(losses, reverse=True)
    assert [numbers.asked for numbers in read] == [number == 2 for number in range(STEPS)]
    for number, numbers in enumerate(read, start=WARM_UP + 1):
        norms = [value for name, value in numbers.metrics.items() if name.startswith("norm/")]
        assert math.hypot(*norms) == pytest.approx(numbers.metrics["grad_norm"], rel=1e-3)
        assert numbers.metrics["number"] == number
        assert numbers.times == pytest.approx([0.1, 0.2])
        assert len(numbers.sample_losses) == size
        assert numbers.metrics["loss"] == pytest.approx(sum(numbers.sample_losses) / size, rel=1e-4)
        assert sum(numbers.by_source[1::2]) == size
        assert sum(numbers.metrics[f"{phase}_share"] for phase in PHASES) <= 1.0 + 1e-3
