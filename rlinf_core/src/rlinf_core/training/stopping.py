"""When a run ends before its last step: a signal, or validations that no longer improve."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType

from rlinf_core.contract.evaluation import EvaluatorConfig, Metric
from rlinf_core.contract.run import LoadedPlugins, RunConfig
from rlinf_core.errors import UserError, did_you_mean
from rlinf_core.process.watchdog import GRACE, catch_stops, release_stops

AGAIN = 2.0
"""Seconds after which a second signal means that the user does not want to wait. Until then it is a repetition: Ctrl-C
reaches a worker from the terminal and again through torchrun."""
SPARE = 2.0
"""Seconds of `watchdog.GRACE` that are left for the end itself."""


class StopSignal:
    """Records whether this process was asked to stop; the ranks then agree on the step after which they do."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._at = 0.0
        self._leaving = math.inf

    def seconds_left(self) -> float:
        """Seconds until this process must have exited; infinite if it was not asked to stop."""
        return self._leaving - time.monotonic()

    def agreed(self, stopping: bool) -> bool:
        """Take in whether any rank received a signal, which starts the grace period; returns `stopping`."""
        if stopping:
            self._leaving = min(self._leaving, time.monotonic() + GRACE - SPARE)
        return stopping

    def handle(self, number: int, _: FrameType | None) -> None:
        """Remember the first signal; a deliberate second one ends the process at once."""
        now = time.monotonic()
        if self.received is None:
            self.received, self._at = signal.Signals(number), now
            self._leaving = now + GRACE - SPARE
        elif now - self._at > AGAIN:
            raise KeyboardInterrupt


def seconds_from_now(seconds: float) -> Callable[[], float]:
    """A function that returns how many of these seconds, counted from now, are left."""
    end = time.monotonic() + seconds
    return lambda: end - time.monotonic()


@contextmanager
def stop_signals() -> Iterator[StopSignal]:
    """Catch the signals that `Ending` handles while the run trains, so that it can save before it exits."""
    stop = StopSignal()
    before = catch_stops(stop.handle)
    try:
        yield stop
    finally:
        release_stops(before)


@dataclass(frozen=True)
class Best:
    """The best validation so far, kept in every checkpoint."""

    step: int = 0
    """Finished steps at that validation; 0 before the first one."""
    value: float | None = None
    """The value of `runner.best_metric` there."""
    stale: int = 0
    """Validations since then, none of them better."""
    metric: str = ""
    """Name of the result that is compared."""

    def after(self, step: int, metric: Metric, value: float, min_delta: float) -> Best:
        """The best after another validation; neither NaN nor an equal value is an improvement."""
        if metric.name != self.metric:
            return Best(metric=metric.name).after(step, metric, value, 0.0)
        sign = -1.0 if metric.larger_is_better else 1.0
        if sign * value < (math.inf if self.value is None else sign * self.value) - min_delta:
            return Best(step, value, metric=metric.name)
        return replace(self, stale=self.stale + 1)

    def should_stop_early(self, wanted: str, patience: int) -> bool:
        """Whether `patience` validations in a row (0: never) did not improve the wanted metric."""
        return 0 < patience <= self.stale and wanted in ("", self.metric)


EMA = "ema_"
"""Prefix of the metrics of averaged weights."""


def reported_metrics(run: RunConfig, plugins: LoadedPlugins) -> dict[str, Metric]:
    """Every metric that the run's evaluators may report, by name, in their order.

    Raises:
        UserError: Two evaluators report the same name, or a name belongs to the run.
    """
    found: dict[str, Metric] = {}
    owners: dict[str, object] = {}
    for chosen in plugins.evaluators(run):
        with chosen.naming("metrics()"):
            declared = list(chosen.config.metrics(run))
        for metric in (one for prefix in weights_of(chosen.config, run) for one in prefixed(declared, prefix)):
            if metric.name in RESERVED:
                raise UserError(
                    f"the {chosen} reports {metric.name!r}, which is a key of the run's own rows: rename it"
                )
            if (other := owners.get(metric.name, chosen)) is not chosen:
                raise UserError(
                    f"the {other} and the {chosen} both report {metric.name!r}: leave one of them out of "
                    "runner.evaluators"
                )
            owners[metric.name], found[metric.name] = chosen, metric
    return found


RESERVED = ("step", "loss")
"""Keys by which rows of `metrics.jsonl` are recognised."""


def weights_of(config: EvaluatorConfig, run: RunConfig) -> tuple[str, ...]:
    """The sets of weights that an evaluator measures, by the prefix of their metrics: the current ones first."""
    if not run.optim.ema_decay:
        return ("",)
    return {"both": ("", EMA), "current": ("",), "ema": (EMA,)}[config.weights]


def prefixed(metrics: Iterable[Metric], prefix: str) -> list[Metric]:
    """An evaluator's metrics for one set of weights; what does not depend on weights has no prefix."""
    return [one if one.baseline else one._replace(name=f"{prefix}{one.name}") for one in metrics]


DEFAULT_BEST = ("ema_val_action_mse", "val_action_mse", "ema_val_loss", "val_loss")


def best_metric(wanted: str, metrics: Mapping[str, Metric]) -> Metric | None:
    """The metric by which checkpoints are compared; None if there is none to compare.

    Args:
        wanted: `runner.best_metric`. Empty: the first of `DEFAULT_BEST`, else the first that is no baseline, of the
            averaged weights if they are measured.
        metrics: Those that the run reports.

    Raises:
        UserError: No metric has the wanted name.
    """
    if wanted and wanted not in metrics:
        raise UserError(
            f"runner.best_metric: validation reports no {wanted!r}{did_you_mean(wanted, metrics)} "
            f"(it reports {', '.join(metrics) or 'nothing'})"
        )
    own = [name for name, metric in metrics.items() if not metric.baseline]
    averaged = [f"{EMA}{own[0]}"] if own else []
    name = wanted or next((name for name in (*DEFAULT_BEST, *averaged, *own) if name in metrics), "")
    return metrics.get(name)


def compared_metric(run: RunConfig, plugins: LoadedPlugins) -> Metric | None:
    """The metric of this run by which checkpoints are compared; see `best_metric`.

    Raises:
        UserError: No metric has the wanted name, or the run needs one and has none.
    """
    runner = run.runner
    metric = best_metric(runner.best_metric, reported_metrics(run, plugins))
    if metric is None and (runner.save_best or runner.early_stop_patience):
        key = "save_best" if runner.save_best else "early_stop_patience"
        raise UserError(
            f"runner.{key} compares validations, but no evaluator of this run reports a metric: hold out episodes "
            "(data.validation_fraction), or name an evaluator with metrics in runner.evaluators"
        )
    return metric
