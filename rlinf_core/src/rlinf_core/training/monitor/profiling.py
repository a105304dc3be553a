"""`runner.profile`: a trace of some steps, for chrome://tracing or Perfetto, written by rank 0."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

FOLDER = "profile"


class Profile:
    """Records the steps that `runner.profile` names; does nothing where it names none.

    Args:
        folder: The run's.
        steps: The first and the last step to record, from 1; empty: none.
        device: What the steps compute on.
        log: Sends a line to the loggers.
    """

    def __init__(self, folder: Path, steps: Sequence[int], device: torch.device, log: Callable[[str], None]) -> None:
        self._steps, self._device, self._log = tuple(steps), device, log
        self._file = folder / FOLDER / f"steps_{'_'.join(f'{step:09d}' for step in steps)}.json"
        self._recorder: torch.profiler.profile | None = None

    def before(self, step: int) -> None:
        """The step with this number comes next."""
        if not self._steps or step != self._steps[0]:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        else:  # PyTorch's tracer calls it an error that there is no GPU; its levels end with errors, 4.
            os.environ.setdefault("KINETO_LOG_LEVEL", "5")
        self._recorder = torch.profiler.profile(activities=activities, acc_events=True)
        self._recorder.start()

    def after(self, step: int) -> None:
        """The step with this number was computed, or is being."""
        if self._recorder is not None and step >= self._steps[1]:
            self.close()

    def close(self) -> None:
        """Write what was recorded, also if the run ends before the last step that is wanted."""
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
