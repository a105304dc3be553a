"""Find the correction that makes rows look like training rows, if there is one.

Every correction is tried on rows of the site, and on rows of training that play the site: what a correction gains there
is what it gains by chance, and the largest of those gains is the bar for the site (a correction for the number of
hypotheses). The gain must also hold when whole episodes are drawn again (the cluster bootstrap). Of corrections that
gain about the same, the simplest is chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rlinf_core.triage.corrections import NOTHING, Correction
from rlinf_core.triage.likeness import Likeness
from rlinf_core.triage.rows import Rows, Vectors

RESAMPLES = 1000
SURE = 0.002
"""Probability of a gain by chance of which episodes were drawn."""
LEAST_GAIN = 0.04
"""Least gain, relative to the usual cost of a row."""
MARGIN = 1.25
"""The gain must be this many times the largest that the corrections have on training rows."""
PRICE = 0.02
"""What a unit of complexity costs, relative to the usual cost of a row."""
HALF = 0.5
"""A cause explains at least this share of what the rows cost more than training rows."""
MOST_STEPS = 2
"""Corrections that are combined."""


@dataclass(frozen=True, eq=False)
class Tried:
    """A correction and what it gains."""

    correction: Correction
    cost: float
    """Mean cost of the corrected rows."""
    gain: float
    """Fall of the mean cost."""
    low: float
    """Lower end of the gain's interval."""
    by_chance: float
    """What the correction gains on training rows."""


@dataclass(frozen=True, eq=False)
class Search:
    """What a search found."""

    before: float
    """Mean cost of the rows as they are."""
    usual: float
    """Mean cost of training rows."""
    spread: float
    """Standard deviation of the mean cost of as many training rows, over episodes."""
    bar: float
    """The largest gain by chance."""
    tried: tuple[Tried, ...]
    """The best corrections, the best first."""
    best: Correction | None
    """The correction that explains the difference; None if none does."""
    explained: float = 0.0
    """The share of the difference that it explains."""

    @property
    def unlike(self) -> float:
        """How far the rows are from training, in standard deviations of the mean over episodes."""
        return (self.before - self.usual) / max(self.spread, 1e-9)


@dataclass(frozen=True, eq=False)
class Comparison:
    """Rows of the site beside training rows, and training rows that play the site."""

    likeness: Likeness
    site: Rows
    stand_in: Rows
    """Training or held-out rows, chosen as those of the site."""
    seed: int = 0

    def corrected(self, correction: Correction) -> Comparison:
        """The comparison after a correction of the site."""
        return replace(self, site=correction.apply(self.site))


def search(comparison: Comparison, corrections: Iterable[Correction], *, steps: int = MOST_STEPS) -> Search:
    """Search for the correction that explains how the site differs from training.

    Args:
        comparison: The rows.
        corrections: What to try.
        steps: Corrections that may be combined.
    """
    candidates = list(corrections)
    costs, stand_in = _Costs(comparison, comparison.site), _Costs(comparison, comparison.stand_in)
    usual = stand_in.mean(NOTHING)
    tried = [_try(one, costs, stand_in, usual, comparison.seed) for one in candidates]
    bar = max((one.by_chance for one in tried), default=0.0)
    tried.sort(key=lambda one: one.cost + PRICE * usual * one.correction.complexity)
    before, spread = costs.mean(NOTHING), stand_in.spread(comparison.seed)
    found = Search(before, usual, spread, bar, tuple(tried[:8]), None)
    if not tried or not _convinces(tried[0], bar, usual):
        return found
    best = tried[0]
    for _ in range(steps - 1):
        rest = [replace(one, complexity=one.complexity + 1) for one in candidates]
        together = [_combined(best.correction, one) for one in rest]
        more = [_try(one, costs, stand_in, usual, comparison.seed) for one in together]
        better = min(more, key=lambda one: one.cost + PRICE * usual * one.correction.complexity)
        again = replace(better, gain=best.cost - better.cost, low=better.low - best.gain)
        if not _convinces(again, bar, usual) or again.gain < 0.3 * best.gain:
            break
        best = better
    floor = min(usual, best.cost)
    explained = float(np.clip(best.gain / max(before - floor, 1e-9), 0, 1))
    return replace(found, best=best.correction if explained >= HALF else None, explained=explained)


def _combined(first: Correction, second: Correction) -> Correction:
    return first.then(second)


