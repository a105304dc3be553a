"""The trainer's side of a tracker: starts its process, and signals the end of the run.

The tracker's process follows `<run>/metrics.jsonl` and `<run>/evaluations` by itself, so that logging a step costs the
trainer nothing: no queue can fill, and no tracker can block a step, end a run or lose a step, whatever it does.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlinf_core import UserError
from rlinf_plugins_trackers.memory import FOLDER, Job

SECONDS_BETWEEN_LOOKS = 5.0
"""How often a step looks whether the tracker's process has ended."""
SECONDS_TO_OPEN = 60.0
"""How long a run waits at its start for a tracker to open its run; then it starts without waiting any longer."""
SECONDS_AFTER_A_SIGNAL = 3.0
"""How long a run that was asked to stop waits for a tracker: schedulers and torchrun kill it soon."""


class TrackerLogger:
    """A tracker in a process of its own."""

    def __init__(self, job: Job, close_timeout: float) -> None:
        """Start the process, and wait until the tracker has opened its run.

        Args:
            job: What to log, and how.
            close_timeout: How long the tracker may take to finish, in seconds.

        Raises:
            UserError: The tracker cannot open its run: it has no login, for example.
        """
        self._job, self._close_timeout = job, close_timeout
        self._log = Path(job.folder) / FOLDER / f"{job.type}.log"
        self._looked = time.monotonic()
        self._process = start_process(job)
        if answer := _read_answer(self._process, SECONDS_TO_OPEN):
            self._raise_if_failed(answer)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """The process reads the step from the run's folder; look now and then whether it still does."""
        now = time.monotonic()
        if now - self._looked >= SECONDS_BETWEEN_LOOKS:
            self._looked = now
            if self._process.poll() is not None:
                self._raise_if_failed(_read_answer(self._process, 0.0))

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """The process reads it from the run's folder."""

    def message(self, text: str) -> None:
        """Messages are for people at the console."""

    def close(self, error: BaseException | None) -> None:
        """Let the tracker finish its run.

        Raises:
            UserError: It failed, or took longer than `close_timeout`.
        """
        seconds = self._close_timeout
        interrupted = isinstance(error, KeyboardInterrupt)
        if interrupted:
            seconds = min(seconds, SECONDS_AFTER_A_SIGNAL)
        with suppress(BrokenPipeError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps({"failed": error is not None}).encode() + b"\n")
            self._process.stdin.close()
        answer = _read_answer(self._process, seconds)
        if answer is None and interrupted and self._process.poll() is None:
            return  # It goes on by itself, for `close_timeout` at most.
        if answer is None and self._process.poll() is None:
            stop(self._process)
            raise UserError(
                f"it had not finished {seconds:g} s after the end of the run "
                f"(loggers.{self._job.type}.close_timeout) and was stopped; "
                f"`rlinf track {self._job.folder} {self._job.type}` logs what is missing"
            )
        self._raise_if_failed(answer)

    def _raise_if_failed(self, answer: Mapping[str, Any] | None) -> None:
        if answer is None or "error" in answer:
            what = answer["error"] if answer else f"its process ended with code {self._process.poll()}"
            raise UserError(f"{what} (its output: {self._log})")


def start_process(job: Job) -> subprocess.Popen[bytes]:
    """Start the process of a tracker.

    It has a session of its own: Ctrl-C and signals to the run's processes do not reach it. If the run's process dies,
    it logs the last steps and ends.
    """
    # -P: modules of the current folder are not imported by accident.
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "rlinf_plugins_trackers.follow"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.write(job.to_json())
        process.stdin.flush()
    return process


def stop(process: subprocess.Popen[bytes]) -> None:
    """Kill the process of a tracker with the processes that it has started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read_answer(process: subprocess.Popen[bytes], seconds: float) -> Mapping[str, Any] | None:
    """The next answer of the process; None if it gives none in time or has ended without one."""
    assert process.stdout is not None
    until, line = time.monotonic() + seconds, b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, until - time.monotonic()))
        if not ready:
            return None
        if not (read := os.read(process.stdout.fileno(), 1)):
            process.wait()
            return None
        line += read
    answer: Mapping[str, Any] = json.loads(line)
    return answer
