"""All that we use of torch's less public names, so that a new version of torch breaks here, and one test says where.

Less public: private modules, names with an underscore, and modules whose place torch does not promise. Torch and the
standard library only, as models, sharding and optimizer may import it. `tests/test_torch_names.py` asks of each name
that it exists and does what we need. Two families of names stay where their only user is: torchrun's own in
`rlinf_core.torchrun`, and what a checkpoint's index may name, as text, in `training.shards`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.attention.varlen  # registers its operator
from torch.distributed import (  # type: ignore[attr-defined]  # torch's stubs leave some out
    DistError,
    HashStore,
    PrefixStore,
    Store,
    rendezvous,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as read_shards
from torch.distributed.checkpoint.state_dict_saver import save as write_shards
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

__all__ = [
    # How ranks find each other: `training.meeting`, `training.distributed`.
    "DistError",
    "HashStore",
    "PrefixStore",
    "Store",
    "rendezvous",
    # The files of a checkpoint: `training.shards`, `training.saving`, `training.loading`, `training.staging`, `export`.
    "CheckpointException",
    "DefaultSavePlanner",
    "FileSystem",
    "FileSystemReader",
    "FileSystemWriter",
    "Metadata",
    "SavePlan",
    "SavePlanner",
    "WriteResult",
    "forget_plans",
    "read_shards",
    "set_plan_key",
    "shard_like",
    "write_shards",
    # Operations as torch dispatches them: `training.counting`, `training.blocks`.
    "ATTENTION",
    "FLASH",
    "FLASH_BACKWARD",
    "TorchDispatchMode",
    "VARLEN",
    "VARLEN_BACKWARD",
    "attention_spelt_out",
    "flash_attention",
    "flop_registry",
    "implemented",
    "name_of",
    "packet_of",
    "shares_memory",
    "storage_address",
    "tree_leaves",
    "tree_map",
]

_aten = torch.ops.aten

ATTENTION = frozenset(
    {
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._flash_attention_forward.default,
        torch.ops.torch_attn._varlen_attn.default,
    }
)
"""The forward passes of attention that torch fuses."""
FLASH = "aten._scaled_dot_product_flash_attention"
FLASH_BACKWARD = "aten._scaled_dot_product_flash_attention_backward"
VARLEN = "torch_attn._varlen_attn"
VARLEN_BACKWARD = "torch_attn._varlen_attn_backward"
"""Operations by `name_of`."""


def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, is_causal: bool = False
) -> torch.Tensor:
    """The output of CUDA's flash kernel, [B, N, L, D]; on the meta device, its shape and what it keeps."""
    out: torch.Tensor = _aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal)[0]
    return out


def attention_spelt_out(*args: Any, **kwargs: Any) -> torch.Tensor:
    """`scaled_dot_product_attention` as matrix products and a softmax; its arguments."""
    out: torch.Tensor = _aten._scaled_dot_product_attention_math(*args, **kwargs)[0]
    return out


def packet_of(operation: Any) -> Any:
    """All overloads of a dispatched operation, as `flop_registry` knows them."""
    return operation._overloadpacket


def name_of(operation: Any) -> str:
    """A dispatched operation's name without its overload, e.g. `aten.mm`."""
    return str(operation._overloadpacket)


def shares_memory(operation: Any) -> bool:
    """Whether a dispatched operation's results share memory with its arguments, or it changes these."""
    schema = operation._schema
    return any(one.alias_info for one in (*schema.arguments, *schema.returns))


def storage_address(storage: Any) -> int:
    """What a storage is told apart by for as long as it lives."""
    address: int = storage._cdata
    return address


@contextmanager
def implemented(operation: str, function: Callable[..., Any], key: str) -> Iterator[None]:
    """Replace what an operation of `aten` does under a dispatch key, for as long as the body lasts."""
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    library.impl(operation, function, key)
    try:
        yield
    finally:
        library._destroy()


def shard_like(tensor: DTensor, local: torch.Tensor) -> DTensor:
    """A local tensor as this rank's shard of what the other tensor is a shard of, on whichever device it is."""
    return DTensor(local, tensor._spec, requires_grad=False)  # type: ignore[no-untyped-call]


def set_plan_key(planner: DefaultSavePlanner, key: str) -> None:
    """Under which key the process's caches keep a planner's plans."""
    planner._cached_plans_key = key


def forget_plans(planner: DefaultSavePlanner) -> None:
    """Drop the plans that the process's caches keep for a planner."""
    for cache in plan_caches():
        cache.pop(planner._cached_plans_key, None)


def plan_caches() -> tuple[dict[str, Any], ...]:
    """The process's caches of plans, by key."""
    return (
        SavePlanner._cached_save_plan,
        SavePlanner._cached_all_plans,
        SavePlanner._cached_global_plan,
        SavePlanner._cached_metadata,
        SavePlanner._cached_final_save_plan,
    )
