"""Mistakes that are made with states and actions: signs, units, orders, origins, grippers, relative actions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from rlinf_core.triage.mistakes.changes import Change, Named, affine, said, times, turned
from rlinf_core.triage.mistakes.corrections import Correction
from rlinf_core.triage.mistakes.likeness import Scale
from rlinf_core.triage.mistakes.rotations import rotation_corrections
from rlinf_core.triage.mistakes.rows import Rows, Vectors

UNITS = {
    1000.0: "meters where training has millimeters",
    1 / 1000.0: "millimeters where training has meters",
    100.0: "meters where training has centimeters, or fractions where it has percent",
    1 / 100.0: "centimeters where training has meters, or percent where it has fractions",
    180 / np.pi: "radians where training has degrees",
    np.pi / 180: "degrees where training has radians",
    10.0: "a tenth of training's numbers",
    1 / 10.0: "ten times training's numbers",
}
"""Factor that corrects the numbers -> what they are."""
CLOSE = 0.35
"""Largest difference of the logarithms of two spreads' ratio and a unit's factor."""
APART = 1.5
"""A number that is off by a constant is off by more than so many standard deviations of training."""
MOST = 40
"""Width of vectors of which all pairs are tried; of wider ones, neighbours only."""


def vector_corrections(
    named: Named, scale: Scale, site: Vectors, training: Vectors
) -> Iterator[tuple[Correction, Change]]:
    """Corrections of a vector, states or the steps of action chunks, without those that only one of them has.

    Args:
        named: Names its numbers.
        scale: What is usual in training.
        site: [M, D].
        training: [N, D].

    Yields:
        A correction whose change is not set yet, and the change of arrays [..., D].
    """
    width = training.shape[1]
    yield from _signs(named, scale, width)
    yield from _units(named, scale, site)
    yield from _orders(named, width)
    yield from _grippers(named, scale, site, training)
    yield from rotation_corrections(named, site, training)
    yield from _origins(named, scale, site, training)


def _origins(named: Named, scale: Scale, site: Vectors, training: Vectors) -> Iterator[tuple[Correction, Change]]:
    """Numbers that are off by a constant, as positions from another origin or encoders with another zero."""
    width = training.shape[1]
    offsets = np.median(training, axis=0) - np.median(site, axis=0)
    ratio = np.maximum(site.std(0), 1e-12) / np.maximum(training.std(0), 1e-12)
    off = (np.abs(offsets) > APART * scale.spread[:width]) & scale.moves[:width] & (ratio > 0.4) & (ratio < 2.5)
    numbers = np.flatnonzero(off).tolist()
    for chosen in _groups(numbers, width) if numbers else ():
        shift = np.zeros(width)
        shift[chosen] = offsets[chosen]
        by = ", ".join(f"{-one:+.3g}" for one in offsets[chosen][:4]) + ", ..." * (len(chosen) > 4)
        yield (
            said(
                f"{named(chosen)} {'is' if len(chosen) == 1 else 'are'} off by a constant ({by}), as from another "
                "origin or zero position",
                f"shifting {named(chosen)} to where training has {'it' if len(chosen) == 1 else 'them'}",
                1.9,
                "Measure from the same origin as the training data, and calibrate the joints alike",
            ),
            lambda x, shift=shift: x + shift,  # type: ignore[misc]
        )


def _signs(named: Named, scale: Scale, width: int) -> Iterator[tuple[Correction, Change]]:
    singles = [(i,) for i in range(width)]
    pairs = [(i, j) for i, j in combinations(range(width), 2) if width <= MOST and j - i < 3]
    triples = [(i, i + 1, i + 2) for i in range(width - 2)]
    for i, j in [(i, i + 1) for i in range(width - 1)]:
        for first, second in ((1.0, -1.0), (-1.0, 1.0)):
            yield (
                said(
                    f"{named([i, j])} are turned by 90°: swapped, and one has the opposite sign",
                    f"turning {named([i, j])} by 90°",
                    1.3,
                ),
                turned(i, j, first, second),
            )
    for numbers in (*singles, *pairs, *triples):
        if not scale.moves[list(numbers)].all():
            continue
        factors = np.ones(width)
        factors[list(numbers)] = -1
        one = len(numbers) == 1
        yield (
            said(
                f"{named(numbers)} {'has' if one else 'have'} the opposite sign",
                f"negating {named(numbers)}",
                1.0 + 0.2 * (len(numbers) - 1),
            ),
            times(factors),
        )


def _units(named: Named, scale: Scale, site: Vectors) -> Iterator[tuple[Correction, Change]]:
    """Factors that the ratio of spreads suggests, for the numbers that share one."""
    width = site.shape[1]
    here = np.maximum(site.std(0), 1e-12)
    # The root mean square also knows of numbers that hardly vary in a few rows.
    size = np.sqrt(np.square(site).mean(0)), np.sqrt(np.square(scale.mean[:width]) + np.square(scale.spread[:width]))
    ratios = np.log(scale.spread[:width] / here), np.log(size[1] / np.maximum(size[0], 1e-12))
    for factor, words in UNITS.items():
        for ratio in ratios:
            near = (np.abs(ratio - np.log(factor)) < CLOSE) & scale.moves[:width]
            numbers = np.flatnonzero(near).tolist()
            if not numbers:
                continue
            for chosen in _groups(numbers, width):
                factors = np.ones(width)
                factors[chosen] = factor
                have = "is in" if len(chosen) == 1 else "are in"
                yield (
                    said(
                        f"{named(chosen)} {have} {words}",
                        f"multiplying {named(chosen)} by {factor:.4g}",
                        1.0 + 0.1 * (len(numbers) != len(chosen)),
                    ),
                    times(factors),
                )
    yield from _scales(named, ratios[0], scale.moves[:width])


def _scales(named: Named, ratios: Vectors, moves: NDArray[np.bool_]) -> Iterator[tuple[Correction, Change]]:
    """A common factor of all numbers, or of neighbouring ones, that is no known unit's.

    Half or double is tried where spreads are closer to training's afterwards, even if they do not agree on a factor:
    those of a few episodes differ by much.
    """
    width = len(ratios)
    blocks = {tuple(np.flatnonzero(moves).tolist())}
    blocks |= {tuple(range(start, start + size)) for size in (3, 6, 7) for start in range(width - size + 1)}
    for block in sorted(blocks):
        numbers = [number for number in block if moves[number]]
        common = float(np.median(ratios[numbers])) if numbers else 0.0
        shown = abs(common) >= 0.4 and bool(np.abs(ratios[numbers] - common).max() <= CLOSE)
        near = [factor for factor in (2.0, 0.5) if abs(common - np.log(factor)) < abs(common)]
        for factor in (float(np.exp(common)),) * shown + tuple(near):
            factors = np.ones(width)
            factors[numbers] = factor
            yield (
                said(
                    f"{named(numbers)} {'is' if len(numbers) == 1 else 'are'} scaled by {1 / factor:.3g}",
                    f"multiplying {named(numbers)} by {factor:.3g}",
                    1.5,
                ),
                times(factors),
            )


def _groups(numbers: list[int], width: int) -> Iterator[list[int]]:
    """All numbers, each run of neighbours, and blocks of neighbours most of which are among them."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    groups = [numbers, *runs]
    for size in (3, 6, 7, width):
        for start in range(width - size + 1):
            block = list(range(start, start + size))
            if 2 * len(set(block) & set(numbers)) > size:
                groups.append(block)
    yield from {tuple(group): group for group in groups}.values()


