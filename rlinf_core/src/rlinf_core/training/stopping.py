"""When a run ends before its last step: a signal, or validations that no longer improve."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType

from rlinf_core.contract.run import RunConfig
from rlinf_core.errors import UserError, did_you_mean

SIGNALS = (signal.SIGINT, signal.SIGTERM)
AGAIN = 2.0
"""Seconds after which a second signal means that the user does not want to wait. Until then it is a repetition: Ctrl-C
reaches a worker from the terminal and again through torchrun."""
GRACE = 25.0
"""Seconds from a signal to the exit: torchrun kills its workers 30 seconds after it forwards one."""


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
            self._leaving = min(self._leaving, time.monotonic() + GRACE)
        return stopping

    def handle(self, number: int, _: FrameType | None) -> None:
        """Remember the first signal; a deliberate second one ends the process at once."""
        now = time.monotonic()
        if self.received is None:
            self.received, self._at = signal.Signals(number), now
            self._leaving = now + GRACE
        elif now - self._at > AGAIN:
            raise KeyboardInterrupt


def seconds_from_now(seconds: float) -> Callable[[], float]:
    """A function that returns how many of these seconds, counted from now, are left."""
    end = time.monotonic() + seconds
    return lambda: end - time.monotonic()


@contextmanager
def stop_signals() -> Iterator[StopSignal]:
    """Catch SIGINT and SIGTERM while the run trains, so that it can save before it exits."""
    stop = StopSignal()
    before = {number: signal.signal(number, stop.handle) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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

    def after(self, step: int, metric: str, value: float, min_delta: float) -> Best:
        """The best after another validation; NaN is never an improvement."""
        if metric != self.metric:
            return Best(metric=metric).after(step, metric, value, 0.0)
        if value < (math.inf if self.value is None else self.value) - min_delta:
            return Best(step, value, metric=metric)
        return replace(self, stale=self.stale + 1)

    def should_stop_early(self, wanted: str, patience: int) -> bool:
        """Whether `patience` validations in a row (0: never) did not improve the wanted metric."""
        return 0 < patience <= self.stale and wanted in ("", self.metric)


BASELINES = ("val_action_mse_mean", "val_action_mse_repeat")
"""Results of the two baselines that ignore observations."""
HEADLINES = ("val_loss", "ema_val_loss")
"""Results that a mixture also has over all sources."""


def result_names(run: RunConfig) -> tuple[str, ...]:
    """Names of a run's validation results for which smaller is better; empty if nothing is held out."""
    policy = run.policy
    own = ["val_loss", *(f"val_{name}" for name in policy.validation_metrics if name not in policy.larger_is_better)]
    own += ["val_action_mse"] if policy.chunk_length() else []
    ema = [f"ema_{name}" for name in own] if run.optim.ema_decay else []
    names = (*own, *ema, *(BASELINES if policy.chunk_length() else ()))
    held_out = [source.name for source in run.sources if source.run.data.has_validation]
    if not any(held_out):
        return names if held_out else ()
    return (*(name for name in HEADLINES if name in names), *(f"{name}/{of}" for of in held_out for name in names))


DEFAULT_BEST = ("ema_val_action_mse", "val_action_mse", "ema_val_loss", "val_loss")


def best_metric(wanted: str, results: Collection[str]) -> str:
    """The validation result by which checkpoints are compared.

    Raises:
        UserError: No result has the wanted name.
    """
    if wanted and wanted not in results:
        raise UserError(
            f"runner.best_metric: validation reports no {wanted!r} for which smaller is better"
            f"{did_you_mean(wanted, results)} (it reports {', '.join(results)})"
        )
    return wanted or next(name for name in DEFAULT_BEST if name in results)
