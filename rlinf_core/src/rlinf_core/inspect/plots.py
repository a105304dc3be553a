"""The curves and histograms of the page. Names of dimensions are their only text from datasets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rlinf_core.data.normalize import Mode, Normalize, NormStats
from rlinf_core.data.statistics.compute import Distribution
from rlinf_core.inspect.samples import Chunk
from rlinf_core.plots.figures import BAND, CHUNK, DATA, FAINT, FAR, INK, STYLE, Plot, drawn, new_figure, plain, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_PANELS = 32
"""Maximum number of dimensions of a vector that are drawn."""
BINS = 100
VIEW = {"quantile": 2.0, "mean_std": 5.0}
"""The axis of normalised numbers reaches from minus this to plus this."""


def plot_lengths(name: str, train: NDArray[np.int64], held_out: NDArray[np.int64]) -> Plot:
    """Histogram of episode lengths."""
    from matplotlib import rc_context
    from matplotlib.ticker import MaxNLocator

    with rc_context(STYLE):
        figure, panels = new_figure(1, 1, row=1.5)
        axes = panels[0][0]
        whole = np.concatenate([train, held_out])
        edges = np.linspace(whole.min() - 0.5, whole.max() + 0.5, min(40, int(np.ptp(whole)) + 1) + 1)
        parts, names, colors = [train], [f"trained on ({len(train)})"], [DATA]
        if len(held_out):
            parts, names, colors = [*parts, held_out], [*names, f"held out ({len(held_out)})"], [*colors, CHUNK]
        axes.hist(parts, bins=list(edges), stacked=True, label=names, color=colors)
        axes.set_xlabel("frames")
        axes.set_ylabel("episodes")
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderpad=0)
        return drawn(name, figure)


def plot_distribution(name: str, key: str, data: Distribution, stats: NormStats | None, mode: Mode | None) -> Plot:
    """Histogram of each dimension of `state` or `actions`, in the data's units and (with statistics) normalised."""
    from matplotlib import rc_context

    shown = min(len(data.running.low), MOST_PANELS)
    both = stats is not None and mode is not None
    names = [short(name) for name in data.names[:shown]]
    with rc_context(STYLE):
        figure, panels = new_figure(shown, 1 + both, left=_margin(names))
        panels[0][0].set_title("data's units, after the dataset's transforms")
        for number, row in enumerate(panels):
            _raw(row[0], number, data, stats)
            _name(row[0], f"{key} {number}", 6, _at(names, number))
        if stats is not None and mode is not None:
            panels[0][1].set_title("normalised, as the model gets it")
            normalize = Normalize({key: stats}, mode)
            for number, row in enumerate(panels):
                middles = (data.running.edges[:, 1:] + data.running.edges[:, :-1]) / 2
                _normalized(row[1], normalize.normalized(key, middles.T)[:, number], data.running.counts[number], mode)
        return drawn(name, figure)


def _raw(axes: Axes, number: int, data: Distribution, stats: NormStats | None) -> None:
    low, high = data.running.low[number], data.running.high[number]
    if low == high:
        axes.axvline(low, color=DATA, linewidth=3)
        axes.set_xlim(low - 1, low + 1)
        axes.annotate(f"always {low:.4g}", (low, 0.5), (6, 0), "data", "offset points", color=INK, va="center")
    else:
        edges = data.running.edges[number]
        middles = (edges[1:] + edges[:-1]) / 2
        counts, bins = np.histogram(middles, BINS, (float(low), float(high)), weights=data.running.counts[number])
        axes.stairs(np.sqrt(counts / counts.sum()), bins, fill=True, color=DATA)
        axes.margins(x=0.02)
    used = data.stats if stats is None else stats
    left, right = axes.get_xlim()
    for value, style in ((used.mean[number], "-"), (used.q01[number], "--"), (used.q99[number], "--")):
        if left <= value <= right:  # Statistics of other data may be outside; the table shows their values.
            axes.axvline(value, color=CHUNK, linewidth=1.2, linestyle=style)
    axes.xaxis.set_major_formatter(plain)
    axes.set_yticks([])


