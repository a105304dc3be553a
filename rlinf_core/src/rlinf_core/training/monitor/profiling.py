"""`runner.profile`: a trace of a few steps for chrome://tracing or Perfetto, written by rank 0."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

FOLDER = "profile"


class Profile:
    """Records the steps in `runner.profile`; does nothing if it is empty.

    Args:
        folder: The run's folder.
        steps: First and last step to record, from 1; empty: none.
        device: The device that computes the steps.
        log: Sends a line to the loggers.
    """

    def __init__(self, folder: Path, steps: Sequence[int], device: torch.device, log: Callable[[str], None]) -> None:
        self._steps, self._device, self._log = tuple(steps), device, log
        self._file = folder / FOLDER / f"steps_{'_'.join(f'{step:09d}' for step in steps)}.json"
        self._recorder: torch.profiler.profile | None = None

    def before(self, step: int) -> None:
        """Called before each step: starts recording at the first one."""
        if not self._steps or step != self._steps[0]:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        else:  # PyTorch's tracer logs an error (level 4, the highest) if there is no GPU.
            os.environ.setdefault("KINETO_LOG_LEVEL", "5")
        self._recorder = torch.profiler.profile(activities=activities, acc_events=True)
        self._recorder.start()

    def after(self, step: int) -> None:
        """Called after each step was started: ends recording at the last one."""
        if self._recorder is not None and step >= self._steps[1]:
            self.close()

    def close(self) -> None:
        """Write the trace, even if the run ends before the last step to record."""
        if self._recorder is None:
            return
        recorder, self._recorder = self._recorder, None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # The device may be a step behind.
        recorder.stop()
        self._file.parent.mkdir(exist_ok=True)
        aside = self._file.with_name(f".{self._file.name}")
        recorder.export_chrome_trace(str(aside))
        aside.replace(self._file)
        self._log(f"step {self._steps[1]}: the trace of steps {self._steps[0]} to {self._steps[1]} is {self._file}")
