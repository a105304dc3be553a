"""Shared memory for the large tensors of a batch, which loader workers fill and the trainer reads in place.

A worker passes a tensor to the trainer through shared memory. That copies all its bytes unless the tensor already is in
shared memory, so `collate` should fill tensors from `batch_tensor`. New memory is slow: its pages are zeroed and mapped
one by one on first touch, in the worker and again in the trainer, which for video frames costs up to a third of the
decoding time. So blocks are reused by later batches: each tensor has a flag in the header of its block that is cleared
when the trainer frees the tensor, and a worker reuses a block once all its flags are cleared.

With pinning, an image is copied twice between the decoder and the device: into the batch, and into page-locked memory.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import multiprocessing
import os
import re
import shutil
import sys
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from rlinf_core.errors import UserError

HEAD = 4096
"""Header bytes before a block's data; each of the first `MOST_TENSORS` is 1 while the trainer holds that tensor."""
MOST_TENSORS = 64
"""Tensors of one block that are passed without a copy; torch copies further ones."""
SMALL = 2**16
"""Tensors of up to this many bytes are pickled by value."""
IN_NUMPY = (torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool)
KEPT = 2**28
"""Freed bytes that a worker keeps for its next reads, where glibc would return them to the system."""


def batch_tensor(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised CPU tensor for a batch, to be filled completely; in shared memory in loader workers."""
    if get_worker_info() is None:
        return torch.empty(tuple(shape), dtype=dtype)
    size = math.prod(shape) * dtype.itemsize
    return _free_block(size).lend()[:size].view(dtype).view(tuple(shape))


def hand_over(batch: Any) -> Any:
    """Prepare a worker's batch for sending: tensors from `batch_tensor` are sent without a copy."""
    return _sent(batch, itertools.count()) if get_worker_info() is not None else batch


def keep_memory() -> None:
    """Let this worker keep the memory of freed images for the next ones."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold, largest = -1, -3, 2**25
        libc.mallopt(trim_threshold, KEPT)
        libc.mallopt(mmap_threshold, largest)


SHORTAGE = re.compile(r"shared memory|bus error|No space left on device", re.IGNORECASE)
"""How torch and the system say that /dev/shm is full."""
SHARED = Path("/dev/shm")  # Where Linux keeps shared memory; Docker gives a container 64 MB of it.


def shared_memory_error(error: RuntimeError, size: int = 0) -> UserError | None:
    """The error to raise instead of torch's if workers have run out of shared memory; None for another error.

    Args:
        error: torch's error.
        size: Bytes that could not be allocated; 0: unknown.
    """
    if not SHORTAGE.search(str(error)):
        return None
    there = ""
    if SHARED.is_dir():
        disk = shutil.disk_usage(SHARED)
        there = f": {SHARED} has {disk.total / 1e6:,.0f} MB, of which {disk.free / 1e6:,.0f} MB are free"
    needs = f", and a block of {size / 1e6:,.1f} MB was needed; every worker holds several" if size else ""
    return UserError(
        f"the loader's workers are out of shared memory{there}{needs}. Give the container more (docker run "
        "--shm-size=16g, or --ipc=host; Kubernetes: an emptyDir with medium: Memory at /dev/shm), lower "
        "trainer.micro_batch_size, or set data.num_workers = 0, which needs none and is slower"
    )


class _Block:
    """A block of shared memory, in the worker that allocated it."""

    def __init__(self, number: int, size: int) -> None:
        self.number, self.size = number, size
        # As torch's own collate does; `share_memory_` of a new tensor would copy it first.
        try:
            storage = torch.UntypedStorage._new_shared(HEAD + size, device="cpu")  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise shared_memory_error(error, size) or error from error
        self.memory = torch.empty(0, dtype=torch.uint8).set_(storage)
        self.memory[:MOST_TENSORS] = 0
        self.sent = False
        """Whether the trainer has mapped it."""
        self._lent: weakref.ref[NDArray[np.uint8]] | None = None

    @property
    def free(self) -> bool:
        return (self._lent is None or self._lent() is None) and not self.memory[:MOST_TENSORS].any()

    def lend(self) -> torch.Tensor:
        """Its data, uint8 [size]; the block is in use as long as a tensor that shares the memory exists."""
        data = self.memory[HEAD:].numpy()
        self._lent = weakref.ref(data)
        return torch.from_numpy(data)

    def holds(self, tensor: torch.Tensor) -> bool:
        start = self.memory.data_ptr() + HEAD
        return start <= tensor.data_ptr() < start + self.size


_blocks: list[_Block] = []
"""The blocks of this worker."""


def _free_block(size: int) -> _Block:
    size = 1 << max(size - 1, 4095).bit_length()  # Powers of two; untouched pages take no memory.
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
        # Shared here, as sending would do: an error in the thread that sends is lost, and the trainer waits for ever.
        return value.share_memory_() if value.device.type == "cpu" else value  # type: ignore[no-untyped-call]
    block.memory[flag] = 1
    first, block.sent = not block.sent, True
    place = (value.data_ptr() - block.memory.data_ptr()) // value.element_size()
    memory = block.memory if first else None
    return _Sent(os.getpid(), block.number, memory, flag, value.dtype, tuple(value.shape), value.stride(), place)


@dataclass(frozen=True)
class _Small:
    """A tensor that is pickled by value: shared memory, a file per tensor, takes longer for small ones."""

    values: NDArray[Any]

    def __reduce__(self) -> tuple[Any, ...]:
        return torch.from_numpy, (self.values,)


@dataclass(frozen=True)
class _Sent:
    """A reference to a tensor in a block; unpickling returns the tensor."""

    worker: int
    number: int
    memory: torch.Tensor | None
    """The block, the first time it is sent."""
    flag: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    place: int
    """Offset in the block, in elements."""

    def __reduce__(self) -> tuple[Any, ...]:
        fields = self.worker, self.number, self.memory, self.flag, self.dtype, self.shape, self.stride, self.place
        return _receive, fields


_received: dict[int, dict[int, torch.Tensor]] = {}
"""In the training process: worker -> its blocks by number, each mapped once."""


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
            del _received[ended]  # Tensors that still exist keep their memory.
        _received.setdefault(worker, {})[number] = memory
    block = _received[worker][number].numpy()
    data = block[:]  # A new array, which is freed with the last tensor that shares its memory.
    weakref.finalize(data, block.__setitem__, flag, 0)
    return torch.from_numpy(data).view(dtype).as_strided(shape, stride, place)
