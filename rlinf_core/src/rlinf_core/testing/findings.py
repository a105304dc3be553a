"""What a check found: every broken rule in one error, and an account of what was and was not looked at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Report:
    """What a check that found nothing wrong looked at."""

    subject: str
    checked: tuple[str, ...]
    """What holds, in the order in which it was checked."""
    not_checked: tuple[str, ...]
    """What could not be looked at, and why."""

    def __str__(self) -> str:
        lines = [f"{self.subject} conforms"]
        lines += [f"  checked: {what}" for what in self.checked]
        lines += [f"  not checked: {what}" for what in self.not_checked]
        return "\n".join(lines)


@dataclass
class Findings:
    """The findings of a check so far."""

    subject: str
    broken: list[str] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)

    def expect(self, holds: bool, rule: str, found: object = None) -> bool:
        """Note a rule, and that it is broken if it does not hold; returns whether it holds."""
        if holds:
            self.checked.append(rule)
        else:
            self.broken.append(rule if found is None else f"{rule}; found {_line(found)}")
        return holds

    def attempt(self, rule: str, function: Callable[[], T]) -> T | None:
        """Call what must not raise; returns its result, or None after noting what it raised."""
        try:
            result = function()
        except Exception as error:
            self.broken.append(f"{rule}; it raised {type(error).__name__}: {_line(error)}")
            return None
        self.checked.append(rule)
        return result

    def skip(self, what: str) -> None:
        """Note what could not be looked at, and why."""
        self.not_checked.append(what)

    def report(self) -> Report:
        """The account of a check that found nothing.

        Raises:
            AssertionError: Something is broken; the message has one line for each finding.
        """
        if self.broken:
            rules = "rule" if len(self.broken) == 1 else "rules"
            lines = [f"{self.subject} breaks {len(self.broken)} {rules}:", *(f"  {line}" for line in self.broken)]
            raise AssertionError("\n".join([*lines, *(f"  (not checked: {what})" for what in self.not_checked)]))
        return Report(self.subject, tuple(dict.fromkeys(self.checked)), tuple(self.not_checked))


def _line(found: object) -> str:
    return "; ".join(part.strip() for part in str(found).splitlines())
