"""Evaluators: what a run measures of its policy while it trains, besides the loss of its steps. Torch-free.

At every validation (`runner.val_check_interval`), each evaluator is called on every rank with the sharded policy, ready
to compute: in evaluation mode, without gradients. Core's own evaluator, `held_out`, measures held-out episodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from rlinf_core.contract.datasets import SampleSource
from rlinf_core.contract.process_group import ProcessGroup
from rlinf_core.contract.run import RunConfig
from rlinf_core.data.sample import Batch, Row, Sample


class Metric(NamedTuple):
    """A number that an evaluator reports."""

    name: str
    """Its name in `metrics.jsonl`, for loggers, and in `runner.best_metric`."""
    larger_is_better: bool = False
    """Whether larger values are better, as of a success rate."""
    baseline: bool = False
    """Whether it does not depend on the policy's weights: it is reported once, also if the run averages weights."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluator measured with one set of weights."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    """Values by the names that `EvaluatorConfig.metrics` declared; some may be left out. Those of rank 0 count."""
    files: Mapping[str, bytes | Path] = field(default_factory=dict)
    """Content, or a file to copy, by the name to write in `<run>/evaluations/<type>/step_<step>/`: a relative path such
    as `videos/episode_3.mp4`. Every rank may return files; of several ranks with the same name, the lowest writes it.
    """
    messages: Sequence[str] = ()
    """Lines for people to read, which the run's loggers get. Those of rank 0 count."""


class ValidationRow(NamedTuple):
    """A held-out row, encoded for the policy and in the data's units."""

    row: int
    """Its index in the source."""
    sample: Sample
    """Encoded; decoding the policy's actions needs it."""
    target: Sample
    """In the data's own units; decoded actions are compared with its `actions`."""


class ValidationBatch(NamedTuple):
    """A micro batch of held-out rows."""

    batch: Batch
    """What the policy gets."""
    rows: list[ValidationRow]
    """The rows of the batch; empty if the batch is only a filler, which must not count."""


class EvaluationPipeline(Protocol):
    """A dataset's transforms, from rows to the policy's samples and back: a `rlinf_core.data.pipeline.Pipeline`."""

    def target(self, row: Row) -> Sample:
        """The row in the data's own units."""
        ...

    def encode(self, row: Row) -> Sample:
        """The sample that the policy sees."""
        ...

    def decode(self, actions: NDArray[np.floating], sample: Sample) -> NDArray[np.floating]:
        """The policy's actions for a sample, [H, A], in the data's own units, [H, D]."""
        ...


class EvaluationSource(Protocol):
    """A dataset of the run, as evaluators see it."""

    @property
    def name(self) -> str:
        """Its name in the mixture; empty if the run has one dataset."""
        ...

    @property
    def share(self) -> float:
        """The probability that a training sample comes from it."""
        ...

    @property
    def rows(self) -> SampleSource:
        """The training rows."""
        ...

    @property
    def held_out(self) -> SampleSource | None:
        """The held-out rows; None if there are none."""
        ...

    @property
    def pipeline(self) -> EvaluationPipeline:
        """Its transforms, with the run's statistics."""
        ...

    def batches(
        self, samples: int, *, micro_batch_size: int | None = None, divided: bool = True
    ) -> Iterator[ValidationBatch]:
        """Batches of held-out rows on this rank's device: each time the same rows with the same random numbers.

        Every rank gets the same number of batches, because sharded forward passes need all ranks; a rank without a row
        for a batch gets a filler, whose `rows` are empty.

        Args:
            samples: Rows to use over all ranks, evenly spaced; all of them if there are fewer.
            micro_batch_size: Most rows per batch; default: `trainer.micro_batch_size`.
            divided: Divide the rows among the ranks; otherwise every rank gets all of them.
        """
        ...

    def act(
        self, policy: Any, observations: Sequence[Mapping[str, Any]], generators: Sequence[np.random.Generator]
    ) -> list[NDArray[np.floating]]:
        """The policy's actions for observations, for example of a simulator. Every rank must call it equally often.

        Args:
            policy: The policy that `Evaluator.evaluate` got.
            observations: At least one row in the dataset's format, as for `LoadedPolicy.infer`: columns under the
                dataset's names and the text `task`.
            generators: Draw the noise of each observation's actions.

        Returns:
            A chunk of actions for each observation, [H, D], in the data's units.

        Raises:
            UserError: An observation lacks columns, or the policy has no actions.
        """
        ...


class EvaluationData(Protocol):
    """The data of a run, as evaluators see them."""

    @property
    def sources(self) -> Sequence[EvaluationSource]:
        """The run's datasets: one, or the entries of `[[data.mixture]]` in order."""
        ...


class Evaluator(Protocol):
    """Measures a policy while it trains. Every rank has one, and makes the same calls."""

    def evaluate(self, policy: Any, *, step: int, interrupted: Callable[[], bool]) -> Evaluation | None:
        """Measure the policy; called on every rank, once per set of weights.

        The policy is in evaluation mode and gradients are off. Python's, NumPy's and PyTorch's global random numbers
        start from the same seed each time, and the run continues with its own afterwards. All ranks must call the
        policy, and `interrupted`, equally often, whatever they measure: each call waits for all ranks, for
        `trainer.timeout_seconds` at most. After its last call, a rank may take as long as it needs.

        Args:
            policy: The sharded policy. Call it, `sample_actions`, or a method that its `forward_methods` names.
            step: Finished steps.
            interrupted: Whether the run is asked to stop; the same on every rank. Call it every few seconds.

        Returns:
            What was measured; None if it was interrupted: a run that continues evaluates again.
        """
        ...

    def close(self) -> None:
        """Release what was opened, such as simulators; called on every rank when the run ends, also by an error."""
        ...


class EvaluatorConfig(BaseModel):
    """The table `[evaluators.<type>]`. A subclass gives `type` a `Literal` of its own with a default and adds fields.

    The run's evaluators are `held_out`, if episodes are held out, and those in `runner.evaluators`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    needs_held_out: ClassVar[bool] = False
    """Whether the run must hold out episodes."""

    type: str
    """The name in `runner.evaluators`."""
    weights: Literal["both", "current", "ema"] = "both"
    """Which weights to evaluate if the run averages them (`optim.ema_decay`): the current ones, the average, or both.
    The metrics of the average have the prefix `ema_`."""
    every: int = Field(default=1, ge=1)
    """Evaluate at every n-th validation, and after the last step."""

    def metrics(self, run: RunConfig) -> Sequence[Metric]:
        """What the evaluator reports of this run, without `ema_` variants; leaves torch unloaded."""
        return ()

    def check_run(self, run: RunConfig) -> None:
        """Check this table against the rest of the config. Raises `ValueError` that names the keys."""

    def build(self, run: RunConfig, *, data: EvaluationData, group: ProcessGroup) -> Evaluator:
        """Build the evaluator on this rank, before the policy is built.

        Args:
            run: The frozen config, its policy bound to the data.
            data: The open datasets.
            group: The running process group; `group.device` is where the policy computes.
        """
        raise NotImplementedError(f"{type(self).__name__} must define build()")
