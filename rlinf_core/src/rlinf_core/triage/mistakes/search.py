"""Find the corrections that make rows look like training rows, if there are any.

Every correction is tried on rows of the site. The best one must gain more than any correction gains on training rows
that play the site, which is what corrections gain by chance (a correction for the number of hypotheses), and the gain
must hold when whole episodes are drawn again (the cluster bootstrap). Of corrections that gain about the same, the
simplest is chosen. As long as the corrected rows are unlike those of training, the search goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rlinf_core.triage.mistakes.corrections import NOTHING, Correction
from rlinf_core.triage.mistakes.likeness import Likeness
from rlinf_core.triage.mistakes.rows import Rows, Vectors

RESAMPLES = 1000
SURE = 0.002
"""Probability of a gain by chance of which episodes were drawn."""
LEAST_GAIN = 0.04
"""Least gain, relative to the usual cost of a row."""
MARGIN = 1.25
"""The gain must be this many times the largest that the corrections have on training rows."""
PRICE = 0.02
"""What a unit of complexity costs, relative to the usual cost of a row."""
SHOWN = 6
"""Corrections of a family that are kept for the page."""
HALF = 0.5
"""A cause explains at least this share of what the rows cost more than training rows."""
PART, TOGETHER = 0.15, 0.7
"""One of several causes explains at least the first share, and all of them together at least the second."""
MOST_STEPS = 4
"""Corrections that are found one after another."""
ALIKE = 3.0
"""Rows whose cost is within so many standard deviations of training's are like those of training."""


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

    def price(self, usual: float) -> float:
        """The cost with that of the correction's complexity."""
        return self.cost + PRICE * usual * self.correction.complexity


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


@dataclass(frozen=True, eq=False)
class Step:
    """One round of a search."""

    before: float
    """Mean cost of the rows as they were."""
    bar: float
    """The largest gain by chance."""
    tried: Mapping[str, tuple[Tried, ...]]
    """Family of corrections -> the best of them, the best first."""
    family: str = ""
    """The family of the accepted correction; empty if none was."""
    explained: float = 0.0
    """The share of the difference from training that it explains."""

    @property
    def best(self) -> Tried:
        """The accepted correction."""
        return self.tried[self.family][0]


@dataclass(frozen=True, eq=False)
class Explanation:
    """How a site differs from training."""

    steps: tuple[Step, ...]
    """Rounds, the last of which accepted nothing unless it explained everything."""
    site: Rows
    """The rows after all corrections."""
    correction: Correction
    """All corrections together."""
    usual: float
    """Mean cost of training rows."""
    left: Mapping[str, float]
    """Part of a row (`image front`, `state`, `action`) -> how far it is from training after all corrections, in
    standard deviations over episodes."""

    def of(self, family: str) -> list[Step]:
        """The rounds that accepted a correction of a family."""
        return [one for one in self.steps if one.family == family]


def explain(comparison: Comparison, families: Mapping[str, Callable[[Rows], Iterable[Correction]]]) -> Explanation:
    """Search for the corrections that explain how the site differs from training.

    Args:
        comparison: The rows.
        families: Name -> a function that lists the corrections to try on rows.
    """
    stand_in = _Costs(comparison, comparison.stand_in)
    usual, spread = float(stand_in.plain.mean()), stand_in.spread(comparison.seed)
    steps: list[Step] = []
    total, start = NOTHING, comparison
    for _ in range(MOST_STEPS):
        costs = _Costs(comparison, comparison.site)
        candidates = {name: list(made(comparison.site)) for name, made in families.items()}
        # What explains little may only resemble the mistake; but one of several mistakes explains only its part.
        least = PART if all(one.explained < HALF for one in steps) else HALF
        step = _step(candidates, costs, stand_in, usual, comparison.seed, least)
        steps.append(step)
        if not step.family:
            break
        best = step.best.correction
        total = total.then(best)
        comparison = comparison.corrected(best)
        if _Costs(comparison, comparison.site).plain.mean() < usual + ALIKE * spread:
            break
    if not _enough(steps, usual):
        # Corrections that explain little even together only resemble what is different.
        comparison, total = start, NOTHING
        steps = [replace(steps[0], family="", explained=0.0)]
    return Explanation(tuple(steps), comparison.site, total, usual, _left(comparison))


