"""The process group and the device of this process: joining, leaving, and decisions that all ranks share.

Works under torchrun and alone (`python -m rlinf_core.train`), where the process group has one member.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist

from rlinf_core.errors import UserError
from rlinf_core.process.watchdog import watchdog
from rlinf_core.torch_names import HashStore, PrefixStore, holders_of, set_gloo_timeout
from rlinf_core.training.distributed.network import choose_interface
from rlinf_core.training.distributed.open_files import allow_open_files, count_open_files
from rlinf_core.training.distributed.rendezvous import rendezvous
from rlinf_core.training.monitor.flight_recorder import remember_collectives

T = TypeVar("T")

SETUP_TIMEOUT = timedelta(hours=12)
"""How long ranks wait for one that prepares data, as long as its watchdog (`process.watchdog`) sees it work."""
FEW_WORKERS = 32
"""Workers of the data loader for which there should be open files; `rlinf validate` knows how many there are."""
SECONDS_TO_LEAVE = 5.0
TIMEOUT = 600.0
"""The default of `trainer.timeout_seconds`."""


def device(wanted: Literal["auto", "cpu"] = "auto") -> torch.device:
    """The device of this process: its own CUDA device, or the CPU if requested or if there is no CUDA device.

    Raises:
        UserError: There are more processes than CUDA devices on this machine.
    """
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    devices, processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes > devices:
        raise UserError(
            f"{processes} processes on this machine but {devices} CUDA devices: start torchrun with --nproc-per-node "
            f'{devices}, or set trainer.device = "cpu"'
        )
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Copy a batch to a device; copies from page-locked memory are asynchronous."""
    return {
        key: to_device(value, device) if isinstance(value, Mapping) else value.to(device, non_blocking=True)
        for key, value in batch.items()
    }


ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Variables with which a user configures torch's allocator of CUDA memory."""


def set_cuda_defaults() -> None:
    """Set what torch leaves at other defaults, before CUDA is used. A plugin or the environment may set it otherwise.

    - Memory in segments that grow: shapes change from step to step, and would leave gaps. A variable of `ALLOCATOR`
      that is set is respected.
    - No sums in bfloat16: splitting a matrix product along its inner dimension would add up its parts in bfloat16.
    - No cuDNN in attention: on H100 and H200 its backward pass with a mask can return NaN (pytorch #196678), and torch
      would prefer it to FlashAttention there.
    """
    if not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.enable_cudnn_sdp(False)


class Processes:
    """The running process group. All calls are made by the thread that trains.

    On the CPU, setup and training share one gloo group, and only their timeouts differ: another group would cost every
    rank a connection to every other.

    Args:
        device: The device of this process.
        timeout_seconds: How long ranks wait for one another in a collective of training.
    """

    def __init__(self, device: torch.device, timeout_seconds: float = TIMEOUT) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.device = device
        self._timeout = timedelta(seconds=timeout_seconds)

    def decide(self, decision: Callable[[], T]) -> T:
        """Let rank 0 decide (or prepare files), and return its result on every rank.

        The others wait for up to `SETUP_TIMEOUT`. A `UserError` on rank 0 is raised on every rank.
        """
        box: list[T | UserError | None] = [None]
        if self.rank == 0:
            try:
                box = [decision()]
            except UserError as error:
                box = [error]
        with self._patiently():
            dist.broadcast_object_list(box, src=0)
        if isinstance(box[0], UserError):
            raise box[0]
        return cast("T", box[0])

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in rank order; the same on every rank."""
        answers: list[T] = [value] * self.size
        with self._patiently():
            dist.all_gather_object(answers, value)
        return answers

    @contextmanager
    def first_on_each_machine(self) -> Iterator[None]:
        """Run the body first in one process per machine, and in the others once all of those have finished."""
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        if not first:
            self.wait()
        yield
        if first:
            self.wait()

    def any(self, flag: bool) -> bool:
        """Whether a flag is set on any rank; the same on every rank."""
        flags = torch.tensor(float(flag))
        dist.all_reduce(flags)
        return bool(flags)

    def wait(self) -> None:
        """Wait until every rank has made this call."""
        with self._patiently():
            dist.all_reduce(torch.zeros(1))  # Not a barrier: NCCL would compute that of a group that has both.

    def leave(self) -> None:
        """Wait for the other ranks, and end the group.

        gloo's thread may let go of a collective's tensor only after the collective has ended. If Python exits in that
        moment, the thread aborts the process (pytorch #179291), and a run that had finished would count as failed.
        """
        last = torch.zeros(1)
        with self._patiently():
            dist.all_reduce(last)
        until = time.monotonic() + SECONDS_TO_LEAVE
        while holders_of(last) > 1 and time.monotonic() < until:
            time.sleep(0.001)
        dist.destroy_process_group()

    @contextmanager
    def _patiently(self) -> Iterator[None]:
        """The body waits for other ranks for up to `SETUP_TIMEOUT`."""
        with watchdog.waiting():
            set_gloo_timeout(SETUP_TIMEOUT)
            try:
                yield
            finally:
                set_gloo_timeout(self._timeout)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place."""
        dist.all_reduce(tensor)
        return tensor


@contextmanager
def processes(
    wanted: Literal["auto", "cpu"] = "auto", *, timeout_seconds: float = TIMEOUT, folder: Path | None = None
) -> Iterator[Processes]:
    """Join the process group; leave it together, because gloo may abort when one rank leaves early.

    Args:
        wanted: See `device`.
        timeout_seconds: How long ranks wait for one another in a collective of training.
        folder: The run's folder, where NCCL writes its flight record if a collective takes longer; None: NCCL's
            default.
    """
    here = device(wanted)
    if here.type == "cuda":
        set_cuda_defaults()
        torch.cuda.set_device(here)
        if folder is not None:
            remember_collectives(folder)
    timeout = timedelta(seconds=timeout_seconds)
    backend = "cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        ranks = int(os.environ["WORLD_SIZE"])
        allow_open_files(count_open_files(ranks, copies=2, workers=FEW_WORKERS), ranks)
        if os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE"):
            choose_interface(os.environ, os.environ.get("MASTER_ADDR", ""))
        with watchdog.waiting():  # No longer than that.
            store, rank, size = rendezvous(timeout)
        watchdog.listen(PrefixStore("watchdog", store.clone()), rank, size)  # type: ignore[attr-defined]  # torch's stubs
    else:
        store, rank, size = HashStore(), 0, 1
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    group = Processes(here, timeout_seconds)
    try:
        yield group
    except BaseException:
        # The others may be in a collective: an orderly exit would break or block them before the error is reported.
        if group.size == 1:
            dist.destroy_process_group()
        raise
    group.leave()