def _convinces(one: Tried, bar: float, usual: float) -> bool:
    return one.low > 0 and one.gain > max(MARGIN * max(bar, 0.0), LEAST_GAIN * usual)


class _Costs:
    """Costs of rows under corrections; blocks that a correction leaves alone are computed once."""

    def __init__(self, comparison: Comparison, rows: Rows) -> None:
        self.likeness, self.rows = comparison.likeness, rows
        self.other = rows is comparison.stand_in
        self.blocks = self.likeness.blocks(rows)
        self.plain = self._of(rows, self.blocks)
        self._known: dict[int, tuple[Rows, Vectors]] = {}

    def _of(self, rows: Rows, blocks: dict[str, Vectors]) -> Vectors:
        return self.likeness.cost(rows, blocks, other_episodes=self.other)

    def of(self, correction: Correction) -> tuple[Rows, Vectors]:
        """The corrected rows, and their costs."""
        if correction is NOTHING:
            return self.rows, self.plain
        if id(correction) not in self._known:
            rows = correction.apply(self.rows)
            self._known = {id(correction): (rows, self._of(rows, self._blocks(correction, rows)))}
        return self._known[id(correction)]

    def _blocks(self, correction: Correction, rows: Rows) -> dict[str, Vectors]:
        if correction.image_lag or correction.state_lag:
            return self.likeness.blocks(rows)
        blocks, likeness = dict(self.blocks), self.likeness
        for camera in correction.images:
            if f"image {camera}" in blocks:
                blocks[f"image {camera}"] = likeness.image_cost(camera, rows.images[camera])
        changed = [key for key, one in (("state", correction.state), ("action", correction.actions)) if one is not None]
        if changed:
            fresh = likeness.blocks(replace(rows, images={}))
            blocks |= {key: fresh[key] for key in changed if key in fresh}
        return blocks

    def paired(self, correction: Correction) -> tuple[Vectors, Vectors, Vectors]:
        """Episode, and costs before and after, of the rows that a correction keeps."""
        rows, after = self.of(correction)
        if len(rows) == len(self.rows):
            return self.rows.episodes, self.plain, after
        places = {int(index): at for at, index in enumerate(self.rows.indices.tolist())}
        at = [places[int(index)] for index in rows.indices.tolist()]
        return rows.episodes, self.plain[at], after

    def mean(self, correction: Correction) -> float:
        """Mean cost of the corrected rows."""
        return float(self.of(correction)[1].mean())

    def spread(self, seed: int) -> float:
        """Standard deviation of the mean cost, over draws of episodes."""
        return float(_resampled(self.plain, self.rows.episodes, seed).std())


def _try(correction: Correction, costs: _Costs, stand_in: _Costs, usual: float, seed: int) -> Tried:
    episodes, before, after = costs.paired(correction)
    if not len(after):
        return Tried(correction, np.inf, -np.inf, -np.inf, 0.0)
    gained = before - after
    gain = float(gained.mean())
    _, usual_before, usual_after = stand_in.paired(correction)
    by_chance = float((usual_before - usual_after).mean()) if len(usual_after) else 0.0
    low = float(np.quantile(_resampled(gained, episodes, seed), SURE)) if gain > LEAST_GAIN * usual else -np.inf
    # A correction that leaves rows out is compared on the rows that it keeps.
    return Tried(correction, float(costs.plain.mean()) - gain, gain, low, by_chance)


def _resampled(values: Vectors, episodes: Vectors, seed: int) -> Vectors:
    """[RESAMPLES], means of the values when whole episodes are drawn again; rows, if there are few episodes."""
    numbers, group = np.unique(episodes, return_inverse=True)
    if len(numbers) < 4:
        group = np.arange(len(values)) // 4
        numbers = np.unique(group)
    sums, counts = np.bincount(group, values), np.bincount(group).astype(float)
    generator = np.random.Generator(np.random.Philox(key=seed))
    draws = generator.multinomial(len(numbers), np.full(len(numbers), 1 / len(numbers)), RESAMPLES)
    return np.asarray((draws @ sums) / np.maximum(draws @ counts, 1e-9))


def named_gain(search: Search) -> Sequence[tuple[str, float]]:
    """The best corrections in words, with the cost that they leave."""
    return [(one.correction.doing, one.cost) for one in search.tried]
