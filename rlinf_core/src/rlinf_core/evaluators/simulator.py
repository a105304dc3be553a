"""The evaluator `simulator` as registered: success rates while the policy trains. Imports torch when it is built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from rlinf_core.contract.evaluation import EvaluationData, Evaluator, EvaluatorConfig, Metric
from rlinf_core.contract.process_group import ProcessGroup
from rlinf_core.contract.run import RunConfig
from rlinf_core.errors import UserError
from rlinf_core.rollout.config import RolloutSettings


class SimulatorConfig(RolloutSettings, EvaluatorConfig):
    """Success rates in a simulator, played by the policy that is being trained."""

    type: Literal["simulator"] = "simulator"
    weights: Literal["both", "current", "ema"] = "both"
    """Which weights to evaluate if the run averages them: the current ones, the average, or both, which takes twice
    the time."""
    source: str = ""
    """The dataset of a mixture in whose format the policy observes and acts."""
    episodes: int = Field(default=10, ge=1)
    """Episodes per task. Episode i starts from seed `seed + i`, and from the recorded initial state i if there are any,
    beginning again after the last."""

    def metrics(self, run: RunConfig) -> Sequence[Metric]:
        """`success` over all tasks, `success/<task>`, and the baselines' `success_<baseline>`."""
        try:
            tasks = [task.name for task in self.chosen_tasks()]
        except UserError:  # `check_run` reports it.
            tasks = []
        names = ["success", "success_at_end", *(f"success/{task}" for task in tasks)]
        baselines = [Metric(f"success_{name}", larger_is_better=True, baseline=True) for name in self.baselines]
        return [*(Metric(name, larger_is_better=True) for name in names), *baselines]

    def check_run(self, run: RunConfig) -> None:
        """Check that there are such tasks, that the policy acts, and that a hanging environment ends before a rank."""
        try:
            self.chosen_tasks()
            run.source(self.source)
        except UserError as error:
            raise ValueError(str(error)) from error
        if not run.policy.chunk_length():
            raise ValueError(f"the policy {run.policy.type!r} has no actions: it cannot act in a simulator")
        if self.timeout_seconds >= run.trainer.timeout_seconds:
            raise ValueError(
                f"timeout_seconds ({self.timeout_seconds:g}) must be below trainer.timeout_seconds "
                f"({run.trainer.timeout_seconds:g}), for which other ranks wait"
            )

    def build(self, run: RunConfig, *, data: EvaluationData, group: ProcessGroup) -> Evaluator:
        """Build the evaluator on this rank; its processes run only while it evaluates."""
        from rlinf_core.evaluators.rollouts import Rollouts

        return Rollouts(self, run, data, group)
