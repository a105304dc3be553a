"""Sharding a single-device policy with FSDP2, and giving its parameters their values tensor by tensor.

Torch and the standard library only. A policy names its units and their dtype (`Policy.shard_units`); everything else
here is the same for every policy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

FORWARD_METHODS = ("sample_actions", "demonstrate")
"""Entry points other than `forward` that must gather parameters too."""


def ranks_mesh(device_type: str, ranks: int, num_replicas: int = 1) -> DeviceMesh:
    """All ranks as FSDP2 takes them: one dimension that shards; with replicas, one that replicates before it."""
    if num_replicas == 1:
        return init_device_mesh(device_type, (ranks,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (num_replicas, ranks // num_replicas), mesh_dim_names=("replicate", "shard"))


def shard(
    policy: Any,
    mesh: DeviceMesh,
    *,
    compute_dtype: torch.dtype,
    reshard_after_forward: bool = True,
    min_unit_size: int = 0,
    cpu_offload: bool = False,
) -> None:
    """Shard a policy in place over a mesh; parameters stay float32, compute units are gathered in `compute_dtype`.

    Inputs are never cast (contract 3): FSDP's default would turn the flow-matching time into bfloat16.

    Args:
        policy: A policy whose parameters are on the meta device or hold the same values on every rank.
        mesh: The ranks; of two dimensions (HSDP), the first replicates and the second shards.
        compute_dtype: Dtype of the matrix products.
        reshard_after_forward: Release a unit's gathered parameters between forward and backward.
        min_unit_size: Smaller units, in parameters, stay with the root where their dtype is the root's, float32:
            gathering a few kilobytes apart saves no memory and costs a round trip.
        cpu_offload: Keep parameters and gradients in the CPU's memory, page-locked where there is an accelerator.
    """
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if cpu_offload else OffloadPolicy()

    def wrap(module: nn.Module, param_dtype: torch.dtype) -> None:
        precision = MixedPrecisionPolicy(
            param_dtype=param_dtype, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
        )
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=precision,
            offload_policy=offload,
            reshard_after_forward=reshard_after_forward,
        )

    for module, dtype in gathered_together(policy, compute_dtype=compute_dtype, min_unit_size=min_unit_size):
        wrap(module, dtype)
    for method in FORWARD_METHODS:
        if hasattr(policy, method):
            register_fsdp_forward_method(policy, method)


def gathered_together(
    policy: Any, *, compute_dtype: torch.dtype, min_unit_size: int
) -> Iterator[tuple[nn.Module, torch.dtype]]:
    """Modules whose parameters are gathered at once, in which dtype; a parameter belongs to the first that has it.

    The policy itself comes last, for all that is in no unit. Arguments are those of `shard`.
    """
    for unit in policy.shard_units():
        dtype = compute_dtype if unit.dtype == "compute" else torch.float32
        size = sum(parameter.numel() for parameter in unit.module.parameters())
        if dtype != torch.float32 or size >= min_unit_size:
            yield unit.module, dtype
    yield policy, torch.float32


def set_gradient_sync(policy: Any, *, last: bool, reduce_every_micro_batch: bool, reshard: bool) -> None:
    """Say what the coming micro batch of a step sends; between micro batches nothing needs to be sent.

    Args:
        policy: The sharded policy.
        last: It is the step's last micro batch.
        reduce_every_micro_batch: Reduce gradients within the shard group each time, so that no rank keeps them whole.
        reshard: Gathered parameters are released after use; else they stay until the step's end.
    """
    policy.set_is_last_backward(last)
    if reduce_every_micro_batch:
        policy.set_requires_all_reduce(last)
    else:
        policy.set_requires_gradient_sync(last)
        for unit in policy.shard_units():
            # What no loss reaches is never gathered; torch 2.11 fails on keeping gradients of such a unit.
            if not unit.reached and isinstance(unit.module, FSDPModule):
                unit.module.set_requires_gradient_sync(True, recurse=False)
    policy.set_reshard_after_backward(last or reshard)


def unused_parameters(policy: Any) -> frozenset[str]:
    """Names of the parameters that no loss reaches, as the policy's units say."""
    there = {id(p) for unit in policy.shard_units() if not unit.reached for p in unit.module.parameters()}
    return frozenset(name for name, parameter in policy.named_parameters() if id(parameter) in there)


def release(policy: nn.Module) -> None:
    """Release what is still gathered: after a pass without gradients it may stay, and would outlive its shards."""
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def materialize(
    policy: Any,
    device: torch.device,
    value: Callable[[str, tuple[int, ...]], torch.Tensor] | None,
    *,
    buffers_on: torch.device | None = None,
) -> None:
    """Give a sharded policy on the meta device memory and values.

    Each rank makes or reads one whole tensor at a time and keeps its slice (contract 2), so that the weights are the
    same on any number of ranks and no rank holds a second full copy.

    Args:
        policy: The sharded policy.
        device: Where the shards live.
        value: (parameter name, whole shape) -> the whole tensor; None: leave parameters as memory is.
        buffers_on: Where buffers live, if elsewhere than the shards.
    """
    allocate(policy, device)
    if value is not None:
        _fill(policy, device, value)
    for module in policy.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(buffers_on or device))
    policy.rebuild_buffers()


def allocate(policy: nn.Module, device: torch.device) -> None:
    """Give a module on the meta device memory; a parameter that several modules share stays one."""
    homes: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in policy.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            homes.setdefault(parameter, []).append((module, name))
    policy.to_empty(device=device)  # Makes a parameter of its own for each home.
    for (first, its_name), *others in homes.values():
        for module, name in others:
            setattr(module, name, getattr(first, its_name))


@torch.no_grad()
def _fill(policy: nn.Module, device: torch.device, value: Callable[[str, tuple[int, ...]], torch.Tensor]) -> None:
    for name, parameter in policy.named_parameters():
        whole = value(name, tuple(parameter.shape)).to(dtype=torch.float32, device=device)
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            # src_data_rank=None: slice locally, every rank has the whole tensor.
            whole = distribute_tensor(whole, mesh, placements, src_data_rank=None)
        parameter.copy_(whole)


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard, sharing its memory."""
    shard: torch.Tensor = tensor.detach()
    return shard.to_local() if isinstance(shard, DTensor) else shard


def derived_seed(*parts: object) -> int:
    """A generator's seed from what it belongs to: the run's seed and a name, or numbers."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def layout(parameters: Iterable[tuple[str, nn.Parameter]]) -> str:
    """A tag of names and shapes; checkpoints of another layout are refused."""
    text = "\n".join(sorted(f"{name} {tuple(parameter.shape)}" for name, parameter in parameters))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
