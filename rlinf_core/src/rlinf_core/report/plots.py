"""Curves of one or several runs. Names of metrics and runs are their only text from outside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from rlinf_core.plots.figures import CHUNK, DATA, FAINT, STYLE, Plot, drawn, new_figure, plain, short
from rlinf_core.report.runs import Curve, Numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = (DATA, CHUNK, "#1a7f37", "#8250df", "#bf8700", "#bf3989", "#1b7c83", "#6e7781")
"""Colours of runs, and of phases of a step; readable on light and dark backgrounds."""
MOST_POINTS = 300
"""Points of a curve: longer ones show the mean of neighbours, with their range as a band."""
COLUMNS = 2
Kind = Literal["", "average", "mean", "repeat"]
STYLES: Mapping[Kind, str] = {"": "-", "average": "--", "mean": ":", "repeat": "-."}


@dataclass(frozen=True, eq=False)
class Line:
    """A curve in a panel."""

    curve: Curve
    run: int = 0
    """Number of the run, which has a colour."""
    kind: Kind = ""
    """What is drawn in another style: averaged weights, and baselines."""
    label: str = ""
    """For the legend; empty: none."""


@dataclass(frozen=True, eq=False)
class Panel:
    """A plot of one metric."""

    title: str
    lines: Sequence[Line]
    logarithmic: bool = False


def plot_panels(name: str, panels: Sequence[Panel], bands: bool = True) -> Plot:
    """Panels of curves, two in a row.

    Args:
        name: Name of the plot, unique on the page.
        panels: At least one.
        bands: Whether the panels are of one run: then ranges of neighbouring values are shown as bands.
    """
    from matplotlib import rc_context

    rows = -(-len(panels) // COLUMNS)
    with rc_context(STYLE):
        figure, axes = new_figure(rows, COLUMNS, row=1.75, above=0.4)
        figure.subplots_adjust(hspace=0.5)
        for number, panel in enumerate(panels):
            _draw(axes[number // COLUMNS][number % COLUMNS], panel, bands=bands)
        for number in range(len(panels), rows * COLUMNS):
            axes[number // COLUMNS][number % COLUMNS].set_axis_off()
        return drawn(name, figure)


def plot_time(name: str, shares: Mapping[str, Curve]) -> Plot:
    """How the time of a step is divided, over steps."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        figure, axes = new_figure(1, 1, row=1.8, above=0.4)
        panel = axes[0][0]
        thinned = [thin(curve) for curve in shares.values()]
        labels = [name.replace("_", " ") for name in shares]
        panel.stackplot(
            thinned[0].steps,
            [np.nan_to_num(one.mean) for one in thinned],
            labels=labels,
            colors=(*COLORS[: len(thinned) - 1], FAINT),
            linewidth=0,
        )
        panel.set_ylim(0, 1)
        panel.margins(x=0)
        panel.set_xlabel("step")
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        panel.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(thinned), borderpad=0)
        return drawn(name, figure)


@dataclass(frozen=True, eq=False)
class Thinned:
    """A curve of few points."""

    steps: Numbers
    mean: Numbers
    low: Numbers
    high: Numbers


def thin(curve: Curve, most: int = MOST_POINTS) -> Thinned:
    """Means and ranges of neighbouring values; NaN only where no value is finite."""
    if len(curve.steps) <= most:
        return Thinned(curve.steps, curve.values, curve.values, curve.values)
    edges = np.linspace(0, len(curve.steps), most + 1).astype(int)[:-1]
    finite = np.isfinite(curve.values)
    counts = np.add.reduceat(finite.astype(float), edges)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.add.reduceat(np.where(finite, curve.values, 0.0), edges) / counts
    low = np.minimum.reduceat(np.where(finite, curve.values, np.inf), edges)
    high = np.maximum.reduceat(np.where(finite, curve.values, -np.inf), edges)
    known = counts > 0
    ends = np.append(edges[1:], len(curve.steps)) - 1
    return Thinned(curve.steps[ends], *(np.where(known, one, np.nan) for one in (mean, low, high)))


def _draw(axes: Axes, panel: Panel, *, bands: bool) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    axes.set_title(short(panel.title) or "metric")
    values = [line.curve.values[np.isfinite(line.curve.values)] for line in panel.lines]
    positive = all(len(one) == 0 or one.min() > 0 for one in values) and any(len(one) for one in values)
    if panel.logarithmic and positive:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(plain)
    for line in panel.lines:
        thinned = thin(line.curve)
        is_baseline = line.kind in ("mean", "repeat")
        color = FAINT if is_baseline else COLORS[line.run % len(COLORS)]
        if line.kind == "average" and bands:  # Of one run, colours are free.
            color = CHUNK
        if bands and len(line.curve.steps) > MOST_POINTS:
            axes.fill_between(thinned.steps, thinned.low, thinned.high, color=color, alpha=0.2, linewidth=0)
        few = len(thinned.steps) <= 30
        axes.plot(
            *(thinned.steps, thinned.mean),
            STYLES[line.kind],
            marker="o" if few and not is_baseline else None,
            markersize=3,
            color=color,
            linewidth=1.2,
            label=short(line.label) or None,
        )
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.margins(x=0.02)
    if any(line.label for line in panel.lines):
        axes.legend(frameon=False, fontsize=7, loc="best", borderpad=0)