def _ordered(order: Sequence[int]) -> Change:
    at = list(order)
    return lambda x: x[..., at]


def _orders(named: Named, width: int) -> Iterator[tuple[Correction, Change]]:
    """Orders of the numbers: shifted, swapped, reversed, in other blocks."""
    found: dict[tuple[int, ...], tuple[str, float]] = {}

    def add(order: Sequence[int], text: str, complexity: float = 1.0) -> None:
        if tuple(order) != tuple(range(width)):
            found.setdefault(tuple(order), (text, complexity))

    every = list(range(width))
    for shift in (1, -1):
        add([(i + shift) % width for i in every], f"{named.key}: all numbers are shifted by one")
    for i, j in combinations(every, 2):
        if width <= MOST or j - i < 3:
            order = list(every)
            order[i], order[j] = j, i
            add(order, f"{named([i, j])} are swapped", 1.0 + 0.2 * (j - i > 1))
    for start in range(width - 2):
        for shift in (1, 2):
            order = list(every)
            order[start : start + 3] = [start + (k + shift) % 3 for k in range(3)]
            add(order, f"{named([start, start + 1, start + 2])} are in another order")
        order = list(every)
        order[start : start + 3] = order[start : start + 3][::-1]
        add(order, f"{named([start, start + 1, start + 2])} are in reverse order")
    for shift in range(2, width - 1):
        add([(i + shift) % width for i in every], f"{named.key}: its parts are in another order", 1.2)
    for start, size in ((s, n) for n in (3, 4, 6, 7) for s in range(width - n)):
        # A number beside a block has moved to its other side, as a gripper before or after the joints.
        block = list(range(start, start + size + 1))
        for moved in ([block[-1], *block[:-1]], [*block[1:], block[0]]):
            order = list(every)
            order[start : start + size + 1] = moved
            add(order, f"{named(block)} are in another order", 1.3)
    add(every[::-1], f"{named.key}: the numbers are in reverse order", 1.2)
    half = width // 2
    if width % 2 == 0 and width > 3:
        add([*every[half:], *every[:half]], f"{named.key}: its halves are swapped, as those of two arms")
    for order_found, (text, complexity) in found.items():
        listed = ", ".join(map(str, order_found)) if width <= 16 else "the order of training"
        yield (
            said(
                text,
                f"reordering the {named.key} as [{listed}]",
                complexity,
                "Order the numbers as in the training data",
            ),
            _ordered(order_found),
        )


