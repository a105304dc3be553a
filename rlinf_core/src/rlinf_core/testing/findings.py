"""Results of a check: every broken rule in one error, and a report of what was and was not checked."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Report:
    """The report of a check without findings."""

    subject: str
    checked: tuple[str, ...]
    """The rules that hold, in the order in which they were checked."""
    not_checked: tuple[str, ...]
    """What could not be checked, and why."""
    warnings: tuple[str, ...] = ()
    """What is probably a mistake, but breaks no rule. Each is also a Python warning, which pytest shows."""

    def __str__(self) -> str:
        lines = [f"{self.subject} conforms"]
        lines += [f"  checked: {what}" for what in self.checked]
        lines += [f"  not checked: {what}" for what in self.not_checked]
        lines += [f"  warning: {what}" for what in self.warnings]
        return "\n".join(lines)


@dataclass
class Findings:
    """The findings of a check so far."""

    subject: str
    broken: list[str] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    sample: str = ""
    """The sample that the rules were tried on; the error has it as a note."""

    def expect(self, holds: bool, rule: str, found: object = None) -> bool:
        """Record whether a rule holds, and return that."""
        if holds:
            self.checked.append(rule)
        else:
            self.broken.append(rule if found is None else f"{rule}; found {_line(found)}")
        return holds

    def attempt(self, rule: str, function: Callable[[], T]) -> T | None:
        """Call a function that must not raise. Returns its result, or None after recording the exception."""
        try:
            result = function()
        except Exception as error:
            self.broken.append(f"{rule}; it raised {type(error).__name__}: {_line(error)}")
            return None
        self.checked.append(rule)
        return result

    def skip(self, what: str) -> None:
        """Record what could not be checked, and why."""
        self.not_checked.append(what)

    def warn(self, what: str) -> None:
        """Record what is probably a mistake."""
        self.warnings.append(what)

    def report(self) -> Report:
        """The report of a check without findings.

        Raises:
            AssertionError: A rule is broken; the message has one line per finding.
        """
        for what in self.warnings:
            warnings.warn(f"{self.subject}: {what}", stacklevel=3)
        if self.broken:
            rules = "rule" if len(self.broken) == 1 else "rules"
            lines = [f"{self.subject} breaks {len(self.broken)} {rules}:", *(f"  {line}" for line in self.broken)]
            error = AssertionError("\n".join([*lines, *(f"  (not checked: {what})" for what in self.not_checked)]))
            if self.sample:
                error.add_note(self.sample)
            raise error
        return Report(self.subject, tuple(dict.fromkeys(self.checked)), tuple(self.not_checked), tuple(self.warnings))


def _line(found: object) -> str:
    return "; ".join(part.strip() for part in str(found).splitlines())
