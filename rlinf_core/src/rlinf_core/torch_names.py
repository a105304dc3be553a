"""All non-public torch names that we use, so that a new version of torch breaks here and one test says where.

Non-public: private modules, names with an underscore, and modules whose location torch does not guarantee. Torch and
the standard library only, as models, sharding and optimizer may import it. `tests/test_torch_names.py` checks that each
name exists and does what we need. Two groups of names stay with their only user: torchrun's own in
`rlinf_core.torchrun`, and what a checkpoint's index may name, as text, in `training.checkpoint.shards`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.nn.attention.varlen  # registers its operator
from torch.distributed import (  # type: ignore[attr-defined]  # torch's stubs lack some
    DistError,
    HashStore,
    PrefixStore,
    Store,
    TCPStore,
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
    # How ranks find each other: `training.distributed`.
    "DistError",
    "HashStore",
    "PrefixStore",
    "Store",
    "TCPStore",
    "holders_of",
    "rendezvous",
    "set_gloo_timeout",
    # The files of a checkpoint: `training.checkpoint`, `export`.
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
    # `torch.compile`: `training.state.blocks`.
    "compiled_graphs",
    "compiler_errors",
    "graph_break_errors",
    "raise_recompile_limit",
    "recompile_limit_errors",
    # Operations as torch dispatches them: `costs.flops`, `training.state.blocks`.
    "ATTENTION",
    "EXPENSIVE",
    "FLASH",
    "FLASH_BACKWARD",
    "TorchDispatchMode",
    "VARLEN",
    "VARLEN_BACKWARD",
    "attention_spelt_out",
    "changes_arguments",
    "flash_attention",
    "flop_registry",
    "implemented",
    "name_of",
    "packet_of",
    "shares_memory",
    "storage_address",
    "tree_leaves",
    "tree_map",
    # Fake devices and process groups: `rehearsal`.
    "fake_store",
    "fake_tensors",
    "forget_meshes",
    "fsdp_parameters",
    "group_size_of",
    "in_backward",
    "memory_tracker",
    "outside_fake_tensors",
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
"""Forward passes of torch's fused attention."""
EXPENSIVE = ATTENTION | {_aten.mm.default, _aten.addmm.default, _aten.bmm.default}
"""Operations whose results cost more to compute than to store."""
FLASH = "aten._scaled_dot_product_flash_attention"
FLASH_BACKWARD = "aten._scaled_dot_product_flash_attention_backward"
VARLEN = "torch_attn._varlen_attn"
VARLEN_BACKWARD = "torch_attn._varlen_attn_backward"
"""Names of operations, as `name_of` returns them."""


def set_gloo_timeout(timeout: timedelta) -> None:
    """Set how long the default process group's next collectives of CPU tensors may take."""
    group: Any = torch.distributed.group.WORLD
    backend = group._get_backend(torch.device("cpu"))
    if backend.name() == "gloo":
        backend._set_default_timeout(timeout)


def holders_of(tensor: torch.Tensor) -> int:
    """How many references to a tensor there are, those of torch's own threads included."""
    return int(tensor._use_count())  # type: ignore[attr-defined]  # torch's stubs


def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, is_causal: bool = False
) -> torch.Tensor:
    """The output of CUDA's flash attention kernel, [B, N, L, D]; works on the meta device too."""
    out: torch.Tensor = _aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal)[0]
    return out


def attention_spelt_out(*args: Any, **kwargs: Any) -> torch.Tensor:
    """`scaled_dot_product_attention`, with the same arguments, as matrix products and a softmax."""
    out: torch.Tensor = _aten._scaled_dot_product_attention_math(*args, **kwargs)[0]
    return out


def packet_of(operation: Any) -> Any:
    """The key in `flop_registry` of a dispatched operation: all its overloads."""
    return operation._overloadpacket


def name_of(operation: Any) -> str:
    """A dispatched operation's name without its overload, e.g. `aten.mm`."""
    return str(operation._overloadpacket)


def shares_memory(operation: Any) -> bool:
    """Whether a dispatched operation returns views of its arguments or changes them in place."""
    schema = operation._schema
    return any(one.alias_info for one in (*schema.arguments, *schema.returns))


