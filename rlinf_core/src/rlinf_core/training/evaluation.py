"""Run the evaluators of a run: with which weights, from which random numbers, and what becomes of what they return.

Evaluating leaves no trace in training: the weights, the global random numbers and, from the next step on, the training
mode are those from before.
"""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlinf_core.contract.evaluation import Evaluation, EvaluationData, Evaluator, Metric
from rlinf_core.contract.process_group import ProcessGroup
from rlinf_core.contract.run import ChosenEvaluator, LoadedPlugins, RunConfig
from rlinf_core.errors import UserError, did_you_mean
from rlinf_core.files import write_bytes
from rlinf_core.results import FOLDER
from rlinf_core.training.checkpoint.state import step_name
from rlinf_core.training.state.ema import Ema
from rlinf_core.training.state.fsdp import derived_seed, release
from rlinf_core.training.stopping import EMA, prefixed, weights_of
from rlinf_core.untrusted.text import path_inside

HELD_OUT = "held_out"


@dataclass
class Report:
    """The results of all evaluators of a validation, the same on every rank."""

    metrics: dict[str, float] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Running:
    """An evaluator of this run on this rank."""

    chosen: ChosenEvaluator
    evaluator: Evaluator
    declared: Sequence[Metric]

    @property
    def type(self) -> str:
        """Its name in `runner.evaluators`."""
        name: str = self.chosen.config.type
        return name


@dataclass(frozen=True, eq=False)
class Evaluations:
    """The evaluators of a run, or those that are due at a step. Every rank makes the same calls."""

    run: RunConfig
    group: ProcessGroup
    running: tuple[Running, ...]

    @classmethod
    def build(cls, run: RunConfig, data: EvaluationData, group: ProcessGroup, plugins: LoadedPlugins) -> Evaluations:
        """Build the run's evaluators; none if it does not validate."""
        built = []
        for chosen in plugins.evaluators(run) if run.runner.val_check_interval else ():
            with chosen.naming("build()"):
                evaluator = chosen.config.build(run, data=data, group=group)
                built.append(Running(chosen, evaluator, tuple(chosen.config.metrics(run))))
        return cls(run, group, tuple(built))

    @property
    def exist(self) -> bool:
        """Whether the run has evaluators."""
        return bool(self.running)

    @property
    def description(self) -> str:
        """What they evaluate, in words; empty if there are none."""
        names = [one.type for one in self.running]
        if names == [HELD_OUT]:
            return "on held-out data"
        return f"({', '.join(names)})" if names else ""

    def due(self, step: int, *, last: bool) -> Evaluations:
        """The evaluators that are due after a step: each at every n-th validation, all after the last step."""
        number = step // self.run.runner.val_check_interval
        running = (one for one in self.running if last or number % one.chosen.config.every == 0)
        return Evaluations(self.run, self.group, tuple(running))

    def __call__(self, policy: Any, ema: Ema | None, step: int, interrupted: Callable[[], bool]) -> Report | None:
        """Evaluate; every rank calls it and gets the same results.

        Args:
            policy: The sharded policy.
            ema: The moving average of its weights.
            step: Finished steps.
            interrupted: Whether to abort; the same answer on every rank.

        Returns:
            What the evaluators report; None if interrupted.
        """
        report = Report()
        try:
            for one in self.running:
                for prefix in weights_of(one.chosen.config, self.run):
                    weights = ema.in_place_of_weights() if prefix and ema is not None else contextlib.nullcontext()
                    with weights, self._undisturbed(policy, one):
                        done = not interrupted() and self._evaluate(one, policy, step, interrupted, prefix, report)
                    if not done:
                        return None
            return report
        finally:
            release(policy)

    def close(self) -> None:
        """Close all evaluators, even if one of them fails."""
        with contextlib.ExitStack() as ending:
            for one in reversed(self.running):
                ending.callback(self._close, one)

    def _close(self, one: Running) -> None:
        with one.chosen.naming("close()"):
            one.evaluator.close()

    def _evaluate(
        self, one: Running, policy: Any, step: int, interrupted: Callable[[], bool], prefix: str, report: Report
    ) -> bool:
        """Add what an evaluator measures with the policy's weights; returns whether it was not interrupted."""
        with one.chosen.naming("evaluate()"):
            found = one.evaluator.evaluate(policy, step=step, interrupted=interrupted)
            own = None if found is None else Outcome.of(found, one.declared)
            # Ranks wait here for the slowest, as long as it takes; in other collectives, `trainer.timeout_seconds`.
            outcomes = self.group.gather(own)
            first = outcomes[0]
            if found is None or first is None or None in outcomes:
                return False
            names = {metric.name: prefixed([metric], prefix)[0].name for metric in one.declared}
            for name, value in first.metrics.items():
                report.metrics.setdefault(names[name], value)  # A baseline is there already.
            report.messages += [f"EMA weights: {text}" if prefix else text for text in first.messages]
            folder = self.run.folder / FOLDER / one.type / f"{prefix}{step_name(step)}"
            writers = [set(outcome.files) if outcome else set() for outcome in outcomes]
            report.messages += self._write(folder, found.files, writers)
        return True

    def _write(self, folder: Path, files: Mapping[str, bytes | Path], writers: Sequence[set[str]]) -> list[str]:
        """Write this rank's files except those that a lower rank writes; returns warnings of all ranks."""
        if not any(writers):
            return []
        failed = []
        for name in files.keys() - set().union(*writers[: self.group.rank]):
            content, path = files[name], folder / name
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(path, content.read_bytes() if isinstance(content, Path) else content)
            except OSError as error:  # The run goes on: a full disk is fatal only when a checkpoint does not fit.
                failed.append(f"warning: {path} cannot be written: {error}")
        return [warning for of_rank in self.group.gather(failed) for warning in of_rank]

    @contextlib.contextmanager
    def _undisturbed(self, policy: Any, one: Running) -> Iterator[None]:
        """Evaluate from the same random numbers each time, and give training its own back."""
        device, seed = self.group.device, derived_seed(self.run.seed, "evaluator", one.type)
        python, numpy = random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
                random.seed(seed)
                np.random.seed(seed % 2**32)
                torch.default_generator.manual_seed(seed)
                if device.type == "cuda":
                    torch.cuda.manual_seed(seed)
                policy.eval()
                yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@dataclass(frozen=True)
