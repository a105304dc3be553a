"""Activation checkpointing and compilation of a policy's repeated blocks, before sharding.

Torch and the standard library only. Both replace a block's `forward`, not the block: parameters keep their names, and
FSDP's hooks before and after a block are neither compiled nor run twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from rlinf_core.torch_names import ATTENTION

Checkpointing = Literal["none", "selective", "full"]

_aten = torch.ops.aten
EXPENSIVE = frozenset({_aten.mm.default, _aten.addmm.default, _aten.bmm.default, *ATTENTION})
"""Operations whose results selective checkpointing keeps: they cost more to compute than to store."""


def prepare_block(block: nn.Module, *, checkpointing: Checkpointing, compiled: bool) -> None:
    """Change in place how a block trains. Without gradients (validation, sampling) it runs unchanged.

    Args:
        block: One of the policy's repeated blocks; those of one class share compiled code.
        checkpointing: What the backward pass recomputes. `"full"`: everything from the block's inputs; `"selective"`:
            everything but the results of matrix products and attention.
        compiled: Compile with `torch.compile`. The first change of shapes compiles once more, then for all shapes.
    """
    as_written: Callable[..., Any] = block.forward
    in_training = as_written if checkpointing == "none" else _checkpointed(as_written, checkpointing)
    if compiled:
        in_training = torch.compile(in_training)

    @functools.wraps(as_written)
    def forward(*args: Any, **kwargs: Any) -> Any:
        # Outside of the compiled code: sampling has many shapes, which would exhaust torch.compile's cache of variants.
        return in_training(*args, **kwargs) if torch.is_grad_enabled() else as_written(*args, **kwargs)

    block.forward = forward


def _checkpointed(forward: Callable[..., Any], mode: Checkpointing) -> Callable[..., Any]:
    contexts = functools.partial(create_selective_checkpoint_contexts, _keep_expensive)
    extra: dict[str, Any] = {"context_fn": contexts} if mode == "selective" else {}

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **extra, **kwargs)

    return checkpointed


def _keep_expensive(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE
