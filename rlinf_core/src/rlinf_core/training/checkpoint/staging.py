"""Copies of the state that training goes on changing: in the host's memory, in place from one save to the next.

Copying is all that training waits for at a save, so the pages are there before the first one and, where there is a
CUDA device, locked: it copies at the speed of the bus, and the host waits once.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Mapping
from contextlib import suppress

import torch
from torch.distributed.tensor import DTensor

from rlinf_core.torch_names import shard_like
from rlinf_core.training.fsdp import local_shard

ALIGNMENT = 64
"""Bytes; a cache line."""


class Staging:
    """Memory for one copy of this rank's shards.

    Args:
        tensors: What will be copied, by name; DTensors by their local shards. They keep their memory.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        shards = {name: local_shard(tensor) for name, tensor in tensors.items()}
        offsets, total = {}, 0
        for name, shard in shards.items():
            offsets[name], total = total, total + -(-shard.nbytes // ALIGNMENT) * ALIGNMENT
        self._memory = mmap.mmap(-1, max(total, 1))
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # Kernels without them.
                self._memory.madvise(mmap.MADV_HUGEPAGE)  # Copying looks up fewer pages.
        self._locked = False
        self._stream: torch.cuda.Stream | None = None
        devices = {shard.device for shard in shards.values() if shard.is_cuda}
        if devices:
            self._stream = torch.cuda.Stream(devices.pop())  # type: ignore[no-untyped-call]
        # All once: of a thousand tensors, asking for shards takes longer than the save may.
        self._shards, self._buffers = list(shards.values()), []
        self._copies = {}
        for name, shard in shards.items():
            # Each a storage of its own: who writes a tensor writes the whole of its storage.
            buffer = (
                torch.frombuffer(self._memory, dtype=shard.dtype, count=shard.numel(), offset=offsets[name])
                if shard.numel()
                else torch.empty(0, dtype=shard.dtype)
            )
            self._buffers.append(buffer.view(shard.shape))
            self._copies[name] = _like(tensors[name], self._buffers[-1])

    def touch(self) -> None:
        """Have the operating system provide the pages, and lock them for a CUDA device; may run beside training."""
        whole = torch.frombuffer(self._memory, dtype=torch.uint8)
        whole.zero_()
        if self._stream is not None:
            error = torch.cuda.cudart().cudaHostRegister(whole.data_ptr(), whole.nbytes, 0)  # type: ignore[no-untyped-call]
            if int(error):
                raise RuntimeError(f"cudaHostRegister of {whole.nbytes} bytes: error {int(error)}")
            self._locked = True

    def copy(self) -> dict[str, torch.Tensor]:
        """Copy the values of now, and wait until that is done.

        Returns:
            The same tensors on the CPU, valid until the next call; DTensors are DTensors over the same mesh.
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
        """Unlock the pages; a later copy is slower."""
        if self._locked:
            self._locked = False
            address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
            torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]


def _like(tensor: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """The buffer as a shard of what the tensor is a shard of, though it lives elsewhere than the mesh."""
    return shard_like(tensor, buffer) if isinstance(tensor, DTensor) else buffer
