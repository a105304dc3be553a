"""Validation of a run's datasets: each in its own units, and of a mixture the loss over all.

Action errors of different robots have different units, so that there is none of a mixture as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlinf_core.contract.datasets import SampleSource
from rlinf_core.contract.run import RunConfig
from rlinf_core.data.loading.mixture import Source
from rlinf_core.training.distributed.processes import Processes
from rlinf_core.training.ema import Ema
from rlinf_core.training.evaluation import Validation
from rlinf_core.training.stopping import HEADLINES, best_metric, result_names


class MixtureValidation:
    """Measures a policy on every source that holds out episodes.

    The result `<key>` of a source is `<key>/<name>`. `val_loss` (and `ema_val_loss`) is the mean of the sources',
    weighted as training draws from them: the held-out loss of what is trained.
    """

    def __init__(self, parts: Mapping[str, Validation], shares: Mapping[str, float]) -> None:
        self._parts = dict(parts)
        whole = sum(shares[name] for name in parts)
        self._shares = {name: shares[name] / whole for name in parts}

    def __call__(
        self, policy: Any, ema: Ema | None = None, interrupted: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """Validate; every rank calls it and gets the same results. Arguments are those of `Validation`."""
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
        """What the policy says of held-out samples of each source."""
        return [f"{name}: {text}" for name, part in self._parts.items() for text in part.demonstrate(policy)]


def open_validation(
    run: RunConfig, sources: Sequence[Source], held_out: Sequence[SampleSource | None], group: Processes
) -> Validation | MixtureValidation | None:
    """What measures a run's policy on its held-out rows; None if there are none.

    Raises:
        UserError: `runner.best_metric` is no result of it.
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
    best_metric(run.runner.best_metric, result_names(run))  # Better refused now than at the first validation.
    return validation
