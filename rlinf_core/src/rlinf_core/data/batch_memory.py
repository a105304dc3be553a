"""Where the large tensors of a batch are made: in a loader worker, in the memory that takes them to the trainer.

A worker hands a tensor over by putting it into shared memory, which is a copy of all its bytes unless it lies there
already. So `collate` fills what it gets from here. Together with pinning, a picture is copied twice on its way from the
decoder to the device's own copy: into the batch, and into page-locked memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.utils.data import get_worker_info


def batch_tensor(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of a batch, on the CPU, to be filled wholly: what it holds is undefined."""
    if get_worker_info() is None:
        return torch.empty(tuple(shape), dtype=dtype)
    # As torch's own collate does; `share_memory_` of a new tensor would copy it first.
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize, device="cpu")  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=dtype).set_(storage, 0, tuple(shape))  # type: ignore[call-overload, no-any-return]
