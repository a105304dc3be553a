"""The evaluator `text_answers`: the model's answers to held-out prompts, for people to read. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rlinf_core import Evaluation, Evaluator, EvaluatorConfig, RunConfig
from rlinf_plugins_text.settings import TextPolicySettings

if TYPE_CHECKING:
    from rlinf_core.contract.evaluation import EvaluationData
    from rlinf_core.contract.process_group import ProcessGroup


class TextAnswersConfig(EvaluatorConfig):
    """Shows what the model answers to `policy.shown_samples` held-out prompts of each dataset."""

    needs_held_out: ClassVar[bool] = True

    type: Literal["text_answers"] = "text_answers"
    weights: Literal["both", "current", "ema"] = "current"
    """Which weights answer if the run averages them: the current ones, the average, or both."""

    def check_run(self, run: RunConfig) -> None:
        """Refuse other policies, which cannot answer."""
        if not isinstance(run.policy, TextPolicySettings):
            raise ValueError(f"is for the policy 'text', not {run.policy.type!r}: leave it out of runner.evaluators")

    def build(self, run: RunConfig, *, data: EvaluationData, group: ProcessGroup) -> Evaluator:
        """Build the evaluator on this rank."""
        assert isinstance(run.policy, TextPolicySettings)  # `check_run` has seen it.
        return TextAnswers(run.policy.shown_samples, data)


class TextAnswers:
    """Lets the policy answer the same held-out prompts each time."""

    def __init__(self, count: int, data: EvaluationData) -> None:
        self._count, self._sources = count, data.sources

    def evaluate(self, policy: Any, *, step: int, interrupted: Callable[[], bool]) -> Evaluation | None:
        """One line per prompt. Every rank computes all of them: there are few, and ranks must stay in step."""
        lines = []
        for source in self._sources if self._count else ():
            for batch, _ in source.batches(self._count, micro_batch_size=self._count, divided=False):
                if interrupted():
                    return None
                lines += [f"{source.name}: {text}" if source.name else text for text in policy.answers(batch)]
        return Evaluation(messages=lines)

    def close(self) -> None:
        """Nothing is open."""
