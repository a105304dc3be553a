"""Evaluate a policy on held-out episodes: its loss, and the error of its sampled actions in the data's own units.

Two baselines that ignore observations are evaluated too: one always outputs the mean action of the training rows, the
other repeats the robot's last action. A policy that is not clearly better has learned nothing from its observations.
`Validation` evaluates one dataset, `MixtureValidation` every source of a mixture; `open_validation` chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlinf_core.contract.datasets import SampleSource
from rlinf_core.contract.process_group import ProcessGroup
from rlinf_core.contract.run import RunConfig
from rlinf_core.data.loading.mixture import Source
from rlinf_core.data.loading.validation import ValidationBatch, ValidationRow, build_validation_batches
from rlinf_core.data.pipeline import Pipeline
from rlinf_core.errors import UserError
from rlinf_core.training.distributed.processes import to_device
from rlinf_core.training.ema import Ema
from rlinf_core.training.fsdp import release
from rlinf_core.training.stopping import BASELINES, HEADLINES, best_metric, result_names

Vectors = NDArray[np.floating]

ROWS_FOR_THE_MEAN = 4096
"""Evenly spaced training rows from which the mean action is computed."""


class Validation:
    """Evaluates a policy, each time on the same held-out rows with the same random draws."""

    def __init__(
        self, run: RunConfig, pipeline: Pipeline, held_out: SampleSource, training: SampleSource, group: ProcessGroup
    ) -> None:
        self._run, self._pipeline, self._source, self._group = run, pipeline, held_out, group
        self._episodes = held_out.episodes
        self._mean = mean_action(training, pipeline) if run.policy.chunk_length() else None

    def __call__(
        self, policy: Any, ema: Ema | None = None, interrupted: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """Validate; every rank calls it and gets the same results.

        Args:
            policy: The sharded policy.
            ema: The moving average, whose weights are then evaluated too.
            interrupted: Whether to abort; called before each batch, with the same answer on every rank.

        Returns:
            `val_loss`, and `val_<name>` of the policy's `validation_metrics`; for policies with actions also
            `val_action_mse`, and for the two baselines `val_action_mse_mean` and `val_action_mse_repeat`: the squared
            error in the data's units, averaged over the dimensions of an action and over the steps of a chunk that are
            within the episode. `ema_val_loss` etc. are the results of the EMA weights. None if interrupted.
        """
        policy.eval()
        try:
            results = self._measure(policy, interrupted)
            if results is not None and ema is not None:
                with ema.in_place_of_weights():
                    averaged = self._measure(policy, interrupted)
                own = {f"ema_{name}": value for name, value in (averaged or {}).items() if name not in BASELINES}
                results = results | own if averaged else None
            return results
        finally:
            release(policy)

    @torch.no_grad()
    def _measure(self, policy: Any, interrupted: Callable[[], bool]) -> dict[str, float] | None:
        """The results with the policy's current weights."""
        device = self._group.device
        loss = torch.zeros(2, dtype=torch.float64)
        own: dict[str, float] = {}
        errors = np.zeros(4)
        for batch, rows in self._batches():
            if interrupted():
                return None
            on_device = to_device(batch, device)
            out = policy(on_device)
            own = own or dict.fromkeys(sorted(out.metrics), 0.0)  # A filler batch has the same names.
            actions = None
            if self._mean is not None:
                actions = policy.sample_actions(on_device, on_device["noise"]).float().cpu().numpy()
            if not rows:  # A filler batch, so that all ranks run equally many; it does not count.
                continue
            loss += torch.stack([out.loss_sum, out.weight]).double().cpu()
            own = {name: total + float(out.metrics[name]) for name, total in own.items()}
            if self._mean is not None and actions is not None:
                errors += sum(self._errors(chunk, row, self._mean) for chunk, row in zip(actions, rows, strict=True))
        sums = torch.cat([loss, torch.from_numpy(errors), torch.tensor([*own.values()], dtype=torch.float64)])
        totals = self._group.sum(sums.to(device)).tolist()
        means = {"loss": totals[0] / totals[1]}
        results = {"val_loss": means["loss"]}
        means |= {name: total / totals[1] for name, total in zip(own, totals[6:], strict=True)}
        results |= {f"val_{name}": value(means) for name, value in self._run.policy.validation_metrics.items()}
        if self._mean is not None:
            names = ("val_action_mse", *BASELINES)
            results |= {name: total / totals[5] for name, total in zip(names, totals[2:5], strict=True)}
        return results

    def demonstrate(self, policy: Any) -> list[str]:
        """The policy's texts about held-out samples (`PolicyConfig.shown` says how many), the same on every rank."""
        if not (count := self._run.policy.shown()):
            return []
        # Not divided among ranks: all of them compute the same.
        batches = self._batches_of(count, micro_batch_size=count, rank=0, world_size=1)
        policy.eval()
        try:
            with torch.no_grad():
                return [
                    text for batch, _ in batches for text in policy.demonstrate(to_device(batch, self._group.device))
                ]
        finally:
            release(policy)

    def _batches(self) -> Iterator[ValidationBatch]:
        return self._batches_of(
            self._run.runner.val_samples,
            micro_batch_size=self._run.trainer.micro_batch_size,
            rank=self._group.rank,
            world_size=self._group.size,
        )

    def _batches_of(self, samples: int, **share: int) -> Iterator[ValidationBatch]:
        run = self._run
        return build_validation_batches(
            self._source, self._pipeline, run.policy, seed=run.seed, val_samples=samples, **share
        )

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
        (before,) = self._source.without_images([row - 1])
        last: Vectors = self._pipeline.target(before)["actions"][0]
        return last


