"""The train loader: micro batches, made in worker processes.

`sampling` and `mixture`, or in chunked order `chunked_sampling`, determine which rows they contain.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader

from rlinf_core.contract.policy import PolicyConfig
from rlinf_core.data.batch_memory import hand_over, keep_memory, shared_memory_error
from rlinf_core.data.loading.chunked_batches import ChunkedMicroBatches
from rlinf_core.data.loading.chunked_sampling import Chunks
from rlinf_core.data.loading.micro_batches import MicroBatches
from rlinf_core.data.loading.mixture import Source
from rlinf_core.data.loading.sampling import Batching
from rlinf_core.data.sample import Batch
from rlinf_core.data.worker_sockets import place_sockets
from rlinf_core.errors import RunError, UserError
from rlinf_core.terminal import replace_unprintable


class TrainLoader(DataLoader[Any]):
    """A `DataLoader` of micro batches that raises the errors that its workers return, and says how one died."""

    pins = False
    """Whether to copy batches that are assembled in this process to page-locked memory."""
    _processes: Sequence[BaseProcess] = ()

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Micro batches, in order."""
        batches = self.dataset
        if isinstance(batches, ChunkedMicroBatches) and batches.parts > 1:
            # torch assigns item i to worker i % num_workers: part i % parts always comes from the same worker.
            for parts in itertools.batched(self._items(), batches.parts):
                batch = batches.join(parts)
                yield _pinned(batch) if self.pins else batch
        else:
            yield from self._items()

    def _items(self) -> Iterator[Any]:
        others = {process.pid for process in multiprocessing.active_children()}
        items = super().__iter__()
        if started := [process for process in multiprocessing.active_children() if process.pid not in others]:
            self._processes = started  # Workers persist: later iterations start none.
        while True:
            try:
                item = next(items, None)
            except RuntimeError as error:  # Also how torch reports a worker that a bus error has ended.
                raise shared_memory_error(error) or self._dead_worker() or error from error
            if item is None:
                return
            if isinstance(item, UserError | RunError):
                raise item
            yield item

    def _dead_worker(self) -> RunError | None:
        """The message about a worker that has ended by itself, if one has; a restart goes on from the last save."""
        for worker in self._processes:
            code = worker.exitcode
            if code is None or code == -signal.SIGTERM:  # torch ends the others by SIGTERM.
                continue
            which = f"worker process {worker.pid} of the loader, one of {len(self._processes)},"
            if code == -signal.SIGKILL:
                return RunError(
                    f"{which} was killed (SIGKILL), as Linux and containers do when memory runs out; `dmesg` or the "
                    "container's events say so. Lower data.num_workers or trainer.micro_batch_size, or give the "
                    "machine or container more memory"
                )
            how = f"crashed ({signal.Signals(-code).name})" if code < 0 else f"has ended with exit code {code}"
            return RunError(
                f"{which} {how}, in code that reads, decodes or transforms samples. With data.num_workers = 0 and "
                "PYTHONFAULTHANDLER=1 the same happens in the training process, which shows where"
            )
        return None


def build_train_loader(
    sources: Sequence[Source],
    policy: PolicyConfig,
    batching: Batching,
    steps: tuple[int, int],
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
    chunks: Chunks | None = None,
) -> TrainLoader:
    """A rank's micro batches of the steps from `steps[0]` up to `steps[1] - 1`, in the order of use.

    Args:
        sources: The datasets with their training rows; of several, batches hold each sample's under `SOURCE`.
        policy: Draws each sample's random numbers and collates.
        batching: Sizes, ranks and seed.
        steps: Finished steps of the run, counted over all epochs, and the steps of the whole run.
        num_workers: Processes that read ahead; 0: batches are read when asked for.
        pin_memory: Whether batches are put into page-locked memory, for copies to a GPU that do not wait.
        chunks: Take rows in the chunked order; None: in random order.

    Raises:
        UserError: The batch sizes or streams do not divide evenly, the rows do not fill a step, or (while iterating) a
            row cannot be read.
        RunError: While iterating, storage stays away.
    """
    parts = num_workers if chunks and num_workers > 1 else 1
    batches = (
        ChunkedMicroBatches(sources, policy, batching, chunks, parts)
        if chunks
        else MicroBatches(sources, policy, batching)
    )
    scale = batches.accumulation * parts
    loader = TrainLoader(
        batches,
        sampler=range(steps[0] * scale, steps[1] * scale),
        batch_size=None,
        collate_fn=hand_over,
        num_workers=num_workers,
        multiprocessing_context=_worker_context() if num_workers else None,
        worker_init_fn=_become_worker if num_workers else None,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory and parts == 1,  # Parts are pinned after they are joined.
        generator=torch.Generator(),  # Otherwise the loader would advance the process's global generator.
    )
    loader.pins = pin_memory
    return loader


def _worker_context() -> Any:
    """Fork workers from a server that has imported this module and has no threads: they start quickly and inherit no
    lock or decoder of the training process.
    """
    context = multiprocessing.get_context("forkserver")
    place_sockets("set data.num_workers = 0")
    context.set_forkserver_preload([__name__])
    # If a scheduler's SIGTERM ended the server, its workers would end too. Workers inherit the blocked signal.
    resource_tracker.ensure_running()  # Starting the tracker later would unblock the signal.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def _become_worker(_: int) -> None:
    replace_unprintable((sys.stdout, sys.stderr))
    keep_memory()
    _leave_signals_to_the_run()
    threading.Thread(target=_end_with_the_run, daemon=True).start()


def _end_with_the_run() -> None:
    """End when the training process ends, even by SIGKILL. torch's workers watch their parent, which here is the fork
    server, and that one waits for them.
    """
    if run := multiprocessing.parent_process():
        run.join()
        os._exit(1)


def _leave_signals_to_the_run() -> None:
    """Obey only the training process. Ctrl-C and a scheduler's SIGTERM also reach the workers, but a run that is asked
    to stop needs them until its step is done.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return  # macOS, where no scheduler signals whole process groups.
    # SIGTERM is blocked in this thread and all that it starts; one thread receives it and checks the sender.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey_the_run, daemon=True).start()


def _obey_the_run() -> None:
    run = multiprocessing.parent_process()
    while run and signal.sigwaitinfo({signal.SIGTERM}).si_pid != run.pid:
        pass
    os._exit(1)


def _pinned(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _pinned(inner) for key, inner in value.items()}
    return value.pin_memory() if isinstance(value, torch.Tensor) else value