class Outcome:
    """What ranks exchange of an evaluation: all but the contents of files."""

    metrics: Mapping[str, float]
    messages: tuple[str, ...]
    files: tuple[str, ...]

    @classmethod
    def of(cls, found: Evaluation, declared: Sequence[Metric]) -> Outcome:
        """Check what an evaluator returned.

        Raises:
            UserError: It is not an `Evaluation` of numbers that were declared and of files within their folder.
        """
        if not isinstance(found, Evaluation):
            raise UserError(f"evaluate() must return an Evaluation, or None if it was interrupted, not {found!r}")
        known = [metric.name for metric in declared]
        for name in found.metrics:
            if name not in known:
                raise UserError(
                    f"it reports {name!r}, which its metrics() does not declare{did_you_mean(name, known)} "
                    f"(it declares {', '.join(known) or 'none'})"
                )
        for name, content in found.files.items():
            try:
                path_inside(Path(), name)
            except ValueError as error:
                raise UserError(f"files: {error}: name a file within the folder of the evaluation") from error
            if isinstance(content, Path) and not content.is_file():
                raise UserError(f"files[{name!r}]: there is no file {content}")
            if not isinstance(content, Path | bytes):
                raise UserError(f"files[{name!r}] must be bytes or the path of a file, not {type(content).__name__}")
        numbers = {name: _number(name, value) for name, value in found.metrics.items()}
        return cls(numbers, tuple(map(str, found.messages)), tuple(found.files))


def _number(name: str, value: Any) -> float:
    """A metric as a float; a tensor or an array with one element is accepted."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"its metric {name!r} must be a number, not {value!r}") from error


def cut_back(folder: Path, step: int) -> None:
    """Remove the files of evaluations after a step, which a resumed run repeats (contract 9).

    Args:
        folder: The run's folder.
        step: Finished steps.
    """
    for path in (folder / FOLDER).glob("*/*"):
        name, _, number = path.name.removeprefix(EMA).rpartition("_")
        if name == "step" and number.isdigit() and int(number) > step:
            shutil.rmtree(path)