def _enough(steps: Sequence[Step], usual: float) -> bool:
    """Whether a correction explains half of a difference, or all together most of it."""
    accepted = [step for step in steps if step.family]
    if any(step.explained >= HALF for step in accepted):
        return True
    gained = sum(step.best.gain for step in accepted)
    parts = [part for step in accepted for part in step.best.correction.parts]
    # Several corrections of one camera fit anything; independent mistakes are in different parts of the rows.
    apart = len(parts) == len(set(parts))
    return bool(accepted) and apart and gained >= TOGETHER * max(steps[0].before - usual, 1e-9)


def _step(
    candidates: Mapping[str, Sequence[Correction]],
    costs: _Costs,
    stand_in: _Costs,
    usual: float,
    seed: int,
    least: float,
) -> Step:
    """One round: the best correction of all families, if it convinces and explains at least this share."""
    before = float(costs.plain.mean())
    tried = {
        name: tuple(sorted((_try(one, costs, usual, seed) for one in listed), key=lambda one: one.price(usual)))
        for name, listed in candidates.items()
    }
    shown = {name: found[:SHOWN] for name, found in tried.items()}
    best = min((name for name in tried if tried[name]), key=lambda name: tried[name][0].price(usual), default="")
    if not best or not _convinces(tried[best][0], 0.0, usual):
        return Step(before, 0.0, shown)
    first = tried[best][0]
    bar = usual  # No correction can gain more on training rows than they cost.
    if first.gain <= MARGIN * usual:
        bar = max(stand_in.by_chance(one) for listed in candidates.values() for one in listed)
    explained = float(np.clip(first.gain / max(before - min(usual, first.cost), 1e-9), 0, 1))
    convinces = _convinces(first, bar, usual) and explained >= least
    return Step(before, bar, shown, best if convinces else "", explained)


def _left(comparison: Comparison) -> dict[str, float]:
    """How far each part of the rows is from training."""
    here, there = comparison.likeness.blocks(comparison.site), comparison.likeness.blocks(comparison.stand_in)
    apart = comparison.stand_in.episodes[:, None] != comparison.likeness.reference.episodes[None]
    found = {}
    for name in here.keys() & there.keys():
        usual = np.where(apart, there[name], np.inf).min(1)
        spread = float(resampled(usual, comparison.stand_in.episodes, comparison.seed).std())
        own = here[name].min(1)
        both = np.hypot(spread, float(resampled(own, comparison.site.episodes, comparison.seed).std()))
        found[name] = float((own.mean() - usual.mean()) / max(both, 1e-9))
    return found


def _convinces(one: Tried, bar: float, usual: float) -> bool:
    return one.low > 0 and one.gain > max(MARGIN * max(bar, 0.0), LEAST_GAIN * usual)


