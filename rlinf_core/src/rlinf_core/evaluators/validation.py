"""Evaluate a policy on held-out episodes: its loss, and the error of its sampled actions in the data's own units.

Two baselines that ignore observations are evaluated too: one always outputs the mean action of the training rows, the
other repeats the robot's last action. A policy that is not clearly better has learned nothing from its observations.
`Validation` evaluates one dataset, `HeldOut` every dataset of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from rlinf_core.contract.datasets import SampleSource
from rlinf_core.contract.evaluation import Evaluation, EvaluationData, EvaluationSource
from rlinf_core.contract.process_group import ProcessGroup
from rlinf_core.contract.run import RunConfig
from rlinf_core.data.statistics.names import name_dimensions
from rlinf_core.evaluators.action_error import ActionComparison, ActionSums, mean_action
from rlinf_core.evaluators.held_out import BASELINES, HEADLINE
from rlinf_core.results import ACTIONS, ActionErrors


class Validation:
    """Evaluates a policy on one dataset, each time on the same held-out rows with the same random draws."""

    def __init__(
        self,
        run: RunConfig,
        source: EvaluationSource,
        held_out: SampleSource,
        group: ProcessGroup,
        names: Sequence[str] = (),
    ) -> None:
        """See the class.

        Args:
            run: The run.
            source: The dataset.
            held_out: Its held-out rows.
            group: The ranks.
            names: The dataset's names of the dimensions of an action.
        """
        self._run, self._source, self._held_out, self._group, self._names = run, source, held_out, group, names
        self._steps = run.policy.chunk_length()
        self._mean = mean_action(source.rows, source.pipeline) if self._steps else None
        self.action_errors: ActionErrors | None = None
        """Errors of sampled actions of the last validation; None for policies without actions."""

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
        comparison = self._comparison()
        errors = ActionSums.zeros(0, 0) if comparison is None else comparison.empty()
        for batch, rows in self._source.batches(self._run.runner.val_samples):
            if interrupted():
                return None
            out = policy(batch)
            own = own or dict.fromkeys(sorted(out.metrics), 0.0)  # A filler batch has the same names.
            actions = None
            if comparison is not None:
                actions = policy.sample_actions(batch, batch["noise"]).float().cpu().numpy()
            if not rows:  # A filler batch, so that all ranks run equally many; it does not count.
                continue
            loss += torch.stack([out.loss_sum, out.weight]).double().cpu()
            own = {name: total + float(out.metrics[name]) for name, total in own.items()}
            if comparison is not None and actions is not None:
                for chunk, row in zip(actions, rows, strict=True):
                    errors += comparison.compare(chunk, row)
        parts = [loss, torch.tensor([*own.values()], dtype=torch.float64), torch.from_numpy(errors.flat())]
        totals = self._group.sum(torch.cat(parts).to(self._group.device)).tolist()
        means = {"loss": totals[0] / totals[1]}
        means |= {name: total / totals[1] for name, total in zip(own, totals[2 : 2 + len(own)], strict=True)}
        results = {HEADLINE: means["loss"]}
        results |= {f"val_{name}": value(means) for name, value in self._run.policy.validation_metrics.items()}
        if comparison is not None:
            whole = errors.unflat(totals[2 + len(own) :])
            results |= dict(zip(("val_action_mse", *BASELINES), whole.mean_squared(), strict=True))
            self.action_errors = whole.errors(self._names, comparison.chunks)
        return results

    def _comparison(self) -> ActionComparison | None:
        """What compares sampled actions with recorded ones; None for policies without actions."""
        if self._mean is None:
            return None
        return ActionComparison(self._held_out, self._source.pipeline, self._mean, self._steps)


class HeldOut:
    """Evaluates a policy on every dataset of the run that holds out episodes.

    In a mixture, the result `<key>` of a source is reported as `<key>/<name>`, and `val_loss` is the mean over sources,
    weighted as training draws from them.
    """

    def __init__(self, run: RunConfig, data: EvaluationData, group: ProcessGroup) -> None:
        sources = [(source, source.held_out) for source in data.sources]
        self._parts = {
            source.name: (source.share, Validation(run, source, held_out, group, _names(run, source.name, held_out)))
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
        files = {f"{name or 'held_out'}{ACTIONS}": content for name, content in self._files().items()}
        if "" in found:
            return Evaluation(found[""], files)
        whole = sum(share for share, _ in self._parts.values())
        mean = sum(self._parts[name][0] / whole * results[HEADLINE] for name, results in found.items())
        own = {f"{key}/{name}": value for name, results in found.items() for key, value in results.items()}
        return Evaluation({HEADLINE: mean, **own}, files)

    def _files(self) -> dict[str, bytes]:
        """The action errors of each source that has actions."""
        errors = {name: part.action_errors for name, (_, part) in self._parts.items()}
        return {name: one.to_json() for name, one in errors.items() if one is not None}

    def close(self) -> None:
        """Nothing is open."""


def _names(run: RunConfig, source: str, rows: SampleSource) -> Sequence[str]:
    """The dataset's names of the dimensions of an action, as recorded; empty for policies without actions."""
    if not run.policy.chunk_length():
        return ()
    data = run.source(source).run.data
    return name_dimensions(data, rows, [data.repack()]).get("actions", ())
