"""Checkpoints of a run, written atomically while training continues, in `<run>/checkpoints/step_000002000/`.

A checkpoint holds the shards that `torch.distributed.checkpoint` writes, under the module's own parameter names, and
`state.json`: step, position in the data, a hash of the layout, and size and hash of every file. Because every random
draw is keyed by (seed, epoch, position), the position is also the state of all random generators. The file `latest`
names the newest complete checkpoint; with `runner.save_best`, the file `best` names the one with the best validation.
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
from rlinf_core.process.watchdog import watchdog
from rlinf_core.training.checkpoint.image_files import FILE as IMAGE_FILES
from rlinf_core.training.checkpoint.staging import Staging
from rlinf_core.training.checkpoint.state import Position, statistics_name
from rlinf_core.training.checkpoint.writer import (
    THREAD,
    CheckpointFolder,
    Own,
    Retention,
    SaveError,
    Writers,
    restate,
    write_checkpoint,
)

ASK_AGAIN = 0.2
"""Seconds between two calls of `left`, which says how long to wait."""
MOST_FAILURES = 2
"""Failed saves in a row that end the run: after the first, somebody may free disk space."""


def forever() -> float:
    """No limit on the seconds left to wait."""
    return math.inf


@dataclass(frozen=True)
class Saved:
    """The outcome of a save."""

    step: int
    path: Path
    """Path of the checkpoint, whether it was written or not."""
    best: bool
    """Whether it is the best one so far."""
    stall_seconds: float
    """How long training was paused for it, on this rank."""
    write_seconds: float = 0.0
    """How long it took to write."""
    bytes: int = 0
    """Its size over all ranks; known on rank 0."""
    failure: str = ""
    """Why it was not written; empty if it was."""

    def __str__(self) -> str:
        """The line to report, on rank 0."""
        if self.failure:
            return f"step {self.step}: THE CHECKPOINT WAS NOT SAVED: {self.failure}"
        size = f"{self.bytes / 1e9:.2f} GB" if self.bytes >= 1e8 else f"{self.bytes / 1e6:.2f} MB"
        return (
            f"step {self.step}: saved {self.path}{' (the best validation so far)' * self.best}: "
            f"{size} in {self.write_seconds:.1f} s, training was paused for {self.stall_seconds:.2f} s"
        )


class Checkpoints:
    """Saves a run's checkpoints, one at a time, while training continues. Created and called on every rank.

    Args:
        folder: Where checkpoints are written, and which are kept.
        group: All ranks.
        tensors: The content of every checkpoint; the tensors must keep their memory for the whole run.
        in_background: Whether training continues while a checkpoint is written, which needs memory for one copy of
            the shards; if not, `save` waits and copies nothing.
        last_good: Name of the checkpoint that the run started from.
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
        self._own = Own(loaded=last_good)
        self._stall, self._left = 0.0, False
        self._done: list[Saved] = []
        self._pending: _Pending | None = None
        self._staging = Staging(tensors) if in_background else None
        self._untouched: BaseException | None = None
        self._touching = threading.Thread(target=self._touch, daemon=True)
        self._touching.start()

    @classmethod
    def of(cls, run: RunConfig, group: ProcessGroup, tensors: Mapping[str, torch.Tensor], start: Start) -> Checkpoints:
        """The checkpoints of a run, as configured in `[runner]`."""
        runner = run.runner
        retention = Retention(runner.keep_last, runner.keep_every)
        # Read now, as the trainer uses them: whatever becomes of the run's files, checkpoints hold what they need.
        statistics = [source.statistics for source in run.sources if (run.folder / source.statistics).exists()]
        contents = {statistics_name(file): (run.folder / file).read_bytes() for file in statistics if not group.rank}
        if not group.rank and (run.folder / IMAGE_FILES).exists():
            contents[IMAGE_FILES] = (run.folder / IMAGE_FILES).read_bytes()
        folder = CheckpointFolder(run.folder, run.checkpoints, retention, runner.checkpoint_rename, contents)
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
        """Save; returns when the tensors may change. A save that is still running is waited for first.

        After a failed save, the next one is waited for, so that all ranks learn its outcome at the same step.

        Args:
            position: The run's position.
            best: The best checkpoint so far; empty if there is none.
            left: Seconds left to wait for the previous save, called repeatedly; if it runs out, nothing is saved.

        Raises:
            UserError: This save and the one before it failed.
        """
        started = time.perf_counter()
        if not self.wait(left):
            return
        self.wait_for_memory()
        tensors = self._staging.copy() if self._staging is not None else self._tensors
        self._pending = _Pending(self._device, self._folder, position, tensors, self._writers, best, self._own)
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
        """Wait until the memory for copies is allocated, which takes some seconds; the first save waits for it."""
        self._touching.join()
        if self._untouched is not None:
            raise self._untouched

    def failure(self) -> str:
        """Why the newest checkpoint was not saved, and which one was last; empty if the newest save succeeded."""
        if not self._failures:
            return ""
        return f"cannot save a checkpoint to {self._folder.checkpoints}: {self._why}. {self._kept()} Make room there."

    def _kept(self) -> str:
        return f"{self._last_good} is the last good one." if self._last_good else "There is no earlier one."

    def finished(self) -> list[Saved]:
        """Saves that finished or failed since the last call."""
        if self._pending is not None and not self._pending.thread.is_alive():
            self.wait()
        done, self._done = self._done, []
        return done

    def wait(self, left: Callable[[], float] = forever) -> bool:
        """Wait for the running save, if any.

        Args:
            left: Seconds left to wait, called repeatedly.

        Returns:
            Whether no save is running any more.
        """
        if self._pending is None:
            return True
        with watchdog.waiting():
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
            self._own = self._own._replace(made=self._own.made | {pending.path.name})
        self._done.append(pending.saved())
        return True

    def finish(self, left: Callable[[], float] = forever, *, cut_short: bool = False) -> bool:
        """Wait for the run's last save.

        Args:
            left: Seconds left to wait, called repeatedly.
            cut_short: Whether the run has to exit early: a save that fails or does not finish in time is then
                abandoned, and the previous checkpoint counts.

        Returns:
            Whether no save is running any more.

        Raises:
            UserError: The last checkpoint could not be written, and the run was not cut short.
        """
        if self._left:
            return False
        pending = self._pending
        try:
            why = "" if self.wait(left) else "the run had to exit before it was written"
        except Exception as error:
            if not cut_short:
                raise
            why = f"{type(error).__name__}: {error}"  # Other ranks may have exited already.
        if why:
            assert pending is not None
            self._left = True
            self._done.append(replace(pending.saved(), failure=f"{why}. {self._kept()}"))
        elif self._failures and not cut_short:
            raise UserError(f"{self.failure()} The same command then repeats the steps after it.")
        if self._staging is not None and not self._left:
            self._touching.join()
            self._staging.close()
        return not self._left

    def stall(self) -> dict[str, float]:
        """Metric `save_stall_seconds`: how long a save paused training since the last call; empty if it did not."""
        seconds, self._stall = self._stall, 0.0
        return {"save_stall_seconds": seconds} if seconds else {}

    def restate(self, position: Position, best: str) -> None:
        """Record a validation in the checkpoint of a position that was saved before it. Called on rank 0."""
        restate(self._folder, position, best)


