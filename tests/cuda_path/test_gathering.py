"""Which parameters are gathered when, and CUDA's settings: counted on one rank, where gathering is a copy."""

import os
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from small_pi0 import batch_of, build, with_packing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from rlinf_core.training.distributed.processes import ALLOCATOR, set_cuda_defaults
from rlinf_core.training.state.fsdp import shard

DEPTH, VISION_DEPTH, STEPS = 3, 2, 4


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def gathered(monkeypatch):
    """Counts how often each parameter is gathered, by name."""
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

    counts, gather = Counter(), FSDPParam.init_unsharded_param

    def counting(parameter):
        counts[parameter._param_fqn] += 1
        return gather(parameter)

    monkeypatch.setattr(FSDPParam, "init_unsharded_param", counting)
    return counts


def sharded():
    model = build(pi05=True)
    shard(model, init_device_mesh("cpu", (1,)), compute_dtype=torch.bfloat16)
    return model


def step(model):
    batch = with_packing(batch_of([[True, True]] * 2, [5, 4]), 16)
    loss = model(batch).loss_sum
    loss.backward()
    return loss.detach(), {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}


def test_an_embedding_is_not_gathered_for_its_gradient(gathered):
    model = sharded()
    loss, gradients = step(model)
    assert gathered["embedding.weight"] == 1
    assert gathered["layers.1.vlm.qkv.weight"] == 2
    always = sharded()
    always.embedding.set_unshard_in_backward(True)
    gathered.clear()
    expected_loss, expected = step(always)
    assert gathered["embedding.weight"] == 2
    assert torch.equal(loss, expected_loss)
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_sampling_gathers_each_layer_once(gathered):
    model = sharded()
    batch = with_packing(batch_of([[True, True]] * 2, [5, 4]), 16)
    first = model.sample_actions(batch, batch["noise"], STEPS)
    assert gathered["layers.1.vlm.qkv.weight"] == gathered["layers.2.expert.qkv.weight"] == 1
    assert gathered["vision.blocks.0.qkv.weight"] == 1
    units = [one for one in model.modules() if isinstance(one, FSDPModule)]
    assert len(units) > DEPTH + VISION_DEPTH
    local = dict(model.named_parameters())
    assert all(hasattr(parameter, "to_local") for parameter in local.values())  # Nothing stays gathered.
    with torch.no_grad():
        local["layers.1.expert.qkv.weight"].to_local().mul_(2)
    assert not torch.equal(model.sample_actions(batch, batch["noise"], STEPS), first)  # The new values are read.
    gathered.clear()
    step(model)
    assert gathered["layers.1.vlm.qkv.weight"] == 2  # Training releases them in between, as before.


def test_cudas_defaults_leave_the_users_alone(monkeypatch):
    matmul, cuda = torch.backends.cuda.matmul, torch.backends.cuda
    before = matmul.allow_bf16_reduced_precision_reduction, cuda.cudnn_sdp_enabled()
    for name in ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    try:
        set_cuda_defaults()
        assert os.environ[ALLOCATOR[0]] == "expandable_segments:True"
        assert not matmul.allow_bf16_reduced_precision_reduction
        assert not cuda.cudnn_sdp_enabled()
        monkeypatch.setenv(ALLOCATOR[1], "max_split_size_mb:128")
        monkeypatch.delenv(ALLOCATOR[0])
        set_cuda_defaults()
        assert ALLOCATOR[0] not in os.environ
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before[0]
        cuda.enable_cudnn_sdp(before[1])
        os.environ.pop(ALLOCATOR[0], None)
