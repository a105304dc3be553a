"""The test in closed loop: success in a simulator, with the settings of an evaluation that change it most."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import comb
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from rlinf_core.contract.triage import TriageOutcome, TriageTest
from rlinf_core.results import Cell, Estimate, ResultTable, cell_text, wilson_interval
from rlinf_core.rollout.agents import POLICY, Agent, PolicyAgent
from rlinf_core.rollout.config import RolloutSettings
from rlinf_core.rollout.episodes import Result, plan_episodes
from rlinf_core.rollout.play import answer
from rlinf_core.rollout.pool import Asking, Pool
from rlinf_core.triage.scene import Scene, Simulator

LONGER = 1.5
"""The horizon is played so many times as long, to see what it cuts off."""
SETTLE = 20
"""Control steps to let the scene settle, if no others are configured."""
CHANCE = 0.02
"""Probability that a setting is better on the same episodes by chance."""
LOST, LOW = 0.25, 0.5
"""Share of successes that may be lost until the end; success below which something must be wrong."""


@dataclass(eq=False)
class LateAgent:
    """A policy whose observations are one look late: it executes the later part of the chunk before."""

    agent: PolicyAgent
    replan: int
    looks: bool = True
    before: dict[tuple[str, str, int], NDArray[np.floating]] = field(default_factory=dict)

    def __call__(self, asking: Sequence[Asking]) -> list[NDArray[np.floating]]:
        """The actions of each episode; at its start, those of the first observation."""
        chunks = self.agent(asking)
        found = []
        for one, chunk in zip(asking, chunks, strict=True):
            late = self.before.get(one.episode.key) if one.steps else None
            found.append(chunk[: self.replan] if late is None else late[self.replan : 2 * self.replan])
            self.before[one.episode.key] = chunk
        return found


@dataclass(frozen=True)
class Variant:
    """A way to evaluate."""

    name: str
    settings: RolloutSettings
    agent: Agent
    way_out: str = ""
    """What to do if it is better; empty: it cannot be chosen, and only shows what matters."""


class ClosedLoopTest(TriageTest):
    """Success in the simulator: as configured, with fewer executed actions, a longer horizon, settling, and latency."""

    name = "closed loop"
    question = "Does the policy succeed in the simulator, and with which settings?"

    def run(self, scene: Scene) -> TriageOutcome:
        """Play episodes, the configured setting first, as long as there is time."""
        simulator = scene.simulator
        if simulator is None or not simulator.closed_loop:
            return TriageOutcome("skipped", "no episodes were played (--env with --episodes)")
        until, longest = monotonic() + 60 * simulator.minutes, 0.0
        played: dict[str, list[Result]] = {}
        variants = list(_variants(scene, simulator))
        for variant in variants:
            started = monotonic()
            if played and started + longest > until:
                break
            played[variant.name] = _play(variant, until)
            longest = max(longest, monotonic() - started)
        left_out = [one.name for one in variants if one.name not in played]
        return _judged(simulator.settings, variants, played, left_out)


def _variants(scene: Scene, simulator: Simulator) -> Iterator[Variant]:
    """Ways to evaluate, those that matter most first."""
    settings, act, chunk = simulator.settings, scene.policy.act, scene.policy.config.chunk_length()
    env = settings.env
    executed = min(env.replan or chunk, chunk)
    horizon = env.horizon or max(task.horizon for task in settings.chosen_tasks())
    longer = settings.model_copy(update={"env": env.model_copy(update={"horizon": round(LONGER * horizon)})})
    yield Variant("as configured", longer, PolicyAgent(act, executed))
    for replan in dict.fromkeys((max(1, executed // 2), 1)):
        if replan < executed:
            way_out = f"Set env.replan = {replan} (--replan)"
            yield Variant(f"{replan} executed actions, not {executed}", longer, PolicyAgent(act, replan), way_out)
    settle = 0 if env.settle_steps else SETTLE
    settled = longer.model_copy(update={"env": longer.env.model_copy(update={"settle_steps": settle})})
    way_out = f"Set env.settle_steps = {settle}, if the data were recorded so"
    yield Variant(f"{settle} settle steps, not {env.settle_steps}", settled, PolicyAgent(act, executed), way_out)
    if 2 * executed <= chunk:
        late = LateAgent(PolicyAgent(act, 2 * executed), executed)
        yield Variant(f"observations {executed} actions late", longer, late)


def _play(variant: Variant, until: float) -> list[Result]:
    """Results of the episodes that are finished in time."""
    results: list[Result] = []
    settings = variant.settings.model_copy(update={"videos": 0, "baselines": ()})
    episodes = plan_episodes([POLICY], settings.chosen_tasks(), settings.episodes, settings.seed)
    with Pool(settings, episodes, looks=lambda name: True, finished=results.append) as pool:
        while pool.unfinished and monotonic() < until:
            answer(pool, pool.asking(max(0.0, until - monotonic())), {POLICY: variant.agent})
    return results


def _judged(
    settings: RolloutSettings, variants: Sequence[Variant], played: Mapping[str, Sequence[Result]], left_out: list[str]
) -> TriageOutcome:
    limits = {task.name: settings.env.horizon or task.horizon for task in settings.chosen_tasks()}
    configured = played[variants[0].name]
    if not configured:
        return TriageOutcome("skipped", "no episode ended in time: allow more minutes, or name fewer tasks")
    in_time = {one.key: one.ever and (one.first_success or 0) <= limits[one.task] for one in configured}
    outcomes: dict[str, dict[tuple[str, str, int], bool]] = {variants[0].name: in_time}
    horizon = f"{LONGER:g} times the horizon"
    outcomes[horizon] = {one.key: one.ever for one in configured}
    ways = {horizon: f"Set env.horizon = {round(LONGER * max(limits.values()))}, or accept slower episodes as failures"}
    for variant in variants[1:]:
        results = played.get(variant.name, ())
        if results:
            outcomes[variant.name] = {
                one.key: one.ever and (one.first_success or 0) <= limits[one.task] for one in results
            }
            ways[variant.name] = variant.way_out
    rates = {name: _rate(found) for name, found in outcomes.items()}
    table = _closed_table(outcomes, rates, configured, left_out)
    text = f"it succeeds in {cell_text(rates[variants[0].name])} of {len(configured)} episodes"
    better = {name: _chance(in_time, outcomes[name]) for name, way_out in ways.items() if way_out}
    best = min(better, key=lambda name: better[name])
    if better[best] < CHANCE:
        gain = rates[best].value - rates[variants[0].name].value
        sentence = f"{text}, and in {cell_text(rates[best])} with {best}"
        return TriageOutcome("cause", sentence, ways[best], strength=max(gain, 0.1), tables=[table])
    successes = sum(one.ever for one in configured)
    lost = sum(one.ever and not one.success for one in configured)
    if lost > LOST * max(successes, 1) and lost > 2:
        sentence = f"{text}, but {lost} of {successes} successes are lost until the end: success ever is not success"
        way_out = "Say which of both is meant; env.after_success sets how long an episode goes on"
        return TriageOutcome("suspicious", sentence, way_out, strength=0.3, tables=[table])
    if rates[variants[0].name].high < LOW or not any(in_time.values()):
        return TriageOutcome("suspicious", text, "Look at the other tests", 0.3, symptom=True, tables=[table])
    return TriageOutcome("fine", f"{text}, and no other setting is better", tables=[table])


def _chance(own: Mapping[tuple[str, str, int], bool], other: Mapping[tuple[str, str, int], bool]) -> float:
    """Probability of so many more successes on the same episodes by chance (the sign test)."""
    gained = sum(other[key] and not own[key] for key in own.keys() & other.keys())
    lost = sum(own[key] and not other[key] for key in own.keys() & other.keys())
    every = gained + lost
    return sum(comb(every, k) for k in range(gained, every + 1)) / 2**every if every else 1.0


def _rate(outcomes: Mapping[tuple[str, str, int], bool]) -> Estimate:
    return wilson_interval(sum(outcomes.values()), max(len(outcomes), 1))


def _closed_table(
    outcomes: Mapping[str, Mapping[tuple[str, str, int], bool]],
    rates: Mapping[str, Estimate],
    configured: Sequence[Result],
    left_out: Sequence[str],
) -> ResultTable:
    rows: list[tuple[Cell, ...]] = [(name, rates[name], len(found)) for name, found in outcomes.items()]
    end = wilson_interval(sum(one.success for one in configured), len(configured))
    rows.append(("success at the end, not ever", end, len(configured)))
    note = "In parentheses: 95 % Wilson intervals. All settings play the same episodes."
    if left_out:
        note += f" Not played, for lack of time: {', '.join(left_out)}."
    return ResultTable(
        title="Success in the simulator", columns=("setting", "success", "episodes"), rows=tuple(rows), note=note
    )
