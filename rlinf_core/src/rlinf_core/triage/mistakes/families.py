"""All families of known mistakes, tried together: the mistake that explains a site best decides which test names it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from rlinf_core.triage.mistakes.changes import Named
from rlinf_core.triage.mistakes.corrections import Correction
from rlinf_core.triage.mistakes.images import image_corrections
from rlinf_core.triage.mistakes.likeness import Likeness
from rlinf_core.triage.mistakes.rows import Rows
from rlinf_core.triage.mistakes.search import Comparison, Explanation, explain
from rlinf_core.triage.mistakes.vectors import action_corrections, state_corrections

LAGS = (-3, -2, -1, 1, 2, 3)
"""Steps by which observations may be late (above 0) or early."""


Family = Callable[[Rows], Iterable[Correction]]
"""Lists the corrections to try on rows of the site."""


def explain_site(comparison: Comparison, names: Mapping[str, Sequence[str]]) -> Explanation:
    """How the site differs from training, with the corrections of all families.

    Args:
        comparison: The site beside training.
        names: `state` and `actions` -> the dataset's names of their numbers.
    """
    return explain(comparison, all_families(comparison.likeness, names))


def all_families(likeness: Likeness, names: Mapping[str, Sequence[str]]) -> dict[str, Family]:
    """The name of the test that names a mistake -> its corrections."""
    reference = likeness.reference

    def states(site: Rows) -> Iterable[Correction]:
        if likeness.state is None or site.state is None:
            return ()
        named = Named("state", names.get("state", ()), site.state.shape[1])
        return state_corrections(named, likeness.state, site, reference)

    def actions(site: Rows) -> Iterable[Correction]:
        named = Named("action", names.get("actions", ()), site.actions.shape[2])
        return action_corrections(named, likeness.action, site, reference)

    return {
        "cameras": lambda site: image_corrections(reference, site),
        "state": states,
        "actions": actions,
        "timing": _lags,
    }


def _lags(site: Rows) -> Iterator[Correction]:
    for lag in LAGS:
        steps = f"{abs(lag)} step{'s' * (abs(lag) > 1)}"
        late = "late" if lag > 0 else "early"
        way_out = "Pair each observation with the action that was taken on it: stamp both with the time of capture"
        for what, image_lag, state_lag in (("observations", lag, lag), ("images", lag, 0), ("the state", 0, lag)):
            if state_lag and site.state is None:
                continue
            yield Correction(
                mistake=f"{what} {'is' if what == 'the state' else 'are'} {steps} {late}",
                doing=f"using {what} of {steps} {'later' if lag > 0 else 'before'}",
                way_out=way_out,
                image_lag=image_lag,
                state_lag=state_lag,
                complexity=0.8 + 0.2 * abs(lag) + 0.2 * (what != "observations"),
            )
