"""One side's training in this process: a few steps to warm up, then timed ones, then profiled ones.

Every side trains the same weights on the same batches: those that rlinf's loader makes, kept by the job `record`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from text_sft.profile import Profile

WARM_UP, PROFILED = 2, 2
"""Steps before the timed ones, and after them."""
DATA = Path(__file__).parents[2] / "examples" / "data" / "text_plans"
MODEL: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tie_word_embeddings": True,
}
LENGTH = 256
"""Tokens of a text or a pack at most."""


@dataclass(frozen=True)
class Job:
    """What a process does; it finds and leaves files in `folder`."""

    side: str
    """`record`, `rlinf`, or one of `peers.SIDES`."""
    packed: bool
    folder: Path
    batch: int
    steps: int
    """Timed ones."""
    vocabulary: int

    @property
    def all_steps(self) -> int:
        """Steps in all."""
        return WARM_UP + self.steps + PROFILED

    @property
    def model(self) -> Path:
        """The weights that every side starts from, as transformers saves them."""
        return self.folder / "model"

    @property
    def batches(self) -> Path:
        """What every side trains on: a list of batches as rlinf's loader makes them."""
        return self.folder / f"batches-{'packed' if self.packed else 'unpacked'}.pt"


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
        from text_sft.ours import train

        return lambda: train(job)
    from text_sft.peers import SIDES

    return lambda: SIDES[job.side](job)


def _record(job: Job) -> dict[str, Any]:
    """Write the weights, unless they are there, and the batches; returns what is in the timed ones."""
    from text_sft.ours import recorded, write_model

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
