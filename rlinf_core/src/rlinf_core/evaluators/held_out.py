"""The evaluator `held_out` as registered: its settings and the names of its metrics. Imports torch when it is built."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

from rlinf_core.contract.evaluation import EvaluationData, Evaluator, EvaluatorConfig, Metric
from rlinf_core.contract.policy import PolicyConfig
from rlinf_core.contract.process_group import ProcessGroup
from rlinf_core.contract.run import RunConfig

BASELINES = ("val_action_mse_mean", "val_action_mse_repeat")
"""Metrics of the two baselines that ignore observations."""
HEADLINE = "val_loss"
"""The metric that a mixture also has over all sources."""


class HeldOutConfig(EvaluatorConfig):
    """The loss on held-out episodes, and the error of sampled actions. Always on if episodes are held out."""

    needs_held_out: ClassVar[bool] = True

    type: Literal["held_out"] = "held_out"

    def metrics(self, run: RunConfig) -> Sequence[Metric]:
        """`val_loss`, the policy's own, and action errors; in a mixture of each source that holds out episodes."""
        single = tuple(_metrics(run.policy))
        sources = [source.name for source in run.sources if source.run.data.has_validation]
        if sources == [""]:
            return single
        own = [metric._replace(name=f"{metric.name}/{source}") for source in sources for metric in single]
        return (Metric(HEADLINE), *own)

    def build(self, run: RunConfig, *, data: EvaluationData, group: ProcessGroup) -> Evaluator:
        """Build the evaluator on this rank."""
        from rlinf_core.evaluators.validation import HeldOut

        return HeldOut(run, data, group)


def _metrics(policy: PolicyConfig) -> Iterator[Metric]:
    """The metrics of one dataset."""
    yield Metric(HEADLINE)
    for name in policy.validation_metrics:
        yield Metric(f"val_{name}", larger_is_better=name in policy.larger_is_better)
    if policy.chunk_length():
        yield Metric("val_action_mse")
        yield from (Metric(name, baseline=True) for name in BASELINES)
