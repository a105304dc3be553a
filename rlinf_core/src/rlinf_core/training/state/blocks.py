"""Activation checkpointing and compilation of a policy's repeated blocks, before sharding.

Torch and the standard library only. Both replace a block's `forward`, not the block: parameters keep their names, and
FSDP's hooks before and after a block are neither compiled nor run twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import CodeType
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from rlinf_core.torch_names import (
    EXPENSIVE,
    compiled_graphs,
    compiler_errors,
    graph_break_errors,
    raise_recompile_limit,
    recompile_limit_errors,
)

Checkpointing = Literal["none", "selective", "full"]


RECOMPILE_LIMIT = 64
"""Variants of a block's code that are compiled before the rest runs eagerly; torch's default is 8. The kinds of one
class (the last layer), and static and dynamic shapes, are variants."""
SETTLED = 20
"""Steps without another graph after which compilation counts as complete."""


class Compilation:
    """What `torch.compile` made of the blocks of this process, to be reported."""

    def __init__(self) -> None:
        self.blocks = 0
        """Number of blocks that are compiled."""
        self._before = compiled_graphs()
        self._seen, self._since, self._reported = 0, 0, False
        self._eager: dict[str, str] = {}
        self._warnings: list[str] = []

    @property
    def graphs(self) -> int:
        """Number of graphs that were compiled."""
        return compiled_graphs() - self._before

    def news(self, *, last: bool) -> list[str]:
        """What is to be reported after a step: warnings as they appear, and once what was compiled.

        Args:
            last: Whether it was the run's last step.
        """
        self._since = self._since + 1 if self.graphs == self._seen else 0
        self._seen = self.graphs
        news, self._warnings = self._warnings, []
        if not self._reported and (last or (self._since >= SETTLED)):
            self._reported = True
            news.append(f"torch.compile made {self.graphs} graphs for the policy's {self.blocks} blocks")
        return news

    def warn(self, block: str, problem: str, error: BaseException) -> None:
        """Report once that blocks of a class are not compiled, or not whole."""
        if self._eager.get(block) == problem:
            return
        self._eager[block] = problem
        reason = " ".join([line.strip() for line in str(error).splitlines() if line.strip()][:2])
        self._warnings.append(
            f"warning: {block} {problem}, which costs speed and memory: {reason or type(error).__name__} "
            "(TORCH_LOGS=recompiles,graph_breaks says more)"
        )


def prepare_block(
    block: nn.Module, *, checkpointing: Checkpointing, compiled: bool, compilation: Compilation | None = None
) -> None:
    """Change in place how a block trains. Without gradients (validation, sampling) it runs unchanged.

    Args:
        block: One of the policy's repeated blocks; those of one class share compiled code.
        checkpointing: What the backward pass recomputes. `"full"`: everything from the block's inputs; `"selective"`:
            everything but the results of matrix products and attention.
        compiled: Compile with `torch.compile`. The first change of shapes compiles once more, then for all shapes.
        compilation: Where to report what was compiled and what was not.
    """
    as_written: Callable[..., Any] = block.forward
    in_training = as_written if checkpointing == "none" else _checkpointed(as_written, checkpointing, type(block))
    if compiled:
        in_training = _compiled(in_training, type(block).__name__, compilation or Compilation())

    @functools.wraps(as_written)
    def forward(*args: Any, **kwargs: Any) -> Any:
        # Outside of the compiled code: sampling has many shapes, which would exhaust torch.compile's cache of variants.
        return in_training(*args, **kwargs) if torch.is_grad_enabled() else as_written(*args, **kwargs)

    block.forward = forward


def _compiled(forward: Callable[..., Any], name: str, compilation: Compilation) -> Callable[..., Any]:
    """A block's forward pass as one compiled graph; where that fails, in pieces or eagerly, which is reported."""
    limit = raise_recompile_limit(RECOMPILE_LIMIT)
    compilation.blocks += 1
    whole = torch.compile(forward, fullgraph=True)  # Otherwise torch falls back without a word to the program.
    others: list[Callable[..., Any]] = []

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return (others[0] if others else whole)(*args, **kwargs)
        except recompile_limit_errors() as error:
            compilation.warn(name, f"runs eagerly for some shapes, as {limit} others are compiled", error)
        except graph_break_errors() as error:
            compilation.warn(name, "cannot be compiled as one graph", error)
            others.append(torch.compile(forward))
            return others[0](*args, **kwargs)
        except compiler_errors() as error:
            compilation.warn(name, "runs eagerly, because torch.compile failed", error)
            others.append(forward)
        return forward(*args, **kwargs)

    return run


def _checkpointed(forward: Callable[..., Any], mode: Checkpointing, kind: type) -> Callable[..., Any]:
    contexts = functools.partial(create_selective_checkpoint_contexts, _keep_expensive)
    extra: dict[str, Any] = {"context_fn": contexts} if mode == "selective" else {}

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **extra, **kwargs)

    # torch.compile keeps its variants, and limits them, per code object.
    checkpointed.__code__ = _code_of_class(checkpointed.__code__, kind)
    return checkpointed


@functools.cache
def _code_of_class(code: CodeType, kind: type) -> CodeType:
    """A copy of a function's code for the blocks of one class."""
    return code.replace(co_name=f"{code.co_name}_{kind.__name__}")


def _keep_expensive(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE
