"""Host memory for a copy of the state, reused from save to save, so that training can go on changing the original.

Training waits only for this copy. So the pages are allocated before the first save and locked if there is a CUDA
device, which then copies at the speed of the bus while the host waits only once.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Mapping
from contextlib import suppress

import torch
from torch.distributed.tensor import DTensor

from rlinf_core.torch_names import shard_like
from rlinf_core.training.state.fsdp import local_shard

ALIGNMENT = 64
"""Bytes: a cache line."""


class Staging:
    """Memory for one copy of this rank's shards.

    Args:
        tensors: The tensors to copy, by name (local shards of DTensors). They must keep their memory.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        shards = {name: local_shard(tensor) for name, tensor in tensors.items()}
        offsets, total = {}, 0
        for name, shard in shards.items():
            offsets[name], total = total, total + -(-shard.nbytes // ALIGNMENT) * ALIGNMENT
        self._memory = mmap.mmap(-1, max(total, 1))
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # Kernels without huge pages.
                self._memory.madvise(mmap.MADV_HUGEPAGE)  # Fewer page-table look-ups.
        self._locked = False
        self._stream: torch.cuda.Stream | None = None
        devices = {shard.device for shard in shards.values() if shard.is_cuda}
        if devices:
            self._stream = torch.cuda.Stream(devices.pop())  # type: ignore[no-untyped-call]
        # Looked up once: for a thousand tensors, that takes longer than a save should.
        self._shards, self._buffers = list(shards.values()), []
        self._copies = {}
        for name, shard in shards.items():
            # Each buffer has its own storage: saving a tensor writes its whole storage.
            buffer = (
                torch.frombuffer(self._memory, dtype=shard.dtype, count=shard.numel(), offset=offsets[name])
                if shard.numel()
                else torch.empty(0, dtype=shard.dtype)
            )
            self._buffers.append(buffer.view(shard.shape))
            self._copies[name] = _like(tensors[name], self._buffers[-1])

    def touch(self) -> None:
        """Allocate the pages, and lock them if there is a CUDA device; may run while training."""
        whole = torch.frombuffer(self._memory, dtype=torch.uint8)
        whole.zero_()
        if self._stream is not None:
            error = torch.cuda.cudart().cudaHostRegister(whole.data_ptr(), whole.nbytes, 0)  # type: ignore[no-untyped-call]
            if int(error):
                raise RuntimeError(f"cudaHostRegister of {whole.nbytes} bytes: error {int(error)}")
            self._locked = True

    def copy(self) -> dict[str, torch.Tensor]:
        """Copy the current values, and wait for the copy.

        Returns:
            The tensors on the CPU, valid until the next call; DTensors stay DTensors over the same mesh.
        """
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            for buffer, shard in zip(self._buffers, self._shards, strict=True):
                buffer.copy_(shard, non_blocking=True)
        if self._stream is not None:
            self._stream.synchronize()
        return self._copies

    def close(self) -> None:
        """Unlock the pages; later copies are slower."""
        if self._locked:
            self._locked = False
            address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
            torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]


def _like(tensor: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """The buffer, as a DTensor with the tensor's mesh and placement if that is one, though on another device."""
    return shard_like(tensor, buffer) if isinstance(tensor, DTensor) else buffer
