"""The dummy π0 and π0.5 train on a CUDA device as on the CPU, with each option that changes where things happen.

It needs torch and pytest alone, so that it runs on a bare machine: `PYTHONPATH=rlinf_core/src:rlinf_plugins_openpi/src
python -m pytest --noconftest -m gpu tests/gpu`. `RLINF_CHECK_DEVICE=cpu` tries the test itself where there is no GPU.
"""

import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from rlinf_core.optimizers.adamw import AdamW
from rlinf_core.optimizers.parameters import TrainedParameter
from rlinf_core.optimizers.schedules import openpi_cosine
from rlinf_core.training.state.blocks import prepare_block
from rlinf_core.training.state.ema import Ema
from rlinf_core.training.state.fsdp import materialize, set_gradient_sync, shard
from rlinf_core.training.state.optim import Optimizer
from rlinf_plugins_openpi.model.dimensions import Pi0Dimensions
from rlinf_plugins_openpi.model.parts import unpacked
from rlinf_plugins_openpi.model.pi0 import Pi0

DEVICE = torch.device(os.environ.get("RLINF_CHECK_DEVICE", "cuda"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="there is no CUDA device"),
]
STEPS, MICRO_BATCHES = 3, 2
OPTIONS = {
    "plain": {},
    "kept_gathered": {"reshard_after_forward": False},
    "selective": {"checkpointing": "selective"},
    "full": {"checkpointing": "full"},
    "compiled": {"compiled": True},
    "compiled_selective": {"compiled": True, "checkpointing": "selective"},
    "offloaded": {"cpu_offload": True},
    "average_on_the_cpu": {"ema_device": "cpu"},
}


@pytest.fixture(scope="module", autouse=True)
def process_group():
    """One process, NCCL for CUDA and gloo for the CPU; offloaded parameters need both."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if DEVICE.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def batches(pi05, device):
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS * MICRO_BATCHES):
        batch = {
            "images": torch.randint(0, 256, (2, 1, 224, 224, 3), dtype=torch.uint8, generator=generator),
            "image_mask": torch.ones(2, 1, dtype=torch.bool),
            "tokens": torch.randint(0, 512, (2, 16), generator=generator),
            "token_mask": torch.ones(2, 16, dtype=torch.bool),
            "time": torch.rand(2, generator=generator),
            **{key: torch.randn(2, *shape, generator=generator) for key, shape in SHAPES.items()},
        }
        yield {key: value.to(device) for key, value in batch.items()}


SHAPES = {"state": (8,), "actions": (5, 8), "noise": (5, 8)}


def train(
    pi05,
    device,
    dtype,
    *,
    checkpointing="none",
    compiled=False,
    reshard_after_forward=True,
    cpu_offload=False,
    ema_device=None,
):
    """Losses of some steps, and the weights and their average after them."""
    with torch.device("meta"):
        policy = Pi0(Pi0Dimensions.of("dummy", pi05=pi05, action_dim=8, action_horizon=5))
    for unit in policy.shard_units():
        if unit.block:
            prepare_block(unit.module, checkpointing=checkpointing, compiled=compiled)
    shard(
        policy,
        init_device_mesh(device.type, (1,)),
        compute_dtype=dtype,
        reshard_after_forward=reshard_after_forward,
        cpu_offload=cpu_offload,
    )

    def value(name, shape):
        return policy.initial_value(name, shape, torch.Generator().manual_seed(len(name)))

    materialize(policy, torch.device("cpu") if cpu_offload else device, value, buffers_on=device)
    schedule = partial(openpi_cosine, lr=1e-3, min_lr=1e-4, warmup_steps=0, decay_steps=100)
    trained = [TrainedParameter(*named) for named in policy.named_parameters()]
    optimizer = Optimizer(trained, AdamW(1e-3, (0.9, 0.95), 1e-8, 1e-10), schedule, clip_grad=1.0)
    ema, losses = Ema(policy, 0.5, torch.device(ema_device) if ema_device else None), []
    for number, batch in enumerate(batches(pi05, device)):
        last = number % MICRO_BATCHES == MICRO_BATCHES - 1
        set_gradient_sync(policy, last=last, reduce_every_micro_batch=False, reshard=reshard_after_forward)
        out = policy(batch)
        out.loss_sum.backward()
        losses.append(float(out.loss_sum.detach() / out.weight))
        if last:
            ema.before_step()
            ema.update(optimizer.step(out.weight * MICRO_BATCHES).skipped)
    with ema.in_place_of_weights():
        averaged = {name: p.detach().full_tensor().cpu().clone() for name, p in policy.named_parameters()}
    weights = {name: p.detach().full_tensor().cpu().clone() for name, p in policy.named_parameters()}
    return torch.tensor(losses, dtype=torch.float64), weights, averaged


@pytest.fixture(scope="module", params=[False, True], ids=["pi0", "pi05"])
def on_the_cpu(request):
    return request.param, train(request.param, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("option", OPTIONS)
def test_float32_is_the_cpus_to_rounding(on_the_cpu, option):
    pi05, (losses, weights, averaged) = on_the_cpu
    got_losses, got_weights, got_averaged = train(pi05, DEVICE, torch.float32, **OPTIONS[option])
    torch.testing.assert_close(got_losses, losses, rtol=1e-4, atol=0)
    dimensions = Pi0Dimensions.of("dummy", pi05=pi05, action_dim=8, action_horizon=5)
    for state, reference in ((got_weights, weights), (got_averaged, averaged)):
        got, expected = unpacked(state, dimensions), unpacked(reference, dimensions)
        # The true gradient of the image tower's key biases is zero: Adam turns its noise into movement.
        names = [name for name in expected if not name.endswith("k_proj.bias")]
        off = sum(float((got[name] - expected[name]).square().sum()) for name in names) ** 0.5
        size = sum(float(expected[name].square().sum()) for name in names) ** 0.5
        assert off / size <= 1e-4


@pytest.mark.parametrize("option", ["plain", "selective", "offloaded"])
def test_bfloat16_is_near(on_the_cpu, option):
    pi05, (losses, *_) = on_the_cpu
    got, *_ = train(pi05, DEVICE, torch.bfloat16, **OPTIONS[option])
    torch.testing.assert_close(got, losses, rtol=0.05, atol=0)