def changes_arguments(operation: Any) -> bool:
    """Whether a dispatched operation changes arguments in place."""
    return bool(operation._schema.is_mutable)


def storage_address(storage: Any) -> int:
    """An identifier of a storage, unique while it exists."""
    address: int = storage._cdata
    return address


@contextmanager
def implemented(operation: str, function: Callable[..., Any], key: str) -> Iterator[None]:
    """Replace an `aten` operation under a dispatch key while the body runs."""
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    library.impl(operation, function, key)
    try:
        yield
    finally:
        library._destroy()


def shard_like(tensor: DTensor, local: torch.Tensor) -> DTensor:
    """A DTensor with the mesh and placement of another, whose local shard is `local`, on any device."""
    return DTensor(local, tensor._spec, requires_grad=False)  # type: ignore[no-untyped-call]


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process."""
    from torch._dynamo.utils import counters  # Imported late: it takes a second.

    return int(counters["stats"]["unique_graphs"])


def raise_recompile_limit(limit: int) -> int:
    """Let torch.compile make at least this many variants of a function; returns how many it may make."""
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, limit)
    return config.recompile_limit


def recompile_limit_errors() -> tuple[type[BaseException], ...]:
    """Raised with `fullgraph=True` if a function has reached the limit of its compiled variants."""
    from torch._dynamo.exc import FailOnRecompileLimitHit

    return (FailOnRecompileLimitHit,)


def graph_break_errors() -> tuple[type[BaseException], ...]:
    """Raised with `fullgraph=True` if a function cannot be compiled as one graph."""
    from torch._dynamo.exc import Unsupported

    return (Unsupported,)


def compiler_errors() -> tuple[type[BaseException], ...]:
    """Raised if compilation fails, for example because there is no C compiler."""
    from torch._dynamo.exc import TorchDynamoException

    return (TorchDynamoException,)


def set_plan_key(planner: DefaultSavePlanner, key: str) -> None:
    """Set the key under which the process's caches keep a planner's plans."""
    planner._cached_plans_key = key


def forget_plans(planner: DefaultSavePlanner) -> None:
    """Drop a planner's plans from the process's caches."""
    for cache in plan_caches():
        cache.pop(planner._cached_plans_key, None)


def plan_caches() -> tuple[dict[str, Any], ...]:
    """The process's caches of plans; each maps keys to plans."""
    return (
        SavePlanner._cached_save_plan,
        SavePlanner._cached_all_plans,
        SavePlanner._cached_global_plan,
        SavePlanner._cached_metadata,
        SavePlanner._cached_final_save_plan,
    )


def fake_tensors() -> Any:
    """Torch's module of fake tensors, which have a shape, a dtype and a device: `rehearsal.fake_cuda` changes parts."""
    from torch._subclasses import fake_tensor  # Imported late, as all of what a rehearsal needs.

    return fake_tensor


def outside_fake_tensors() -> Any:
    """A context in which tensors have values again."""
    return fake_tensors().unset_fake_temporarily()


def fake_store() -> Any:
    """The store of the process group `fake`, whose collectives return at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    return FakeStore()


def forget_meshes() -> None:
    """Drop results of DTensor operations that the process remembers, with the device meshes that they are on."""
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    _clear_sharding_prop_cache()  # type: ignore[no-untyped-call]


def fsdp_parameters() -> Any:
    """Torch's module that shards parameters; it cuts them with its `_chunk_with_empty(tensor, num_chunks, dim)`."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    return _fsdp_param


def memory_tracker() -> Any:
    """Torch's class that follows the memory of tensors, fake ones too."""
    from torch.distributed._tools.mem_tracker import MemTracker

    return MemTracker


def in_backward() -> bool:
    """Whether this thread is in a backward pass."""
    return torch._C._current_graph_task_id() != -1


def group_size_of(operation: Any, args: Any) -> int:
    """Number of ranks that a dispatched collective is among."""
    from torch.distributed._tools.fake_collectives import CollectiveOp

    return int(CollectiveOp.get_process_group(operation, args).size())
