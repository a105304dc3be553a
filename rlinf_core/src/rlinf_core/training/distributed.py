"""Processes and devices: who am I, what do I compute on, and how do we start and leave together.

Works under torchrun, and alone (`python -m rlinf_core.train`), where it makes a process group of one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from rlinf_core.errors import UserError

T = TypeVar("T")

SETUP_TIMEOUT = timedelta(hours=12)
"""How long ranks wait for rank 0 to prepare data; collectives in training keep the backend's own, shorter limit."""


def device() -> torch.device:
    """The device of this process: its CUDA device where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


class Processes:
    """The running process group."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.device = device()
        self._setup = dist.new_group(backend="gloo", timeout=SETUP_TIMEOUT)

    def mesh(self) -> DeviceMesh:
        """A one-dimensional mesh over all ranks."""
        return init_device_mesh(self.device.type, (self.size,), mesh_dim_names=("dp",))

    def decide(self, decision: Callable[[], T]) -> T:
        """Let rank 0 decide (or prepare files) and tell all ranks what came of it.

        The others wait as long as preparing data may take. A `UserError` on rank 0 is raised on every rank.
        """
        box: list[T | UserError | None] = [None]
        if self.rank == 0:
            try:
                box = [decision()]
            except UserError as error:
                box = [error]
        dist.broadcast_object_list(box, src=0, group=self._setup)
        if isinstance(box[0], UserError):
            raise box[0]
        return cast("T", box[0])

    def wait(self) -> None:
        """Wait until every rank is here."""
        dist.barrier(group=self._setup)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place."""
        dist.all_reduce(tensor)
        return tensor


@contextmanager
def processes() -> Iterator[Processes]:
    """Join the process group; leave it together, because gloo may abort when one rank leaves early."""
    here = device()
    if here.type == "cuda":
        torch.cuda.set_device(here)
    backend = "cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]  # torch's stubs leave it out
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    group = Processes()
    try:
        yield group
        group.wait()
    finally:
        dist.destroy_process_group()
