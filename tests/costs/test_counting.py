"""What is counted without values is what computing takes: operations, saved tensors, the most memory at once."""

import contextlib
from functools import partial

import numpy as np
import pytest
import torch
from tiny_text import sample, some_tokens, tiny_policy
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from varlen_on_cpu import packed_attention

from rlinf_core.costs.flops import count
from rlinf_core.training.state.blocks import prepare_block
from rlinf_core.training.state.fsdp import gathered_together, materialize
from rlinf_plugins_openpi import Pi0Config, Pi05Config

SAMPLES = 3
POLICIES = {
    "pi05": (Pi05Config(variant="dummy", max_token_len=40, augment=False), ["base_0_rgb", "left_wrist_0_rgb"]),
    "pi0": (Pi0Config(variant="dummy", augment=False), ["base_0_rgb"]),
    "text": (tiny_policy(max_length=96), []),
}


def built(config, checkpointing="none", dtype=torch.bfloat16):
    """The policy on the meta device, in the dtypes in which its parameters are gathered."""
    with torch.device("meta"):
        policy = config.build()
    for unit in policy.shard_units():
        if unit.block and checkpointing != "none":
            prepare_block(unit.module, checkpointing=checkpointing, compiled=False)
    seen = set()
    for module, own in gathered_together(policy, compute_dtype=dtype, min_unit_size=1_000_000):
        for parameter in set(module.parameters()) - seen:
            parameter.data = parameter.data.to(own)
            seen.add(parameter)
    return policy


def with_values(config, *given):
    """The same policy on the CPU, with numbers."""
    policy, dtypes = built(config, *given), {}
    for name, parameter in policy.named_parameters():
        dtypes[name] = parameter.dtype
    generator = torch.Generator().manual_seed(0)
    materialize(policy, torch.device("cpu"), lambda name, shape: torch.randn(shape, generator=generator) * 0.05)
    for name, parameter in policy.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    return policy.train()


def batch_of(name):
    config, cameras = POLICIES[name]
    one = config.largest_sample(cameras)
    if name == "text":
        return config.collate([sample(some_tokens(40, i), some_tokens(20 + 5 * i, i)) for i in range(SAMPLES)])
    return config.collate([{**one, **config.draw(np.random.default_rng(i))} for i in range(SAMPLES)])


def step(policy, batch):
    torch.autograd.backward(policy(batch).loss_sum)


@pytest.mark.parametrize("name", POLICIES)
def test_operations_are_those_of_a_step(name):
    config, batch = POLICIES[name][0], batch_of(name)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step(with_values(config, "none", torch.float32), batch)
    counted = count(built(config, "none", torch.float32), batch)
    assert counted.flops == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("name", ["pi05", "text"])
def test_saved_bytes_are_those_that_autograd_saves(name):
    config, batch = POLICIES[name][0], batch_of(name)
    policy, kept = with_values(config), {}
    not_counted = {p.untyped_storage().data_ptr() for p in policy.parameters()}

    def keep(tensor):
        if tensor.is_floating_point():
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with packed_attention(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = policy(batch).loss_sum
    saved = sum(storage.nbytes() for place, storage in kept.items() if place not in not_counted)
    counted = count(built(config), batch)
    assert counted.saved_bytes == pytest.approx(saved, rel=0.02)
    assert loss.isfinite()


@pytest.mark.slow  # Compiles for half a minute.
@pytest.mark.parametrize("name", ["pi05", "pi0"])
def test_what_compiled_blocks_keep_is_what_torchs_partitioner_keeps(name, monkeypatch):
    config, batch = POLICIES[name][0], batch_of(name)
    policy, kept = with_values(config), {}
    not_counted = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition"))
    for unit in policy.shard_units():
        if unit.block:
            prepare_block(unit.module, checkpointing="none", compiled=True)

    def keep(tensor):
        if tensor.is_floating_point():
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with packed_attention(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy(batch)
    saved = sum(storage.nbytes() for place, storage in kept.items() if place not in not_counted)
    counted = as_if_compiled(built(config), batch)
    assert counted.saved_bytes == pytest.approx(saved, rel=0.06)


def as_if_compiled(policy, batch):
    return count(policy, batch, compiled=[unit.module for unit in policy.shard_units() if unit.block])


@pytest.mark.parametrize("name", POLICIES)
def test_compiled_blocks_keep_less(name):
    config, batch = POLICIES[name][0], batch_of(name)
    eager, selective = (count(built(config, checkpointing), batch) for checkpointing in ("none", "selective"))
    compiled = as_if_compiled(built(config), batch)
    assert selective.saved_bytes < compiled.saved_bytes < 0.9 * eager.saved_bytes
    assert selective.peak_bytes < compiled.peak_bytes < eager.peak_bytes
    assert compiled.flops == eager.flops


@pytest.mark.parametrize(
    ("name", "checkpointing"), [("pi05", "none"), ("pi05", "selective"), ("pi05", "full"), ("text", "none")]
)
def test_the_most_memory_at_once_is_that_of_a_step(name, checkpointing):
    config, batch = POLICIES[name][0], batch_of(name)
    policy = with_values(config, checkpointing)
    for parameter in policy.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    # Otherwise on the grid: the stand-in's own memory would be the most.
    with packed_attention() if name == "text" else contextlib.nullcontext():
        step(policy, batch)  # What is allocated once, such as workspaces.
        with torch.profiler.profile(profile_memory=True) as profile:
            step(policy, batch)
    alive, most = 0, 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    counted = count(built(config, checkpointing), batch)
    assert counted.peak_bytes == pytest.approx(most, rel=0.1)
