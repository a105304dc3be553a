"""One side's training in this process: a few steps to warm up, then timed ones, then profiled ones.

Every side trains the same weights on the same batches: those that rlinf's loader makes, kept by the job `record`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from text_sft.job import MODEL, PROFILED, WARM_UP, Job
from text_sft.ours import recorded, train, write_model
from text_sft.peers import SIDES
from text_sft.profile import Profile


class Clock:
    """The time at the end of every optimizer step, whoever's optimizer it is; profiles the last steps."""

    def __init__(self, job: Job) -> None:
        self.wall: list[float] = []
        self.processor: list[float] = []
        self.profile = Profile(width=MODEL["hidden_size"], vocabulary=job.vocabulary)
        self._job = job

    def __call__(self, optimizer: Optimizer, arguments: Any, options: Any) -> None:
        """Called by torch after a step."""
        self.wall.append(time.perf_counter())
        self.processor.append(time.process_time())
        if len(self.wall) == WARM_UP + self._job.steps:
            self.profile.start()
        elif len(self.wall) == self._job.all_steps:
            self.profile.stop(steps=PROFILED)

    def seconds(self, times: list[float]) -> float:
        """What the timed steps took, what happens between steps included."""
        return times[WARM_UP + self._job.steps - 1] - times[WARM_UP - 1]


def run_job(job: Job) -> dict[str, Any]:
    """Do it; returns what was measured."""
    torch.set_num_threads(1)
    if job.side == "record":
        return _record(job)
    clock = Clock(job)
    hook = register_optimizer_step_post_hook(clock)
    losses = _training(job)()
    hook.remove()
    if len(clock.wall) != job.all_steps or torch.get_num_threads() != 1:
        raise AssertionError(f"{len(clock.wall)} of {job.all_steps} steps, on {torch.get_num_threads()} threads")
    return {
        "wall_seconds": clock.seconds(clock.wall),
        "processor_seconds": clock.seconds(clock.processor),
        "first_loss": losses[0],
        **clock.profile.found,
    }


def _training(job: Job) -> Callable[[], list[float]]:
    """Trains, and returns the loss of every step."""
    if job.side == "rlinf":
        return lambda: train(job)
    return lambda: SIDES[job.side](job)


def _record(job: Job) -> dict[str, Any]:
    """Write the weights, unless they are there, and the batches; returns what is in the timed ones."""
    if not job.model.exists():
        write_model(job)
    batches = recorded(job)
    torch.save(batches, job.batches)
    timed = batches[WARM_UP : WARM_UP + job.steps]
    return {
        "tokens": sum(int(one["document_lengths"][:, :-1].sum()) for one in timed),
        "trained": sum(int(one["trained"].sum()) for one in timed),
        "texts": sum(int((one["document_lengths"][:, :-1] > 0).sum()) for one in timed),
    }
