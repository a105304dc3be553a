"""Judge a policy offline: the error of its sampled actions on recorded episodes, with intervals, beside two baselines.

Frames of an episode are alike, so intervals come from drawing whole episodes again (the cluster bootstrap). Numbers of
the same rows and seed are those of the evaluator `held_out` in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlinf_core.contract.datasets import DatasetConfig, SampleSource
from rlinf_core.contract.evaluation import ValidationRow
from rlinf_core.contract.policy import PolicyConfig
from rlinf_core.data.coverage import CompareObservation, CompareState
from rlinf_core.data.loading.encoding import add_draws, encode_rows, read_rows
from rlinf_core.data.loading.sampling import validation_generator
from rlinf_core.data.pipeline import Pipeline
from rlinf_core.data.statistics.names import name_dimensions
from rlinf_core.errors import UserError
from rlinf_core.evaluators.action_error import GUESSES, ActionComparison, ActionSums, Vectors, mean_action
from rlinf_core.inference import LoadedPolicy
from rlinf_core.results import ActionErrors, Cell, Estimate, ResultTable
from rlinf_core.serving.observations import NOISE
from rlinf_core.serving.remote import RemotePolicy
from rlinf_core.training.distributed.processes import to_device

RESAMPLES = 2000
"""Bootstrap resamples of episodes."""
LEVEL = 0.95
"""Confidence level of intervals."""
TINY = 1e-9
"""Instead of dividing by 0 where a resample has no row of a step."""
FEWEST_EPISODES = 3
"""Fewest episodes of an interval: with fewer, resampling says nothing."""
SUBSET = ("validation_fraction", "validation_episodes", "validation_tasks", "episodes", "exclude_episodes", "tasks")
"""Keys of `[data]` that choose episodes of the run's own dataset, and mean nothing for another one."""


@dataclass(frozen=True)
class Served:
    """A policy on a server, with what the exported folder here says of it."""

    remote: RemotePolicy
    config: PolicyConfig
    data: DatasetConfig
    pipeline: Pipeline


