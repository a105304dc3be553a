"""Plots of sampled actions beside the recorded ones, and of their errors. Plugins may use this module.

They need matplotlib (`rlinf-core[inspect]`), which is imported when a plot is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rlinf_core.plots.figures import CHUNK, DATA, FAINT, INK, STYLE, Plot, drawn, new_figure, plain, short
from rlinf_core.results import ActionErrors, Matrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_PANELS = 20
"""Dimensions of an action that are drawn."""


def plot_predictions(name: str, errors: ActionErrors) -> Plot:
    """Recorded and predicted actions of a few chunks: a row of panels per dimension, a column per chunk.

    Args:
        name: Name of the plot, unique on a page.
        errors: With at least one of `chunks`.
    """
    from matplotlib import rc_context
    from matplotlib.ticker import MaxNLocator

    rows = min(len(errors.names), MOST_PANELS)
    with rc_context(STYLE):
        figure, panels = new_figure(rows, len(errors.chunks), left=1.1, above=0.45)
        for column, chunk in enumerate(errors.chunks):
            panels[0][column].set_title(f"chunk {column + 1}")
            recorded, predicted = as_array(chunk.recorded), as_array(chunk.predicted)
            for number in range(rows):
                axes = panels[number][column]
                size = 3.2 if len(recorded) <= 20 else 1.8
                axes.plot(recorded[:, number], "o-", color=DATA, markersize=size, linewidth=0.9, label="recorded")
                axes.plot(predicted[:, number], "o-", color=CHUNK, markersize=size, linewidth=0.9, label="predicted")
                axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
                axes.yaxis.set_major_locator(MaxNLocator(3))
                axes.yaxis.set_major_formatter(plain)
                axes.tick_params(labelbottom=number == rows - 1)
                if column == 0:
                    _name_row(axes, errors, number)
            panels[rows - 1][column].set_xlabel("step of the chunk")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, frameon=False, loc="upper right", ncols=2, borderpad=0)
        return drawn(name, figure)


def plot_error_map(name: str, errors: Mapping[str, ActionErrors]) -> Plot:
    """The error per dimension and step of the chunk, relative to the better baseline: 1 is no better than that.

    Dimensions have different units, so that only relative errors have a common scale.

    Args:
        name: Name of the plot, unique on a page.
        errors: Errors by what they are of, for example the current and the averaged weights.
    """
    from matplotlib import rc_context

    most = max(len(one.names) for one in errors.values())
    rows = min(most, MOST_PANELS)
    with rc_context(STYLE):
        figure, panels = new_figure(1, len(errors), row=max(0.9, 0.24 * rows + 0.1), left=1.3)
        for axes, (label, one) in zip(panels[0], errors.items(), strict=True):
            relative = relative_errors(one)[:, :rows]
            image = axes.imshow(
                relative.T, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest", origin="upper"
            )
            axes.set_title(label)
            axes.set_yticks(range(rows), [_label(one, number) for number in range(rows)])
            axes.set_xlabel("step of the chunk")
        figure.subplots_adjust(right=0.86)
        place = panels[0][-1].get_position()
        bar = figure.colorbar(image, cax=figure.add_axes((0.88, place.y0, 0.012, place.height)), extend="max")
        bar.set_label("RMSE / better baseline", color=FAINT)
        return drawn(name, figure)


def relative_errors(errors: ActionErrors) -> NDArray[np.float64]:
    """[steps, dimensions], the RMSE divided by that of the better baseline; NaN where it is not known."""
    rmse = as_array(errors.rmse)
    if not errors.baselines:
        return np.full_like(rmse, np.nan)
    best = np.min([as_array(one) for one in errors.baselines.values()], axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(best > 0, rmse / best, np.where(rmse > 0, np.inf, np.nan))


def as_array(matrix: Matrix) -> NDArray[np.float64]:
    """A matrix of a file as an array, with NaN for None."""
    return np.array(matrix, dtype=np.float64).reshape(len(matrix), -1)


def dimension_name(errors: ActionErrors, number: int) -> str:
    """The dataset's name of a dimension, or its number."""
    return errors.names[number] or f"action {number}"


def _label(errors: ActionErrors, number: int) -> str:
    return f"{number} {short(errors.names[number])}".strip()


def _name_row(axes: Axes, errors: ActionErrors, number: int) -> None:
    place: Any = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "right", "va": "center"}
    axes.annotate(str(number), (0, 0.5), (-44, 5 if errors.names[number] else 0), color=INK, **place)
    axes.annotate(short(errors.names[number]), (0, 0.5), (-44, -5), color=FAINT, fontsize=7, **place)
