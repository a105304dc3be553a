"""Where the large tensors of a batch are made: in a loader worker, in memory that it shares with the trainer.

A worker hands a tensor over in shared memory, which is a copy of all its bytes unless it lies there already. So
`collate` fills what it gets from here. And new memory is slow: its pages are cleared and mapped one by one when they
are first touched, in the worker and again in the trainer, which for the frames of a video takes up to a third of the
time of decoding them. So blocks of memory are used again, by one batch after another: a tensor that the trainer gets
says in the head of its block when it is gone, and the worker takes a block of which all tensors are.

Together with pinning, a picture is copied twice on its way from the decoder to the device's own copy: into the batch,
and into page-locked memory.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import multiprocessing
import os
import sys
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

HEAD = 4096
"""Bytes before a block's data; each of the first `MOST_TENSORS` is 1 while the trainer has that tensor of the block."""
MOST_TENSORS = 64
"""Of a block that are handed over in place; torch copies more."""
SMALL = 2**16
"""Bytes of a tensor up to which it is sent as such."""
IN_NUMPY = (torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool)
KEPT = 2**28
"""Bytes of its own that a worker keeps for what it reads next, when glibc would give them back."""


def batch_tensor(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of a batch, on the CPU, to be filled wholly: what it holds is undefined."""
    if get_worker_info() is None:
        return torch.empty(tuple(shape), dtype=dtype)
    size = math.prod(shape) * dtype.itemsize
    return _free_block(size).lend()[:size].view(dtype).view(tuple(shape))


def hand_over(batch: Any) -> Any:
    """A worker's batch as it is to be sent: what `batch_tensor` made arrives in the memory that it lies in."""
    return _sent(batch, itertools.count()) if get_worker_info() is not None else batch


def keep_memory() -> None:
    """Let this worker keep the memory that decoded pictures leave, for the next ones."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold, largest = -1, -3, 2**25
        libc.mallopt(trim_threshold, KEPT)
        libc.mallopt(mmap_threshold, largest)


class _Block:
    """Shared memory, in the worker that made it."""

    def __init__(self, number: int, size: int) -> None:
        self.number, self.size = number, size
        # As torch's own collate does; `share_memory_` of a new tensor would copy it first.
        storage = torch.UntypedStorage._new_shared(HEAD + size, device="cpu")  # type: ignore[no-untyped-call]
        self.memory = torch.empty(0, dtype=torch.uint8).set_(storage)
        self.memory[:MOST_TENSORS] = 0
        self.sent = False
        """Whether the trainer has it."""
        self._lent: weakref.ref[NDArray[np.uint8]] | None = None

    @property
    def free(self) -> bool:
        return (self._lent is None or self._lent() is None) and not self.memory[:MOST_TENSORS].any()

    def lend(self) -> torch.Tensor:
        """Its data, uint8 [size]; the block is in use as long as any tensor that shares the memory is there."""
        data = self.memory[HEAD:].numpy()
        self._lent = weakref.ref(data)
        return torch.from_numpy(data)

    def holds(self, tensor: torch.Tensor) -> bool:
        start = self.memory.data_ptr() + HEAD
        return start <= tensor.data_ptr() < start + self.size


_blocks: list[_Block] = []
"""A worker's own."""


def _free_block(size: int) -> _Block:
    size = 1 << max(size - 1, 4095).bit_length()  # Few sizes; pages that are never touched take no memory.
    for block in _blocks:
        if block.size == size and block.free:
            return block
    _blocks.append(_Block(len(_blocks), size))
    return _blocks[-1]


def _sent(value: Any, numbers: itertools.count[int]) -> Any:
    if isinstance(value, Mapping):
        return {key: _sent(inner, numbers) for key, inner in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_sent(inner, numbers) for inner in value))
    if type(value) in (list, tuple):
        return type(value)(_sent(inner, numbers) for inner in value)
    if not isinstance(value, torch.Tensor):
        return value
    block = next((one for one in _blocks if one.holds(value)), None)
    if block is None and value.nbytes <= SMALL and value.dtype in IN_NUMPY and not value.requires_grad:
        return _Small(value.numpy())
    if block is None or (flag := next(numbers)) >= MOST_TENSORS:
        return value
    block.memory[flag] = 1
    first, block.sent = not block.sent, True
    place = (value.data_ptr() - block.memory.data_ptr()) // value.element_size()
    memory = block.memory if first else None
    return _Sent(os.getpid(), block.number, memory, flag, value.dtype, tuple(value.shape), value.stride(), place)


@dataclass(frozen=True)
class _Small:
    """A tensor that is sent as bytes: shared memory, which is a file for each, takes longer."""

    values: NDArray[Any]

    def __reduce__(self) -> tuple[Any, ...]:
        return torch.from_numpy, (self.values,)


@dataclass(frozen=True)
class _Sent:
    """A tensor in a block on its way: unpickled, it is that tensor."""

    worker: int
    number: int
    memory: torch.Tensor | None
    """The block, the first time it is sent."""
    flag: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    place: int
    """Where in the block it begins, in elements."""

    def __reduce__(self) -> tuple[Any, ...]:
        fields = self.worker, self.number, self.memory, self.flag, self.dtype, self.shape, self.stride, self.place
        return _receive, fields


_received: dict[int, dict[int, torch.Tensor]] = {}
"""Worker -> its blocks by number, in the process that trains: mapped once."""


def _receive(
    worker: int,
    number: int,
    memory: torch.Tensor | None,
    flag: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    place: int,
) -> torch.Tensor:
    if memory is not None:
        running = {child.pid for child in multiprocessing.active_children()}
        for ended in [pid for pid in _received if pid not in running]:
            del _received[ended]  # Tensors that are still there keep their memory.
        _received.setdefault(worker, {})[number] = memory
    block = _received[worker][number].numpy()
    data = block[:]  # An array of its own: it goes with the last tensor that shares its memory.
    weakref.finalize(data, block.__setitem__, flag, 0)
    return torch.from_numpy(data).view(dtype).as_strided(shape, stride, place)