def mean_action(source: SampleSource, pipeline: Pipeline) -> Vectors:
    """[D], the mean action of the training rows, in the data's own units."""
    indices = np.unique(np.linspace(0, len(source) - 1, min(len(source), ROWS_FOR_THE_MEAN)).astype(np.int64))
    actions = [pipeline.target(row)["actions"][0] for row in source.without_images(indices.tolist())]
    return np.asarray(np.mean(actions, axis=0, dtype=np.float64))


class MixtureValidation:
    """Evaluates a policy on every source that holds out episodes.

    The result `<key>` of a source is reported as `<key>/<name>`. `val_loss` (and `ema_val_loss`) is the mean over
    sources, weighted as training draws from them.
    """

    def __init__(self, parts: Mapping[str, Validation], shares: Mapping[str, float]) -> None:
        self._parts = dict(parts)
        whole = sum(shares[name] for name in parts)
        self._shares = {name: shares[name] / whole for name in parts}

    def __call__(
        self, policy: Any, ema: Ema | None = None, interrupted: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """Validate; every rank calls it and gets the same results. The arguments are those of `Validation`."""
        found: dict[str, dict[str, float]] = {}
        for name, part in self._parts.items():
            results = part(policy, ema, interrupted)
            if results is None:
                return None
            found[name] = results
        whole = {
            key: sum(self._shares[name] * results[key] for name, results in found.items())
            for key in HEADLINES
            if all(key in results for results in found.values())
        }
        return whole | {f"{key}/{name}": value for name, results in found.items() for key, value in results.items()}

    def demonstrate(self, policy: Any) -> list[str]:
        """The policy's texts about held-out samples of each source."""
        return [f"{name}: {text}" for name, part in self._parts.items() for text in part.demonstrate(policy)]


def open_validation(
    run: RunConfig, sources: Sequence[Source], held_out: Sequence[SampleSource | None], group: ProcessGroup
) -> Validation | MixtureValidation | None:
    """The validation of a run's held-out rows; None if there are none.

    Raises:
        UserError: `runner.best_metric` is not one of its results.
    """
    parts = {
        source.name: Validation(given.run, source.pipeline, own, source.rows, group)
        for given, source, own in zip(run.sources, sources, held_out, strict=True)
        if own is not None
    }
    if not parts:
        return None
    shares = {source.name: source.share for source in sources}
    validation = parts[""] if "" in parts else MixtureValidation(parts, shares)
    best_metric(run.runner.best_metric, result_names(run))  # Fail now rather than at the first validation.
    return validation