@dataclass(frozen=True)
class Judged:
    """The errors of a policy on a dataset, per episode."""

    names: tuple[str, ...]
    """Name of each dimension of an action."""
    errors: ActionErrors
    """The errors over all rows."""
    episodes: tuple[int, ...]
    """The dataset's number of each episode."""
    tasks: tuple[str, ...]
    """The task of each episode."""
    sums: tuple[ActionSums, ...] = field(repr=False)
    """The summed errors of each episode."""
    seed: int = 0

    @property
    def tables(self) -> dict[str, ResultTable]:
        """Tables by name: overall, per dimension, step of the chunk, task and episode."""
        return {
            "overall": self._overall(),
            "dimensions": self._dimensions(),
            "steps": self._steps(),
            "tasks": self._tasks(),
            "episodes": self._episodes(),
        }

    def mean_squared(self) -> dict[str, Estimate | float | None]:
        """The mean squared error of policy and baselines, and the policy's relative to the better baseline."""
        squared = np.stack([one.squared.sum((1, 2)) for one in self.sums])
        compared = np.array([one.counts.sum() * one.squared.shape[2] for one in self.sums])
        found = {name: self._quotient(squared[:, number], compared) for number, name in enumerate(GUESSES)}
        found["relative"] = self._estimate(lambda w: (w @ squared[:, 0]) / (w @ squared[:, 1:]).min(-1))
        return found

    def _overall(self) -> ResultTable:
        found = self.mean_squared()
        rows: list[tuple[Cell, ...]] = [(name, found[name]) for name in GUESSES]
        rows.append(("policy / better baseline", found["relative"]))
        return ResultTable(
            title="Mean squared error of actions, over dimensions and steps",
            columns=("of", "error"),
            rows=tuple(rows),
            note=self._note(),
        )

    def _dimensions(self) -> ResultTable:
        squared = np.stack([one.squared.sum(1) for one in self.sums])
        counts = np.array([one.counts.sum() for one in self.sums])
        absolute = np.stack([one.absolute.sum(1)[0] for one in self.sums])
        rows = []
        for number, name in enumerate(self.names):
            rmse = [self._root(squared[:, guess, number], counts) for guess in range(len(GUESSES))]
            mae = float(absolute[:, number].sum() / counts.sum())
            rows.append((f"{number} {name}".strip(), *rmse, mae))
        return ResultTable(
            title="Per dimension, in the data's units",
            columns=("dimension", "RMSE", *(f"RMSE, {name}" for name in GUESSES[1:]), "mean absolute error"),
            rows=tuple(rows),
            note=self._note(),
        )

    def _steps(self) -> ResultTable:
        squared = np.stack([one.squared.sum(2) for one in self.sums])
        counts = np.stack([one.counts for one in self.sums])
        rows = []
        for step in np.flatnonzero(counts.sum(0)).tolist():
            compared = counts[:, step] * len(self.names)
            errors = [self._quotient(squared[:, guess, step], compared) for guess in range(len(GUESSES))]
            rows.append((step, *errors, int(counts[:, step].sum())))
        return ResultTable(
            title="Mean squared error per step of the chunk",
            columns=("step", *GUESSES, "actions"),
            rows=tuple(rows),
            note=self._note(),
        )

    def _tasks(self) -> ResultTable:
        rows = []
        for task in dict.fromkeys(self.tasks):
            chosen = [number for number, one in enumerate(self.tasks) if one == task]
            part = replace(self, sums=tuple(self.sums[i] for i in chosen))
            found = part.mean_squared()
            rows.append((task or "(no task)", *(found[name] for name in GUESSES), found["relative"], len(chosen)))
        return ResultTable(
            title="Mean squared error per task",
            columns=("task", *GUESSES, "policy / better baseline", "episodes"),
            rows=tuple(rows),
            note=self._note(),
        )

    def _episodes(self) -> ResultTable:
        rows: list[tuple[Any, ...]] = []
        for episode, task, sums in zip(self.episodes, self.tasks, self.sums, strict=True):
            errors = sums.mean_squared()
            best = min(errors[1:])
            relative = errors[0] / best if best else None
            rows.append((episode, task, *errors, relative, int(sums.rows)))
        rows.sort(key=lambda row: -row[2])
        return ResultTable(
            title="Mean squared error per episode, the largest first",
            columns=("episode", "task", *GUESSES, "policy / better baseline", "rows"),
            rows=tuple(rows),
        )

    def _note(self) -> str:
        if len(self.sums) < FEWEST_EPISODES:
            return f"No intervals: they need at least {FEWEST_EPISODES} episodes."
        return f"In parentheses: {LEVEL:.0%} intervals from resampling {len(self.sums)} episodes {RESAMPLES} times."

    def _quotient(self, sums: NDArray[np.float64], counts: NDArray[np.float64]) -> Estimate | float | None:
        return self._estimate(lambda w: (w @ sums) / np.maximum(w @ counts, TINY))

    def _root(self, squared: NDArray[np.float64], counts: NDArray[np.float64]) -> Estimate | float | None:
        return self._estimate(lambda w: np.sqrt((w @ squared) / np.maximum(w @ counts, TINY)))

    def _estimate(self, of: Callable[[NDArray[np.float64]], Any]) -> Estimate | float | None:
        """A function of the episodes' weights with its interval; alone if there are too few episodes."""
        count = len(self.sums)
        value = float(of(np.ones(count)))
        if count < FEWEST_EPISODES or not np.isfinite(value):
            return value if np.isfinite(value) else None
        draws = np.random.Generator(np.random.Philox(key=self.seed)).multinomial(
            count, np.full(count, 1 / count), RESAMPLES
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            found = np.asarray(of(draws.astype(np.float64)))
        low, high = np.nanquantile(found[np.isfinite(found)], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Estimate(value=value, low=float(low), high=float(high))


def judge(
    policy: LoadedPolicy | Served,
    rows: SampleSource,
    mean_from: SampleSource,
    *,
    samples: int,
    batch_size: int,
    seed: int,
    episodes: Sequence[int] = (),
    progress: Callable[[int, int], object] = lambda done, all: None,
) -> Judged:
    """Sample actions for recorded rows, and compare them with the recorded ones.

    Args:
        policy: The policy, here or on a server.
        rows: The rows.
        mean_from: The rows whose mean action is the output of a baseline, usually those of training.
        samples: Rows to use, evenly spread; all of them if there are fewer. 0: all.
        batch_size: Rows per batch.
        seed: Seed of the noise, which belongs to the row, and of the bootstrap.
        episodes: The dataset's numbers of the episodes to use; empty: all.
        progress: Called with the number of finished rows, and of all.

    Raises:
        UserError: The policy has no actions, or there are no such episodes.
    """
    steps = policy.config.chunk_length()
    if not steps:
        raise UserError(f"the policy {policy.config.type!r} has no actions: rlinf eval measures the error of actions")
    pipeline = _without_comparisons(policy.pipeline)
    chosen = choose_rows(rows.episodes, samples, episodes)
    comparison = ActionComparison(rows, pipeline, mean_action(mean_from, pipeline), steps)
    by_episode: dict[int, ActionSums] = {}
    tasks: dict[int, str] = {}
    done = 0
    progress(0, len(chosen))
    for part in np.array_split(chosen, -(-len(chosen) // batch_size)):
        for row, chunk, task in _act(policy, pipeline, rows, part.tolist(), seed):
            episode = int(rows.episodes[row.row])
            sums = by_episode.setdefault(episode, comparison.empty())
            sums += comparison.compare_decoded(chunk, row)
            tasks.setdefault(episode, task)
        done += len(part)
        progress(done, len(chosen))
    whole = comparison.empty()
    for one in by_episode.values():
        whole += one
    if not np.isfinite(whole.squared).all():
        raise UserError("an action that the policy sampled, or one that was recorded, is NaN or infinite")
    names = name_dimensions(policy.data, rows, [policy.data.repack()]).get("actions", ())
    errors = whole.errors(names, comparison.chunks)
    return Judged(errors.names, errors, tuple(by_episode), tuple(tasks.values()), tuple(by_episode.values()), seed)


def choose_rows(episodes: NDArray[np.int64], samples: int, wanted: Sequence[int] = ()) -> NDArray[np.int64]:
    """Evenly spread rows; without `wanted`, those that validations in training use.

    Args:
        episodes: [N], the episode of each row.
        samples: Rows to choose; 0: all.
        wanted: Numbers of the episodes to choose from; empty: all.

    Raises:
        UserError: There is no such episode.
    """
    rows: NDArray[np.int64] = np.arange(len(episodes))
    if wanted:
        there = np.unique(episodes)
        if missing := sorted(set(wanted) - set(there.tolist())):
            raise UserError(
                f"there is no episode {missing[0]} among these rows, which are of {len(there)} episodes from "
                f"{there.min()} to {there.max()}"
            )
        rows = np.flatnonzero(np.isin(episodes, wanted))
    count = min(samples or len(rows), len(rows))
    return rows[np.unique(np.linspace(0, len(rows) - 1, count).round().astype(np.int64))]


def other_dataset(data: DatasetConfig, repo_id: str) -> DatasetConfig:
    """The config of another dataset of the same format, with all its episodes.

    Args:
        data: The dataset that the policy was trained on.
        repo_id: A folder or a hub id.
    """
    fields = type(data).model_fields
    cleared = {key: fields[key].get_default() for key in (*SUBSET, "revision", "cache") if key in fields}
    return data.model_copy(update={"repo_id": repo_id, **cleared})


def _without_comparisons(pipeline: Pipeline) -> Pipeline:
    """The pipeline without the checks of what a robot observes: these are recorded rows."""
    dataset = tuple(one for one in pipeline.dataset if not isinstance(one, CompareObservation | CompareState))
    return replace(pipeline, dataset=dataset)


def _act(
    policy: LoadedPolicy | Served, pipeline: Pipeline, source: SampleSource, indices: Sequence[int], seed: int
) -> Iterator[tuple[ValidationRow, Vectors, str]]:
    """Rows of a batch with the actions [H, D] that the policy samples for them, in the data's units, and their task."""
    rows = read_rows(source, indices)
    generators = (validation_generator(seed, index) for index in indices)
    samples = add_draws(encode_rows(source, indices, rows, pipeline), policy.config, generators)
    if isinstance(policy, Served):
        actions = policy.remote.infer(rows, [{NOISE: np.asarray(sample["noise"])} for sample in samples])
    else:
        batch: Mapping[str, Any] = to_device(policy.config.collate(samples), policy.device)
        chunks = policy.sample(batch, batch["noise"]).float().cpu().numpy()
        actions = [pipeline.decode(chunk, sample) for chunk, sample in zip(chunks, samples, strict=True)]
    for index, row, sample, chunk in zip(indices, rows, samples, actions, strict=True):
        yield ValidationRow(index, sample, pipeline.target(row)), chunk, str(row.get("task", ""))
