"""Shard a single-device policy with FSDP2, and fill its parameters tensor by tensor.

Torch and the standard library only. A policy names its units and their dtype (`Policy.shard_units`); everything else
is the same for all policies.
"""

from __future__ import annotations

import functools
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

FORWARD_METHODS = ("sample_actions",)
"""Entry points other than `forward` that must gather parameters too; `Policy.forward_methods` names more."""


def ranks_mesh(device_type: str, ranks: int, num_replicas: int = 1) -> DeviceMesh:
    """The device mesh of all ranks: one dimension that shards; with replicas, one that replicates before it."""
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
    """Shard a policy in place over a mesh; parameters keep their dtype, compute units are gathered in `compute_dtype`.

    Inputs are never cast (contract 3): FSDP's default would turn the flow-matching time into bfloat16.

    Args:
        policy: A policy whose parameters are on the meta device or hold the same values on every rank.
        mesh: The ranks; with two dimensions (HSDP), the first replicates and the second shards.
        compute_dtype: Dtype of matrix products.
        reshard_after_forward: Release a unit's gathered parameters between forward and backward.
        min_unit_size: Float32 units with fewer parameters are gathered with the root, whose dtype is float32 too:
            gathering a few kilobytes separately saves no memory and costs a round trip.
        cpu_offload: Keep parameters and gradients in CPU memory, page-locked if there is an accelerator.
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
    for unit in policy.shard_units():
        if not getattr(unit, "read_in_backward", True) and isinstance(unit.module, FSDPModule):
            unit.module.set_unshard_in_backward(False)
    for method in (*FORWARD_METHODS, *getattr(policy, "forward_methods", ())):
        if hasattr(policy, method):
            register_fsdp_forward_method(policy, method)
            if reshard_after_forward:
                setattr(policy, method, _gathering_once(policy, getattr(policy, method)))


def _gathering_once(policy: nn.Module, method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that may call units again and again, as sampling does, and gathers the parameters of each but once."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        units = [one for one in policy.modules() if isinstance(one, FSDPModule) and one is not policy]
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
        try:
            return method(*args, **kwargs)
        finally:
            for unit in units:
                unit.set_reshard_after_forward(True, recurse=False)
            release(policy)

    return call


def gathered_together(
    policy: Any, *, compute_dtype: torch.dtype, min_unit_size: int
) -> Iterator[tuple[nn.Module, torch.dtype]]:
    """Modules whose parameters are gathered together, and in which dtype; a parameter belongs to the first that has it.

    The policy itself comes last, for parameters that are in no unit. Arguments are those of `shard`.
    """
    for unit in policy.shard_units():
        dtype = compute_dtype if unit.dtype == "compute" else torch.float32
        size = sum(parameter.numel() for parameter in unit.module.parameters())
        if dtype != torch.float32 or size >= min_unit_size:
            yield unit.module, dtype
    yield policy, torch.float32


def set_gradient_sync(policy: Any, *, last: bool, reduce_every_micro_batch: bool, reshard: bool) -> None:
    """Choose which gradients the next micro batch reduces; only the last one of a step has to.

    Args:
        policy: The sharded policy.
        last: Whether it is the last micro batch of the step.
        reduce_every_micro_batch: Reduce gradients within the shard group each time, so that no rank keeps them
            unsharded.
        reshard: Release gathered parameters after use; else they stay until the end of the step.
    """
    policy.set_is_last_backward(last)
    if reduce_every_micro_batch:
        policy.set_requires_all_reduce(last)
    else:
        policy.set_requires_gradient_sync(last)
        for unit in policy.shard_units():
            # Unused units are never gathered; torch 2.11 fails when it should keep the gradients of one.
            if not unit.reached and isinstance(unit.module, FSDPModule):
                unit.module.set_requires_gradient_sync(True, recurse=False)
    policy.set_reshard_after_backward(last or reshard)


def unused_parameters(policy: Any) -> frozenset[str]:
    """Names of the parameters that the loss does not depend on, according to the policy's units."""
    there = {id(p) for unit in policy.shard_units() if not unit.reached for p in unit.module.parameters()}
    return frozenset(name for name, parameter in policy.named_parameters() if id(parameter) in there)


def release(policy: nn.Module) -> None:
    """Release gathered parameters: after a pass without gradients they may remain, and would hide changed shards."""
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
    """Allocate and fill a sharded policy that is on the meta device.

    Each rank creates or reads one full tensor at a time and keeps its slice (contract 2), so that the weights are the
    same on any number of ranks and no rank holds a second full copy.

    Args:
        policy: The sharded policy.
        device: Device of the shards.
        value: (parameter name, full shape) -> the full tensor; None: leave parameters uninitialised.
        buffers_on: Device of buffers; None: that of the shards.
    """
    allocate(policy, device)
    if value is not None:
        _fill(policy, device, value)
    for module in policy.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(buffers_on or device))
    policy.rebuild_buffers()


def allocate(policy: nn.Module, device: torch.device) -> None:
    """Allocate memory for a module on the meta device; a parameter shared by several modules stays shared."""
    homes: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in policy.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            homes.setdefault(parameter, []).append((module, name))
    policy.to_empty(device=device)  # Creates a separate parameter for each module.
    for (first, its_name), *others in homes.values():
        for module, name in others:
            setattr(module, name, getattr(first, its_name))


@torch.no_grad()
def _fill(policy: nn.Module, device: torch.device, value: Callable[[str, tuple[int, ...]], torch.Tensor]) -> None:
    for name, parameter in policy.named_parameters():
        # float32, except for frozen parameters that are held in less (`lora.base_dtype`).
        whole = value(name, tuple(parameter.shape)).to(dtype=parameter.dtype, device=device)
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            # src_data_rank=None: slice locally, as every rank has the full tensor.
            whole = distribute_tensor(whole, mesh, placements, src_data_rank=None)
        parameter.copy_(whole)


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard, sharing its memory."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    with torch.no_grad():  # Not dispatched as an operation on DTensors, which takes longer than many kernels.
        return tensor.to_local().detach()


def derived_seed(*parts: object) -> int:
    """A generator's seed, derived from what it is for: the run's seed and a name, or numbers."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def layout(parameters: Iterable[tuple[str, nn.Parameter]]) -> str:
    """A hash of names and shapes; checkpoints with another layout are refused."""
    text = "\n".join(sorted(f"{name} {tuple(parameter.shape)}" for name, parameter in parameters))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
