"""Flight records: what every rank was doing when the run hung, in `<run>/flight/`. Torch-free.

A rank that hangs makes all others wait until a collective takes longer than `trainer.timeout_seconds`. Shortly before
that, each rank (the one that hangs too) writes its step, its phase and the stacks of its threads. NCCL's own recorder
writes its last collectives to the same folder, for `python -m torch.distributed.flight_recorder.fr_trace`.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from rlinf_core.errors import RunError
from rlinf_core.process.watchdog import FOLDER, record_file, watchdog, write_record
from rlinf_core.terminal import warn

EARLIER = 0.9
"""Fraction of the timeout after which a rank writes its record: no collective has failed yet."""
COLLECTIVES = 2000
"""Number of last collectives that NCCL remembers."""
TIMED_OUT = re.compile(r"timed out|timeout", re.IGNORECASE)
BROKEN = re.compile(r"connection (closed|reset)|broken pipe|remote process exited|pair closure", re.IGNORECASE)
OF_A_COLLECTIVE = re.compile(r"gloo|nccl|c10d|store|waiting \d+ms", re.IGNORECASE)


def remember_collectives(folder: Path) -> None:
    """Make NCCL remember its last collectives and write them to a run's folder when one times out.

    Must be called before the process group is created; existing environment variables are kept.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(COLLECTIVES))
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", f"{folder.absolute() / FOLDER}/nccl_rank_")


class FlightRecorder:
    """Keeps track of what this rank is doing, and writes a record when that takes too long.

    Args:
        folder: The run's folder.
        rank: The rank of this process.
        timeout: `trainer.timeout_seconds`.
        beside_nccl: NCCL's own recorder writes to the same folder, which it does not create.
    """

    def __init__(self, folder: Path, rank: int, timeout: float, *, beside_nccl: bool = False) -> None:
        self._folder, self.rank, self._timeout = folder / FOLDER, rank, timeout
        self._beside_nccl = beside_nccl
        self._doing = (0, "the start", time.monotonic())
        self._over = threading.Event()

    @property
    def file(self) -> Path:
        """The file of this rank's records."""
        return record_file(self._folder, self.rank)

    def enter(self, phase: str, step: int | None = None) -> None:
        """Set what comes next; the step, from 1, stays the same unless given."""
        self._doing = (self._doing[0] if step is None else step, phase, time.monotonic())
        watchdog.enter(phase, self._doing[0])

    @property
    def phase(self) -> str:
        """What the rank is doing."""
        return self._doing[1]

    @property
    def step(self) -> int:
        """The step that the rank computes, from 1."""
        return self._doing[0]

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch this rank from a thread while the body runs."""
        thread = threading.Thread(target=self._watch, name="flight record", daemon=True)
        thread.start()
        if self._beside_nccl:
            self._folder.mkdir(parents=True, exist_ok=True)
        try:
            yield
        finally:
            self._over.set()
            thread.join()
        if self._beside_nccl:
            with contextlib.suppress(OSError):  # Not empty, or another rank was faster.
                self._folder.rmdir()

    def _watch(self) -> None:
        limit, written = EARLIER * self._timeout, None
        while not self._over.wait(limit / 40):
            step, phase, since = self._doing
            if time.monotonic() - since > limit and written != since:
                written = since
                self._write(step, phase, time.monotonic() - since)

    def _write(self, step: int, phase: str, seconds: float) -> None:
        head = f"rank {self.rank}, process {os.getpid()}, step {step}: {phase}, for {seconds:.0f} s"
        file = write_record(self._folder, self.rank, head)
        warn(f"{head}; its stack is in {file}")

    def explain(self, error: BaseException) -> RunError | None:
        """A clearer error if a collective timed out or another rank is gone; else None."""
        text = str(error)
        if not (isinstance(error, RuntimeError) and OF_A_COLLECTIVE.search(text)):
            return None
        if BROKEN.search(text):
            return RunError(
                f"rank {self.rank} lost the connection to another rank in step {self.step} ({self.phase}): that "
                "process has ended, or its machine is gone; its last message, if any, says why. The same "
                "command continues from the last checkpoint"
            )
        if not TIMED_OUT.search(text):
            return None
        return RunError(
            f"rank {self.rank} waited for the other ranks in step {self.step} ({self.phase}) for longer than "
            f"trainer.timeout_seconds = {self._timeout:g}: one of them hangs or is too slow. The files in "
            f"{self._folder} say where each of them was. The same command continues from the last checkpoint"
        )
