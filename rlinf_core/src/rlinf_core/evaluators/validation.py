"""Evaluate a policy on held-out episodes: its loss, and the error of its sampled actions in the data's own units.

Two baselines that ignore observations are evaluated too: one always outputs the mean action of the training rows, the
other repeats the robot's last action. A policy that is not clearly better has learned nothing from its observations.
`Validation` evaluates one dataset, `HeldOut` every dataset of the run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlinf_core.contract.datasets import SampleSource
from rlinf_core.contract.evaluation import (
    Evaluation,
    EvaluationData,
    EvaluationPipeline,
    EvaluationSource,
    ValidationRow,
)
from rlinf_core.contract.process_group import ProcessGroup
from rlinf_core.contract.run import RunConfig
from rlinf_core.errors import UserError
from rlinf_core.evaluators.held_out import BASELINES, HEADLINE

Vectors = NDArray[np.floating]

ROWS_FOR_THE_MEAN = 4096
"""Evenly spaced training rows from which the mean action is computed."""


class Validation:
    """Evaluates a policy on one dataset, each time on the same held-out rows with the same random draws."""

    def __init__(self, run: RunConfig, source: EvaluationSource, held_out: SampleSource, group: ProcessGroup) -> None:
        self._run, self._source, self._held_out, self._group = run, source, held_out, group
        self._pipeline, self._episodes = source.pipeline, held_out.episodes
        self._mean = mean_action(source.rows, source.pipeline) if run.policy.chunk_length() else None

    @torch.no_grad()
    def __call__(self, policy: Any, interrupted: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """Validate; every rank calls it and gets the same results.

        Args:
            policy: The sharded policy, in evaluation mode.
            interrupted: Whether to abort; called before each batch, with the same answer on every rank.

        Returns:
            `val_loss`, and `val_<name>` of the policy's `validation_metrics`; for policies with actions also
            `val_action_mse`, and for the two baselines `val_action_mse_mean` and `val_action_mse_repeat`: the squared
            error in the data's units, averaged over the dimensions of an action and over the steps of a chunk that are
            within the episode. None if interrupted.
        """
        loss = torch.zeros(2, dtype=torch.float64)
        own: dict[str, float] = {}
        errors = np.zeros(4)
        for batch, rows in self._source.batches(self._run.runner.val_samples):
            if interrupted():
                return None
            out = policy(batch)
            own = own or dict.fromkeys(sorted(out.metrics), 0.0)  # A filler batch has the same names.
            actions = None
            if self._mean is not None:
                actions = policy.sample_actions(batch, batch["noise"]).float().cpu().numpy()
            if not rows:  # A filler batch, so that all ranks run equally many; it does not count.
                continue
            loss += torch.stack([out.loss_sum, out.weight]).double().cpu()
            own = {name: total + float(out.metrics[name]) for name, total in own.items()}
            if self._mean is not None and actions is not None:
                errors += sum(self._errors(chunk, row, self._mean) for chunk, row in zip(actions, rows, strict=True))
        sums = torch.cat([loss, torch.from_numpy(errors), torch.tensor([*own.values()], dtype=torch.float64)])
        totals = self._group.sum(sums.to(self._group.device)).tolist()
        means = {"loss": totals[0] / totals[1]}
        results = {HEADLINE: means["loss"]}
        means |= {name: total / totals[1] for name, total in zip(own, totals[6:], strict=True)}
        results |= {f"val_{name}": value(means) for name, value in self._run.policy.validation_metrics.items()}
        if self._mean is not None:
            names = ("val_action_mse", *BASELINES)
            results |= {name: total / totals[5] for name, total in zip(names, totals[2:5], strict=True)}
        return results

    def _errors(self, actions: Vectors, row: ValidationRow, mean: Vectors) -> Vectors:
        """[4], summed squared errors of policy, mean action and repeated action, and the number of values compared."""
        within = ~row.target["actions_is_pad"]
        target = row.target["actions"][within]
        decoded = self._pipeline.decode(actions, row.sample)[within]
        if decoded.shape != target.shape:
            raise UserError(
                f"the policy's actions have {decoded.shape[-1]} numbers in the data's units, the dataset's have "
                f"{target.shape[-1]}: cut them in the dataset's transforms (data.action_width, where it has that key)"
            )
        guesses = (decoded, mean, self._last_action(row.row, mean))
        return np.array([*(float(np.square(guess - target).sum()) for guess in guesses), target.size])

    def _last_action(self, row: int, mean: Vectors) -> Vectors:
        """[D], the action before this row; for the first row of an episode, the mean action."""
        if row == 0 or self._episodes[row - 1] != self._episodes[row]:
            return mean
        (before,) = self._held_out.without_images([row - 1])
        last: Vectors = self._pipeline.target(before)["actions"][0]
        return last


def mean_action(source: SampleSource, pipeline: EvaluationPipeline) -> Vectors:
    """[D], the mean action of the training rows, in the data's own units."""
    indices = np.unique(np.linspace(0, len(source) - 1, min(len(source), ROWS_FOR_THE_MEAN)).astype(np.int64))
    actions = [pipeline.target(row)["actions"][0] for row in source.without_images(indices.tolist())]
    return np.asarray(np.mean(actions, axis=0, dtype=np.float64))


class HeldOut:
    """Evaluates a policy on every dataset of the run that holds out episodes.

    In a mixture, the result `<key>` of a source is reported as `<key>/<name>`, and `val_loss` is the mean over sources,
    weighted as training draws from them.
    """

    def __init__(self, run: RunConfig, data: EvaluationData, group: ProcessGroup) -> None:
        sources = [(source, source.held_out) for source in data.sources]
        self._parts = {
            source.name: (source.share, Validation(run, source, held_out, group))
            for source, held_out in sources
            if held_out is not None
        }

    def evaluate(self, policy: Any, *, step: int, interrupted: Callable[[], bool]) -> Evaluation | None:
        """Validate; every rank calls it and gets the same results."""
        found: dict[str, dict[str, float]] = {}
        for name, (_, part) in self._parts.items():
            results = part(policy, interrupted)
            if results is None:
                return None
            found[name] = results
        if "" in found:
            return Evaluation(found[""])
        whole = sum(share for share, _ in self._parts.values())
        mean = sum(self._parts[name][0] / whole * results[HEADLINE] for name, results in found.items())
        own = {f"{key}/{name}": value for name, results in found.items() for key, value in results.items()}
        return Evaluation({HEADLINE: mean, **own})

    def close(self) -> None:
        """Nothing is open."""
