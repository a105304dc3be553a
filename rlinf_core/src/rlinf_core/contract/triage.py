"""Tests of `rlinf triage`: why a policy with a low loss does not act well. Torch-free.

A test answers one question about a trained policy, its data and the place where it acts. Core's own tests and those of
plugins (`rlinf_register_triage`) run in one chain; the strongest cause is what `rlinf triage` names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from rlinf_core.contract.datasets import SampleSource
from rlinf_core.results import ResultTable

Verdict = Literal["fine", "suspicious", "cause", "skipped"]


@dataclass(frozen=True)
class TriageOutcome:
    """What a test found."""

    verdict: Verdict
    """`cause` explains a policy that does not act well, `suspicious` may; `skipped`: what the test needs is missing."""
    sentence: str
    """What was found, with a number, without a full stop. That of a cause ends the report."""
    way_out: str = ""
    """What to do about it, without a full stop."""
    strength: float = 0.0
    """How much of the difference it explains, from 0 to 1. The strongest cause is named first."""
    symptom: bool = False
    """Whether it may follow from another mistake, as a large action error does: it is named if there is no other."""
    tables: Sequence[ResultTable] = ()
    """Numbers for the page."""
    images: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict)
    """Caption -> image, [height, width, 3], for the page."""


class TriageScene(Protocol):
    """What is open while tests run."""

    @property
    def policy(self) -> Any:
        """The loaded policy, a `LoadedPolicy`: its `config`, `data`, `pipeline`, `module` and `infer`."""
        ...

    @property
    def training(self) -> SampleSource | None:
        """The rows that it was trained on; None if they are not on this machine."""
        ...

    @property
    def held_out(self) -> SampleSource | None:
        """Rows of the episodes that were held out of training; None if there are none."""
        ...

    @property
    def site(self) -> SampleSource | None:
        """Rows from the place where the policy acts, in the dataset's format; None if none were given."""
        ...

    @property
    def seed(self) -> int:
        """Seed of everything random."""
        ...

    @property
    def progress(self) -> Callable[[int, int], object]:
        """To be called with finished and all steps of a slow test."""
        ...


class TriageTest:
    """One test of the chain. A subclass sets the class variables and defines `run`."""

    name: ClassVar[str]
    """A word or two in lower case, unique among all tests."""
    question: ClassVar[str]
    """The question that it answers, in one line."""
    needs_site: ClassVar[bool] = False
    """Whether it needs rows from the place where the policy acts: without them, it is skipped."""

    def run(self, scene: Any) -> TriageOutcome:
        """Answer the question. Called once, in the order of registration, core's tests first.

        Args:
            scene: A `TriageScene`.

        Raises:
            UserError: Something needed is damaged: the test is reported as skipped, with the message.
        """
        raise NotImplementedError(f"{type(self).__name__} must define run()")
