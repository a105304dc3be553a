"""Checkpoints of a run: written beside training, whole or not at all, in `<run>/checkpoints/step_000002000/`.

A checkpoint holds the shards that `torch.distributed.checkpoint` writes, under the module's own parameter names, and
`state.json`: step, position in the data, a tag of the layout, and size and hash of every file. Because every random
draw is keyed by (seed, epoch, position), the position is also the state of all random generators. The file `latest`
names the newest complete one, `best` the one with the best validation, where `runner.save_best` asks for it.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rlinf_core.contract.process_group import ProcessGroup
from rlinf_core.contract.run import RunConfig, Start
from rlinf_core.errors import UserError
from rlinf_core.training.checkpoint.staging import Staging
from rlinf_core.training.checkpoint.state import Position
from rlinf_core.training.checkpoint.writer import THREAD, CheckpointFolder, Retention, SaveError, Writers, restate, write_checkpoint

ASK_AGAIN = 0.2
"""Seconds between two looks at how long to wait."""
MOST_FAILURES = 2
"""Saves in a row that fail before the run ends: the disk may be emptied after the first."""


def forever() -> float:
    """Seconds left to wait where nothing hurries."""
    return math.inf


@dataclass(frozen=True)
class Saved:
    """How a save ended."""

    step: int
    path: Path
    """The checkpoint, where it lies or would lie."""
    best: bool
    """Whether it is the best one so far."""
    stall_seconds: float
    """How long training stood still for it, on this rank."""
    write_seconds: float = 0.0
    """How long it took to write."""
    bytes: int = 0
    """Its size, all ranks together; known on rank 0."""
    failure: str = ""
    """Why it was not written; empty: it was."""

    def __str__(self) -> str:
        """What to tell of it, on rank 0."""
        if self.failure:
            return f"step {self.step}: THE CHECKPOINT WAS NOT SAVED: {self.failure}"
        size = f"{self.bytes / 1e9:.2f} GB" if self.bytes >= 1e8 else f"{self.bytes / 1e6:.2f} MB"
        return (
            f"step {self.step}: saved {self.path}{' (the best validation so far)' * self.best}: "
            f"{size} in {self.write_seconds:.1f} s, training stood still for {self.stall_seconds:.2f} s"
        )


class Checkpoints:
    """Saves a run's checkpoints, one at a time, while training goes on. Made and called on every rank.

    Args:
        folder: Where they lie.
        group: All ranks.
        tensors: What every checkpoint holds; their memory is the run's for its whole life.
        in_background: Whether training goes on while a checkpoint is written. It then takes the memory of one copy of
            the shards; else saving waits, and copies nothing.
        last_good: The checkpoint that the run started from.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        group: ProcessGroup,
        tensors: Mapping[str, torch.Tensor],
        *,
        in_background: bool = True,
        last_good: str = "",
    ) -> None:
        self._folder, self._device, self._tensors = folder, group.device, dict(tensors)
        self._writers = Writers(group.rank)
        self._last_good, self._failures, self._why = last_good, 0, ""
        self._stall, self._left = 0.0, False
        self._done: list[Saved] = []
        self._pending: _Pending | None = None
        self._staging = Staging(tensors) if in_background else None
        self._untouched: BaseException | None = None
        self._touching = threading.Thread(target=self._touch, daemon=True)
        self._touching.start()

    @classmethod
    def of(cls, run: RunConfig, group: ProcessGroup, tensors: Mapping[str, torch.Tensor], start: Start) -> Checkpoints:
        """Those of a run, as its config says."""
        runner = run.runner
        retention = Retention(runner.keep_last, runner.keep_every)
        folder = CheckpointFolder(run.folder, run.checkpoints, retention, rename=runner.checkpoint_rename)
        last = start.checkpoint.name if start.checkpoint else ""
        return cls(folder, group, tensors, in_background=runner.async_save, last_good=last)

    def _touch(self) -> None:
        try:
            if self._staging is not None:
                _use(self._device)
                self._staging.touch()
        except BaseException as error:  # Raised again by the first save.
            self._untouched = error

    def save(self, position: Position, best: str = "", left: Callable[[], float] = forever) -> None:
        """Save; returns when the tensors may change. One that is still being written is waited for first.

        After a save that failed, the next one is waited for: all ranks then know at the same step how it ended.

        Args:
            position: Where the run stands.
            best: The checkpoint that is the best so far; empty: there is none.
            left: Seconds left to wait for the one before, asked again and again; without any, nothing is saved.

        Raises:
            UserError: It failed, and so had the one before.
        """
        started = time.perf_counter()
        if not self.wait(left):
            return
        self.wait_for_memory()
        tensors = self._staging.copy() if self._staging is not None else self._tensors
        self._pending = _Pending(self._device, self._folder, position, tensors, self._writers, best, self._last_good)
        if self._staging is None or self._failures:
            self.wait(left)
        stall = self._stall = time.perf_counter() - started
        if self._pending is None:
            self._done[-1] = replace(self._done[-1], stall_seconds=stall)
        else:
            self._pending.stall_seconds = stall
        if self._failures >= MOST_FAILURES:
            raise UserError(f"{self.failure()} It failed twice in a row, so the run ends here.")

    def wait_for_memory(self) -> None:
        """Wait until the memory for copies is there, which takes seconds from the start; a first save waits for it."""
        self._touching.join()
        if self._untouched is not None:
            raise self._untouched

    def failure(self) -> str:
        """Why the newest checkpoint is not there, and which one is; empty if it is."""
        if not self._failures:
            return ""
        return f"{self._folder.checkpoints} cannot take a checkpoint: {self._why}. {self._kept()} Make room there."

    def _kept(self) -> str:
        return f"{self._last_good} is the last good one." if self._last_good else "There is no earlier one."

    def finished(self) -> list[Saved]:
        """How saves ended of which that was not said before."""
        if self._pending is not None and not self._pending.thread.is_alive():
            self.wait()
        done, self._done = self._done, []
        return done

    def wait(self, left: Callable[[], float] = forever) -> bool:
        """Wait for the checkpoint that is being written, if any.

        Args:
            left: Seconds left to wait, asked again and again.

        Returns:
            Whether none is being written any more.
        """
        if self._pending is None:
            return True
        while self._pending.thread.is_alive():
            if (seconds := left()) <= 0:
                return False
            self._pending.thread.join(min(seconds, ASK_AGAIN))
        pending, self._pending = self._pending, None
        if pending.error is not None:
            raise pending.error
        if pending.failure:
            self._failures, self._why = self._failures + 1, pending.failure
        else:
            self._failures, self._last_good = 0, pending.path.name
        self._done.append(pending.saved())
        return True

    def finish(self, left: Callable[[], float] = forever, *, cut_short: bool = False) -> bool:
        """Wait for the checkpoint that is being written: it is the last one.

        Args:
            left: Seconds left to wait, asked again and again.
            cut_short: The run has to leave: what cannot be written is lost, and the checkpoint before counts.

        Returns:
            Whether none is being written any more.

        Raises:
            UserError: The run was not cut short, and its last checkpoint could not be written.
        """
        if self._left:
            return False
        pending = self._pending
        try:
            why = "" if self.wait(left) else "the time to leave had come"
        except Exception as error:
            if not cut_short:
                raise
            why = f"{type(error).__name__}: {error}"  # Others may have left already.
        if why:
            assert pending is not None
            self._left = True
            self._done.append(replace(pending.saved(), failure=f"{why}. {self._kept()}"))
        elif self._failures and not cut_short:
            raise UserError(f"{self.failure()} The same command then makes the steps after it again.")
        if self._staging is not None and not self._left:
            self._touching.join()
            self._staging.close()
        return not self._left

    def stall(self) -> dict[str, float]:
        """As a metric of the next step: for how many seconds training stood still at a save since the last call."""
        seconds, self._stall = self._stall, 0.0
        return {"save_stall_seconds": seconds} if seconds else {}

    def restate(self, position: Position, best: str) -> None:
        """Correct what the checkpoint of a position says of validations: one was made up for. Called on rank 0."""
        restate(self._folder, position, best)


