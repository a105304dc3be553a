"""Run the tests one after another, rank what they found, and say it in one sentence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

from rlinf_core.contract.triage import TriageOutcome, TriageTest, Verdict
from rlinf_core.errors import UserError
from rlinf_core.plugins.owners import CORE, Owner
from rlinf_core.plugins.registry import Plugins
from rlinf_core.triage.scene import Scene

RANKS: dict[Verdict, int] = {"cause": 0, "suspicious": 1, "fine": 2, "skipped": 3}


@dataclass(frozen=True)
class Finding:
    """A test and what it found."""

    test: type[TriageTest]
    owner: Owner
    outcome: TriageOutcome
    seconds: float


@dataclass(frozen=True)
class Triage:
    """What a chain found."""

    findings: tuple[Finding, ...]
    """In the order in which the tests ran."""

    @property
    def ranked(self) -> list[Finding]:
        """Causes and suspicions, the most likely first."""
        found = [one for one in self.findings if one.outcome.verdict in ("cause", "suspicious")]
        return sorted(found, key=lambda one: (RANKS[one.outcome.verdict], one.outcome.symptom, -one.outcome.strength))

    @property
    def cause(self) -> Finding | None:
        """The most likely cause; None if no test found one."""
        first = next(iter(self.ranked), None)
        return first if first and first.outcome.verdict == "cause" else None

    @property
    def sentence(self) -> str:
        """One sentence that names the cause."""
        if self.cause is not None:
            outcome = self.cause.outcome
            return f"Cause: {outcome.sentence}. {outcome.way_out}."
        tested = sum(one.outcome.verdict != "skipped" for one in self.findings)
        skipped = [one.test.name for one in self.findings if one.outcome.verdict == "skipped"]
        text = f"No cause found in {tested} tests"
        if suspicions := self.ranked:
            text += f"; suspicious: {suspicions[0].outcome.sentence}"
        if skipped:
            text += f". Not tested: {', '.join(skipped)}"
        return f"{text}."

    def to_json(self) -> dict[str, Any]:
        """The result for programs."""
        return {
            "cause": None if self.cause is None else self.cause.test.name,
            "sentence": self.sentence,
            "tests": [
                {
                    "name": one.test.name,
                    "question": one.test.question,
                    "verdict": one.outcome.verdict,
                    "sentence": one.outcome.sentence,
                    "way_out": one.outcome.way_out,
                    "strength": round(one.outcome.strength, 4),
                    "symptom": one.outcome.symptom,
                    "seconds": round(one.seconds, 2),
                    "tables": [table.model_dump(mode="json") for table in one.outcome.tables],
                }
                for one in self.findings
            ],
        }


def run_tests(scene: Scene, plugins: Plugins, report: Callable[[Finding], object] = lambda one: None) -> Triage:
    """Run all registered tests.

    Args:
        scene: What they look at.
        plugins: The plugins that register them.
        report: Called with each finding when its test is done.
    """
    findings = []
    for test, owner in registered_tests(plugins):
        started = monotonic()
        outcome = _run(test, owner, scene)
        finding = Finding(test, owner, outcome, monotonic() - started)
        findings.append(finding)
        report(finding)
    return Triage(tuple(findings))


def registered_tests(plugins: Plugins) -> Sequence[tuple[type[TriageTest], Owner]]:
    """Core's tests in their own order, then those of plugins by name."""
    from rlinf_core.triage.builtin import TESTS

    order = {test.name: number for number, test in enumerate(TESTS)}
    found = {one.name: one for one in plugins.registered_as("triage")}
    known = [plugins.find("triage", name) for name in found]
    known.sort(key=lambda one: (one.owner.distribution != CORE, order.get(one.name, len(order)), one.name))
    return [(one.item, one.owner) for one in known]


def _run(test: type[TriageTest], owner: Owner, scene: Scene) -> TriageOutcome:
    if test.needs_site and scene.site is None:
        return TriageOutcome("skipped", "no rows of the site were given (--dataset)")
    try:
        return test().run(scene)
    except UserError as error:
        return TriageOutcome("skipped", str(error))
    except Exception as error:
        error.add_note(f"in the triage test {test.name!r} of {owner}")
        raise
