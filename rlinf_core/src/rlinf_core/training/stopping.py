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
"""Seconds after which a second signal is a person who will not wait. Until then it is the same one: Ctrl-C reaches a
worker from the terminal and once more from torchrun."""
GRACE = 25.0
"""Seconds from a signal to the end: torchrun kills 30 seconds after it has passed one on."""


class StopSignal:
    """Whether this process was asked to stop; ranks then agree on the step after which they do."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._at = 0.0
        self._leaving = math.inf

    def seconds_left(self) -> float:
        """Until this process must have left; infinite as long as it may stay."""
        return self._leaving - time.monotonic()

    def agreed(self, stopping: bool) -> bool:
        """Learn whether the ranks have agreed to stop, as they do where any of them got a signal."""
        if stopping:
            self._leaving = min(self._leaving, time.monotonic() + GRACE)
        return stopping

    def handle(self, number: int, _: FrameType | None) -> None:
        """Remember the first signal; a later one that is meant gets through at once."""
        now = time.monotonic()
        if self.received is None:
            self.received, self._at = signal.Signals(number), now
            self._leaving = now + GRACE
        elif now - self._at > AGAIN:
            raise KeyboardInterrupt


def seconds_from_now(seconds: float) -> Callable[[], float]:
    """How much is left of a time that begins now."""
    end = time.monotonic() + seconds
    return lambda: end - time.monotonic()


@contextmanager
def stop_signals() -> Iterator[StopSignal]:
    """Catch SIGINT and SIGTERM for as long as the run trains, so that it can save before it leaves."""
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
    """Finished steps; 0: there was no validation yet."""
    value: float | None = None
    """What `runner.best_metric` was there."""
    stale: int = 0
    """Validations since then that were no better."""
    metric: str = ""
    """Which result was compared."""

    def after(self, step: int, metric: str, value: float, min_delta: float) -> Best:
        """What is best after another validation; a value that is not a number is no improvement."""
        if metric != self.metric:
            return Best(metric=metric).after(step, metric, value, 0.0)
        if value < (math.inf if self.value is None else self.value) - min_delta:
            return Best(step, value, metric=metric)
        return replace(self, stale=self.stale + 1)

    def should_stop_early(self, wanted: str, patience: int) -> bool:
        """Whether as many validations as `patience` (if it is not 0) were no better, by the wanted metric."""
        return 0 < patience <= self.stale and wanted in ("", self.metric)


BASELINES = ("val_action_mse_mean", "val_action_mse_repeat")
"""Results of the two policies that look at nothing."""
HEADLINES = ("val_loss", "ema_val_loss")
"""Results that a mixture has as a whole."""


def result_names(run: RunConfig) -> tuple[str, ...]:
    """The names of what a run's validation results in and of which smaller is better; empty: nothing is held out."""
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
    """The result of validation by which checkpoints are compared.

    Raises:
        UserError: There is no result of the wanted name.
    """
    if wanted and wanted not in results:
        raise UserError(
            f"runner.best_metric: validation reports no {wanted!r} of which smaller is better"
            f"{did_you_mean(wanted, results)} (it reports {', '.join(results)})"
        )
    return wanted or next(name for name in DEFAULT_BEST if name in results)
