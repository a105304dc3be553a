"""The denoising steps of a chunk: what they share, and a step as one compiled graph that sees few shapes.

Torch and the standard library only. Axes: B batch, L slots of the prefix's grid, R its packed rows (see `packing`), T
suffix tokens, H action horizon, A action width, E expert width.

One step is compiled, and used for all steps of a chunk: ten steps in one graph would take ten times as long to compile,
and another number of steps would be another graph. What changes between calls is given as tensors. A prefix is spread
over as many slots as the longest one so far has (`rlinf serve` begins with the longest possible one), and a batch is
filled up to a power of two. The prefix itself runs eagerly, once per chunk: filling it up would cost more than
compiling it saves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from rlinf_plugins_openpi.model.attention import KeysValues, SuffixContext
from rlinf_plugins_openpi.model.packing import Packing


class Shared(NamedTuple):
    """What the denoising steps of a chunk share."""

    cache: tuple[KeysValues, ...]
    """The prefix's keys and values, per layer."""
    context: SuffixContext
    state: torch.Tensor | None
    """[B, 1, E] float32, π0's state token; None for π0.5."""
    dtype: torch.dtype
    """Compute dtype of the layers."""


class Moment(NamedTuple):
    """What the action expert reads of one flow time, which is that of all samples."""

    features: torch.Tensor | None
    """[1, E] float32; None for π0.5."""
    modulations: tuple[torch.Tensor, ...] | None
    """[1, 2, 3, 1, E] per layer; None for π0."""
    last: torch.Tensor | None
    """[1, 3, 1, E] of the final norm; None for π0."""


Step = Callable[[torch.Tensor, Moment, Shared, torch.Tensor], torch.Tensor]
"""Noisy actions [B, H, A], their flow time, what steps share and the step's size -> the next noisy actions."""


class CompiledStep:
    """A denoising step, compiled: with CUDA graphs on a GPU.

    Args:
        step: The step as written.
        backend: Of torch.compile.
    """

    def __init__(self, step: Step, *, backend: str | Callable[..., Any] = "inductor") -> None:
        self._step, self._backend = step, backend
        self._compiled: Callable[..., Any] | None = None
        self.slots = 0
        """Slots of the longest prefix so far: all are given as many."""

    def slots_for(self, packing: Packing) -> int:
        """The slots for a prefix."""
        self.slots = max(self.slots, packing.to_grid.shape[1])
        return self.slots

    def __call__(self, x_t: torch.Tensor, moment: Moment, shared: Shared, size: torch.Tensor) -> torch.Tensor:
        """One step; its graph is made in the first call with a batch of this size."""
        if self._compiled is None:
            mode: dict[str, Any] = {"mode": "reduce-overhead"} if x_t.is_cuda and self._backend == "inductor" else {}
            self._compiled = torch.compile(self._step, fullgraph=True, dynamic=False, backend=self._backend, **mode)
        out: torch.Tensor = self._compiled(x_t, moment, shared, size)
        return out


def on_grid(kv: KeysValues, packing: Packing, slots: int) -> KeysValues:
    """Keys and values of the prefix's rows [R, K, D], or on its grid [B, L, K, D], with this many slots per sample."""
    more = slots - packing.to_grid.shape[1]
    if kv.keys.ndim == 4:
        return KeysValues(*(F.pad(one, (0, 0, 0, 0, 0, more)).contiguous() for one in kv))
    places = F.pad(packing.to_grid, (0, more), value=len(packing.from_grid) - 1)
    return KeysValues(*(one[places] for one in kv))


def filled_up(x_t: torch.Tensor, shared: Shared) -> tuple[torch.Tensor, Shared]:
    """Repeat the last sample of a batch until their number is a power of two; the actions are a copy.

    In inference mode a copy is a tensor of that mode, like those that later steps get: to torch.compile, tensors from
    outside are of another kind.
    """
    batch = len(x_t)
    wanted = 1 << (batch - 1).bit_length()
    if wanted == batch:
        return x_t.clone(), shared
    chosen = torch.arange(wanted, device=x_t.device).clamp_(max=batch - 1)

    def filled(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value[chosen] if len(value) == batch else value
        if isinstance(value, tuple):
            parts = [filled(one) for one in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        return value

    return x_t[chosen], filled(shared)
