"""What other dtypes and fewer denoising steps cost: errors of actions on recorded rows, and time, in one table."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from rlinf_core.contract.datasets import SampleSource
from rlinf_core.contract.evaluation import ValidationRow
from rlinf_core.data.loading.encoding import add_draws, encode_rows, read_rows
from rlinf_core.data.loading.sampling import validation_generator
from rlinf_core.errors import UserError
from rlinf_core.evaluators.action_error import ActionComparison, Vectors, mean_action
from rlinf_core.inference import LoadedPolicy
from rlinf_core.results import ResultTable
from rlinf_core.training.distributed.processes import to_device

DTYPES = ("fp32", "bf16")


@dataclass(frozen=True)
class Way:
    """A way to compute the same policy."""

    dtype: str
    steps: int
    """Denoising steps."""

    @property
    def name(self) -> str:
        """As it is written: `fp32:10`."""
        return f"{self.dtype}:{self.steps}"


@dataclass(frozen=True)
class Computed:
    """What a way came to on the rows."""

    way: Way
    actions: NDArray[np.floating]
    """[N, H, D], in the data's units."""
    error: float
    """Mean squared error of the actions within the episodes."""
    seconds: float
    """Median of a call, from a batch of one observation to actions."""


def parse_ways(text: str) -> tuple[Way, ...]:
    """Ways such as `fp32:10,bf16:10,fp32:5`.

    Raises:
        UserError: It is something else.
    """
    ways = []
    for part in text.split(","):
        dtype, _, steps = part.strip().partition(":")
        if dtype not in DTYPES or not steps.isdigit() or len(steps) > 4 or not int(steps):
            raise UserError(f"--sampling: {part!r} is not a dtype and a number of denoising steps, such as bf16:5")
        ways.append(Way(dtype, int(steps)))
    return tuple(dict.fromkeys(ways))


def compute_way(
    way: Way,
    policy: LoadedPolicy,
    rows: SampleSource,
    indices: Sequence[int],
    seed: int,
    progress: Callable[[int, int], object] = lambda done, all: None,
) -> Computed:
    """Sample actions for rows, one after another, with the noise that `offline_eval.judge` draws for them.

    Args:
        way: Names the result; the policy was loaded so.
        policy: The policy.
        rows: The rows.
        indices: Which of them.
        seed: Seed of the noise.
        progress: Called with the number of finished rows, and of all.
    """
    pipeline = policy.pipeline
    comparison = ActionComparison(rows, pipeline, mean_action(rows, pipeline), policy.config.chunk_length())
    sums, found, seconds = comparison.empty(), list[Vectors](), list[float]()
    for index in indices:
        (row,) = read_rows(rows, [index])
        (sample,) = add_draws(
            encode_rows(rows, [index], [row], pipeline), policy.config, [validation_generator(seed, index)]
        )
        batch = to_device(policy.config.collate([sample]), policy.device)
        start = time.perf_counter()
        chunk = policy.sample(batch, batch["noise"]).float().cpu().numpy()[0]
        seconds.append(time.perf_counter() - start)
        decoded = pipeline.decode(chunk, sample)
        sums += comparison.compare_decoded(decoded, ValidationRow(index, sample, pipeline.target(row)))
        found.append(decoded)
        progress(len(found), len(indices))
    return Computed(way, np.stack(found), sums.mean_squared()[0], statistics.median(seconds))


def costs_table(computed: Sequence[Computed]) -> ResultTable:
    """Errors and times of each way beside the first one."""
    first, rows = computed[0], []
    for one in computed:
        change = float(np.sqrt(np.mean(np.square(one.actions - first.actions, dtype=np.float64))))
        own = np.sqrt(first.error)
        rows.append(
            (
                one.way.name,
                one.error,
                one.error / first.error - 1 if first.error else None,
                change / own if own else None,
                one.seconds * 1e3,
                first.seconds / one.seconds,
            )
        )
    return ResultTable(
        title="Other dtypes and numbers of denoising steps",
        columns=("way", "mean squared error", "change of it", "change of actions / RMSE", "ms a call", "times as fast"),
        rows=tuple(rows),
        note=(
            f"{len(first.actions)} rows with the same noise, one observation a call on {torch.get_num_threads()} "
            f"threads or the GPU. Change of actions: root mean square of their difference from those of "
            f"{first.way.name}, over the root mean squared error of {first.way.name}: far below 1, it does not matter."
        ),
    )