class _Costs:
    """Costs of rows under corrections; blocks that a correction leaves alone are computed once."""

    def __init__(self, comparison: Comparison, rows: Rows) -> None:
        self.likeness, self.rows = comparison.likeness, rows
        self.other = rows is comparison.stand_in
        self.blocks = self.likeness.blocks(rows)
        self.motion = self.likeness.motion_cost(rows)
        self.plain = self._of(rows, self.blocks, self.motion)
        self._numbers: dict[tuple[str, int], NDArray[np.float32]] = {}
        self._chance: dict[tuple[str, str], float] = {}
        self._known: dict[int, tuple[Rows, Vectors]] = {}

    def _of(self, rows: Rows, blocks: dict[str, Vectors], motion: Vectors | None) -> Vectors:
        return self.likeness.cost(rows, blocks, motion, other_episodes=self.other)

    def of(self, correction: Correction) -> tuple[Rows, Vectors]:
        """The corrected rows, and their costs."""
        if correction is NOTHING:
            return self.rows, self.plain
        if id(correction) not in self._known:
            rows = correction.apply(self.rows)
            vectors = correction.state is not None or correction.actions is not None
            lag = bool(correction.image_lag or correction.state_lag)
            costs = self._of(rows, self._blocks(correction, rows), None if vectors or lag else self.motion)
            self._known = {id(correction): (rows, costs)}
        return self._known[id(correction)]

    def _blocks(self, correction: Correction, rows: Rows) -> dict[str, Vectors]:
        if correction.image_lag or correction.state_lag:
            return self.likeness.blocks(rows)
        blocks, likeness = dict(self.blocks), self.likeness
        for camera in correction.images:
            if f"image {camera}" in blocks:
                blocks[f"image {camera}"] = likeness.image_cost(camera, rows.images[camera])
        for key, change in (("state", correction.state), ("action", correction.actions)):
            if change is not None and key in blocks:
                blocks[key] = self._vector_block(key, rows)
        return blocks

    def _vector_block(self, key: str, rows: Rows) -> Vectors:
        """[M, N], the cost of changed vectors: only numbers that have changed are compared again."""
        before, after = self.likeness.vectors(self.rows, key), self.likeness.vectors(rows, key)
        if before is None or after is None:
            return self.blocks[key]
        scale, changed, reference = after
        numbers = np.flatnonzero((before[1] != changed).any(0)).tolist()
        block = self.blocks[key].copy()
        for number in numbers:
            if (key, number) not in self._numbers:
                self._numbers[key, number] = self.likeness.number_cost(*before, number)
            fresh = self.likeness.number_cost(scale, changed, reference, number)
            block += (fresh - self._numbers[key, number]) / changed.shape[1]
        return block

    def paired(self, correction: Correction) -> tuple[NDArray[np.int64], Vectors, Vectors]:
        """Episode, and costs before and after, of the rows that a correction keeps."""
        rows, after = self.of(correction)
        if len(rows) == len(self.rows):
            return self.rows.episodes, self.plain, after
        places = {int(index): at for at, index in enumerate(self.rows.indices.tolist())}
        at = [places[int(index)] for index in rows.indices.tolist()]
        return rows.episodes, self.plain[at], after

    def by_chance(self, correction: Correction) -> float:
        """What a correction gains on training rows; those of later rounds are often the same."""
        key = correction.mistake, correction.doing
        if key not in self._chance:
            _, before, after = self.paired(correction)
            self._chance[key] = float((before - after).mean()) if len(after) else 0.0
        return self._chance[key]

    def spread(self, seed: int) -> float:
        """Standard deviation of the mean cost, over draws of episodes."""
        return float(resampled(self.plain, self.rows.episodes, seed).std())


def _try(correction: Correction, costs: _Costs, usual: float, seed: int) -> Tried:
    episodes, before, after = costs.paired(correction)
    if not len(after):
        return Tried(correction, np.inf, -np.inf, -np.inf)
    gained = before - after
    gain = float(gained.mean())
    low = float(np.quantile(resampled(gained, episodes, seed), SURE)) if gain > LEAST_GAIN * usual else -np.inf
    # A correction that leaves rows out is compared on the rows that it keeps.
    return Tried(correction, float(costs.plain.mean()) - gain, gain, low)


def resampled(values: Vectors, episodes: NDArray[np.int64], seed: int) -> Vectors:
    """[RESAMPLES], means of the values when whole episodes are drawn again; rows, if there are few episodes."""
    numbers, group = np.unique(episodes, return_inverse=True)
    if len(numbers) < 4:
        group = np.arange(len(values)) // 4
        numbers = np.unique(group)
    sums, counts = np.bincount(group, values), np.bincount(group).astype(float)
    generator = np.random.Generator(np.random.Philox(key=seed))
    draws = generator.multinomial(len(numbers), np.full(len(numbers), 1 / len(numbers)), RESAMPLES)
    return np.asarray((draws @ sums) / np.maximum(draws @ counts, 1e-9))