class _Pending:
    """A checkpoint that is being written, by a thread that begins at once."""

    def __init__(
        self,
        device: torch.device,
        folder: CheckpointFolder,
        position: Position,
        tensors: Mapping[str, torch.Tensor],
        writers: Writers,
        best: str,
        before: str,
    ) -> None:
        self.path = folder.path(position.step)
        self.stall_seconds = 0.0
        self.failure = ""
        self.error: BaseException | None = None
        self._write_seconds, self._bytes = 0.0, 0
        self._device, self._folder, self._position = device, folder, position
        self._tensors, self._writers = tensors, writers
        self._best, self._before = best, before
        self.thread = threading.Thread(target=self._write, name=THREAD + self.path.name, daemon=True)
        self.thread.start()

    def _write(self) -> None:
        started = time.perf_counter()
        try:
            _use(self._device)
            self._bytes = write_checkpoint(
                self._folder, self._position, self._tensors, self._writers, best=self._best, before=self._before
            )
        except SaveError as error:
            self.failure = str(error)
        except BaseException as error:  # Raised again by the thread that waits.
            self.error = error
        self._write_seconds = time.perf_counter() - started

    def saved(self) -> Saved:
        """How it ended, once it has."""
        best = self._best == self.path.name
        times = {"stall_seconds": self.stall_seconds, "write_seconds": self._write_seconds}
        return Saved(self._position.step, self.path, best, bytes=self._bytes, failure=self.failure, **times)


def _use(device: torch.device) -> None:
    """What this thread does with CUDA, it does on the process's own device: threads begin on the first one."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