def _normalized(axes: Axes, middles: NDArray[Any], counts: NDArray[Any], mode: Mode) -> None:
    view = VIEW[mode]
    axes.axvspan(-1, 1, color=BAND, linewidth=0)
    binned, bins = np.histogram(np.clip(middles, -view, view), BINS, (-view, view), weights=counts)
    heights = np.sqrt(binned / max(counts.sum(), 1))
    axes.stairs(heights, bins, fill=True, color=DATA)
    for side, beyond in ((0, middles < -view), (-1, middles > view)):
        if share := counts[beyond].sum() / counts.sum():
            axes.bar(bins[side], heights[side], width=view / 25, align="center", color=FAR, zorder=3)
            text, anchor = f"{share:.2%} beyond", (0.02 if side == 0 else 0.98, 0.7)
            axes.annotate(text, anchor, xycoords="axes fraction", ha="left" if side == 0 else "right", color=FAR)
    axes.set_xlim(-view * 1.04, view * 1.04)
    axes.set_xticks([-view, -1, 0, 1, view])
    axes.set_yticks([])


def plot_chunk(name: str, chunk: Chunk) -> Plot:
    """Per dimension: the episode's actions with the chunk, the chunk as a training target, and the state."""
    from matplotlib import rc_context

    columns = [chunk.actions.shape[1], chunk.target.shape[1], 0 if chunk.state is None else chunk.state.shape[1]]
    rows = min(max(columns), MOST_PANELS)
    with rc_context(STYLE):
        named = (chunk.names.get("actions", ()), chunk.target_names.get("actions", ()), chunk.names.get("state", ()))
        figure, panels = new_figure(rows, 3, above=0.45)
        titles = ("actions, data's units", "target" + ", normalised" * chunk.normalized, "state, data's units")
        for column, (title, count) in enumerate(zip(titles, columns, strict=True)):
            panels[0][column].set_title(title if count else "", pad=16)
            for number in range(rows):
                axes = panels[number][column]
                if number >= count:
                    axes.set_axis_off()
                    continue
                _curve(axes, chunk, column, number)
                _name(axes, str(number), 46)
                axes.annotate(
                    short(_at(named[column], number)), (0, 1), (0, 3), "axes fraction", "offset points", color=FAINT
                )
            last = min(count, rows) - 1
            if count:
                panels[last][column].set_xlabel("step of the chunk" if column == 1 else "frame of the episode")
                panels[last][column].tick_params(labelbottom=True)
        return drawn(name, figure)


def _name(axes: Axes, text: str, distance: int, below: str = "") -> None:
    """Label a panel with its dimension, `distance` points to its left, and with a smaller line below that."""
    place: Any = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "right", "va": "center"}
    axes.annotate(text, (0, 0.5), (-distance, 5 if below else 0), color=INK, **place)
    if below:
        axes.annotate(below, (0, 0.5), (-distance, -5), color=FAINT, fontsize=7, **place)


def _at(names: Sequence[str], number: int) -> str:
    return names[number] if number < len(names) else ""


def _margin(names: Sequence[str]) -> float:
    """Inches to the left of panels that are labelled by names of 7 points, of which letters take about 0.6."""
    return max(0.75, 0.15 + max(map(len, names), default=0) * 7 * 0.6 / 72)


def _curve(axes: Axes, chunk: Chunk, column: int, number: int) -> None:
    """One panel: a dimension of the actions, of the target, or of the state."""
    from matplotlib.ticker import FixedLocator, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if column == 1:
        _dots(axes, np.arange(len(chunk.target)), chunk.target[:, number], chunk)
        if chunk.normalized:
            axes.axhspan(-1, 1, color=BAND, linewidth=0)
            low, high = axes.get_ylim()
            axes.set_ylim(min(low, -1.2), max(high, 1.2))
            axes.yaxis.set_major_locator(FixedLocator([-1, 0, 1]) if -3 < low < high < 3 else MaxNLocator(3))
        return
    curve = chunk.actions if column == 0 or chunk.state is None else chunk.state
    axes.plot(chunk.frames, curve[:, number], color=DATA, linewidth=1.1)
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.yaxis.set_major_formatter(plain)
    if column == 0:
        _dots(axes, chunk.at, chunk.recorded[:, number], chunk)
    else:
        axes.axvline(chunk.at[0], color=CHUNK, linewidth=1.2)


def _dots(axes: Axes, x: NDArray[Any], y: NDArray[Any], chunk: Chunk) -> None:
    """A chunk's values; those past the end of the episode are hollow."""
    size = 3.2 if len(x) <= 20 else 1.8
    axes.plot(x, y, color=CHUNK, linewidth=0.8)
    axes.plot(x[~chunk.is_pad], y[~chunk.is_pad], "o", markersize=size, color=CHUNK)
    axes.plot(x[chunk.is_pad], y[chunk.is_pad], "o", markersize=size, markerfacecolor="none", color=CHUNK)