class _Pending:
    """A running save; its thread starts at once."""

    def __init__(
        self,
        device: torch.device,
        folder: CheckpointFolder,
        position: Position,
        tensors: Mapping[str, torch.Tensor],
        writers: Writers,
        best: str,
        own: Own,
    ) -> None:
        self.path = folder.path(position.step)
        self.stall_seconds = 0.0
        self.failure = ""
        self.error: BaseException | None = None
        self._write_seconds, self._bytes = 0.0, 0
        self._device, self._folder, self._position = device, folder, position
        self._tensors, self._writers = tensors, writers
        self._best, self._own = best, own
        self.thread = threading.Thread(target=self._write, name=THREAD + self.path.name, daemon=True)
        self.thread.start()

    def _write(self) -> None:
        started = time.perf_counter()
        try:
            _use(self._device)
            with watchdog.thread(f"saving {self.path}"):
                self._bytes = write_checkpoint(
                    self._folder, self._position, self._tensors, self._writers, best=self._best, own=self._own
                )
        except SaveError as error:
            self.failure = str(error)
        except BaseException as error:  # Raised again by the thread that waits.
            self.error = error
        self._write_seconds = time.perf_counter() - started

    def saved(self) -> Saved:
        """The outcome, once the thread has finished."""
        best = self._best == self.path.name
        times = {"stall_seconds": self.stall_seconds, "write_seconds": self._write_seconds}
        return Saved(self._position.step, self.path, best, bytes=self._bytes, failure=self.failure, **times)


def _use(device: torch.device) -> None:
    """Select the process's CUDA device in this thread: threads start with the first device."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
