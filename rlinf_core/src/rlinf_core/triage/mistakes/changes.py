"""Changes of vectors, and how they are said: the pieces of corrections of states and actions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from rlinf_core.triage.mistakes.corrections import Correction
from rlinf_core.triage.mistakes.rows import Vectors

Change = Callable[[Vectors], Vectors]
"""Changes arrays [..., D]."""


class Named:
    """Names the numbers of a vector in sentences."""

    def __init__(self, key: str, names: Sequence[str], width: int) -> None:
        self.key, self.width = key, width
        self._names = [*names, *[""] * width][:width]

    def __call__(self, numbers: Sequence[int]) -> str:
        """`state [0, 1]`, with the dataset's names where it has them."""
        if len(numbers) == self.width and self.width > 1:
            return f"all numbers of the {self.key}"
        called = [self._names[i] for i in numbers]
        where = ", ".join(map(str, numbers)) if len(numbers) < 4 else f"{numbers[0]}-{numbers[-1]}"
        shown = f": {', '.join(called)}" if all(called) and len(called) <= 4 else ""
        return f"{self.key} [{where}{shown}]"


def said(mistake: str, doing: str, complexity: float = 1.0, way_out: str = "") -> Correction:
    """A correction in words, without its change."""
    return Correction(
        mistake=mistake,
        doing=doing,
        way_out=way_out or f"Correct it in what the policy gets: {doing}",
        complexity=complexity,
    )


def times(factors: Vectors) -> Change:
    """Multiply by factors [D]."""
    return lambda x: x * factors


def turned(i: int, j: int, first: float, second: float) -> Change:
    """Swap two numbers, each with a factor."""

    def change(x: Vectors) -> Vectors:
        out = np.array(x, np.float64)
        out[..., i], out[..., j] = first * x[..., j], second * x[..., i]
        return out

    return change


def affine(number: int, gain: float, offset: float) -> Change:
    """Scale and shift one number."""

    def change(x: Vectors) -> Vectors:
        out = np.array(x, np.float64)
        out[..., number] = gain * out[..., number] + offset
        return out

    return change


def within(start: int, size: int, of: Change) -> Change:
    """Change some neighbouring numbers only."""

    def change(x: Vectors) -> Vectors:
        out = np.array(x, np.float64)
        out[..., start : start + size] = of(out[..., start : start + size])
        return out

    return change