def _grippers(named: Named, scale: Scale, site: Vectors, training: Vectors) -> Iterator[tuple[Correction, Change]]:
    """Numbers with another range or polarity, as those of grippers: mapped to the range of training."""
    width = training.shape[1]
    for i in range(width):
        if not scale.moves[i]:
            continue
        low, high = np.quantile(training[:, i], [0.01, 0.99])
        here = np.quantile(site[:, i], [0.01, 0.99])
        if high - low < 1e-9:
            continue
        middle = float(low + high)
        if abs(middle) > 0.15 * (high - low):  # Otherwise it is a sign.
            yield (
                said(
                    f"{named([i])} is inverted: {low:.3g} and {high:.3g} are exchanged, as a gripper's open and closed",
                    f"inverting {named([i])} ({middle:.3g} minus the number)",
                    1.05,
                ),
                affine(i, -1.0, middle),
            )
        if here[1] - here[0] < 1e-9:
            continue
        gain = float((high - low) / (here[1] - here[0]))
        if abs(gain - 1) < 0.25 and abs(here[0] - low) < 0.25 * (high - low):
            continue
        ranges = f"from {here[0]:.3g} to {here[1]:.3g}, in training from {low:.3g} to {high:.3g}"
        for sign, text in ((1.0, "has another range"), (-1.0, "has another range and is inverted")):
            offset = float(low - gain * here[0] if sign > 0 else high + gain * here[0])
            yield (
                said(f"{named([i])} {text}: {ranges}", f"mapping {named([i])} to the range of training", 1.6),
                affine(i, sign * gain, offset),
            )


def state_corrections(named: Named, scale: Scale, site: Rows, reference: Rows) -> Iterator[Correction]:
    """Corrections of the state."""
    if site.state is None or reference.state is None:
        return
    for one, change in vector_corrections(named, scale, site.state, reference.state):
        yield replace(one, state=change)


def action_corrections(named: Named, scale: Scale, site: Rows, reference: Rows) -> Iterator[Correction]:
    """Corrections of the actions."""
    here, there = site.actions[:, 0], reference.actions[:, 0]
    for one, change in vector_corrections(named, scale, here, there):
        yield replace(one, actions=lambda a, s, change=change: change(a))  # type: ignore[misc]
    if site.state is None:
        return
    width = min(here.shape[1], site.state.shape[1])
    usual = [tuple(range(size)) for size in (width, width - 1, 6, 3) if 0 < size <= width]
    for sign, mistake, doing in (
        (-1.0, "absolute, where training has displacements from the state", "subtracting the state from"),
        (1.0, "displacements from the state, where training has absolute positions", "adding the state to"),
    ):
        closer = _closer(here[:, :width], here[:, :width] + sign * site.state[:, :width], there[:, :width])
        for part in dict.fromkeys((*usual, closer)):
            if not part:
                continue
            which = "" if len(part) == here.shape[1] else f" ({named(part)})"
            yield Correction(
                mistake=f"actions are {mistake}{which}",
                doing=f"{doing} the actions{which}",
                way_out="Make actions relative or absolute in one place only, as the training data are",
                actions=_relative(part, sign),
                complexity=1.0 + 0.05 * (len(part) != width),
            )


def _closer(before: Vectors, after: Vectors, there: Vectors) -> tuple[int, ...]:
    """The numbers that a change brings much closer to their distribution in training."""
    levels = np.linspace(0.05, 0.95, 10)
    wanted = np.quantile(there, levels, axis=0)
    apart = [np.abs(np.quantile(one, levels, axis=0) - wanted).mean(0) for one in (before, after)]
    return tuple(np.flatnonzero(apart[1] < 0.5 * apart[0]).tolist())


def _relative(part: Sequence[int], sign: float) -> Callable[[Vectors, Vectors | None], Vectors]:
    at = list(part)

    def change(actions: Vectors, state: Vectors | None) -> Vectors:
        assert state is not None
        out = np.array(actions, np.float64)
        out[..., at] += sign * np.asarray(state, np.float64)[..., None, at]
        return out

    return change
