"""Figures for pages: drawn with matplotlib once, saved as SVG for a page and as PNG beside it.

The SVG's colours are CSS variables, so that it is readable on light and dark backgrounds.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, FAINT, LINE = "#24292f", "#818b98", "#d1d9e0"
DATA, CHUNK, FAR, BAND = "#0a69da", "#d1570a", "#cf222e", "#e3edf9"
VARIABLES = {INK: "ink", FAINT: "faint", LINE: "line", DATA: "data", CHUNK: "chunk", FAR: "far", BAND: "band"}
"""Color of a PNG -> name of the CSS variable in an SVG."""

WIDTH = 9.6
"""Inches of 72 points: about one CSS pixel per point on a narrow page."""
ROW = 0.82
"""Height of a panel in inches."""
LONGEST_NAME = 22
"""Characters of a dimension's name beside a panel; the table on the page has it in full."""
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.edgecolor": LINE,
    "axes.labelcolor": FAINT,
    "axes.titlecolor": INK,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": FAINT,
    "ytick.labelcolor": FAINT,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "svg.fonttype": "none",
    "svg.hashsalt": "rlinf",
    "figure.dpi": 72,
}


@dataclass(frozen=True)
class Plot:
    """A drawn figure."""

    name: str
    """Name of the PNG, and prefix of the SVG's ids."""
    svg: str
    png: bytes


def plain(value: float, _: float) -> str:
    """A tick label in full: matplotlib would draw a common factor over the panel above."""
    return f"{value:.5g}".replace("-", "\N{MINUS SIGN}")


def short(name: str) -> str:
    """A name as a plot shows it; empty if matplotlib's font may lack a character."""
    if not (name.isascii() and name.isprintable()):
        return ""
    half = (LONGEST_NAME - 3) // 2
    return name if len(name) <= LONGEST_NAME else f"{name[:half]}...{name[-half:]}"


def new_figure(
    rows: int, columns: int, row: float = ROW, left: float = 0.75, above: float = 0.3
) -> tuple[Figure, NDArray[Any]]:
    """A figure and its panels [rows, columns], with fixed margins: automatic layout takes seconds."""
    from matplotlib.figure import Figure  # Not pyplot, which chooses a backend and keeps figures alive.

    below, right, beside, between = 0.45, 0.1, 0.8, 0.24  # Inches.
    height = rows * row + above + below
    figure = Figure(figsize=(WIDTH, height))
    panel = (WIDTH - left - right - beside * (columns - 1)) / columns
    figure.subplots_adjust(
        left / WIDTH, below / height, 1 - right / WIDTH, 1 - above / height, beside / panel, between / (row - between)
    )
    return figure, figure.subplots(rows, columns, squeeze=False, sharex="col" if columns == 3 else False)


def drawn(name: str, figure: Figure) -> Plot:
    """The figure as SVG and as PNG."""
    vector, raster = io.StringIO(), io.BytesIO()
    figure.savefig(vector, format="svg", transparent=True, metadata={"Date": None})
    figure.savefig(raster, format="png", dpi=110, facecolor="white", metadata={"Software": None})
    return Plot(name, "".join(_for_the_page(name, vector.getvalue())), raster.getvalue())


def _for_the_page(name: str, svg: str) -> Iterator[str]:
    """The `svg` element alone: scaled by the page, with unique ids and CSS variables as colours."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg, count=2).replace("xlink:href", "href")
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", re.sub(r' height="[^"]*pt"', "", svg, count=1), count=1)
    yield re.sub(r"<[^>]+>", lambda tag: _tag_for_the_page(name, tag[0]), svg)  # Names of dimensions stay as they are.


def _tag_for_the_page(name: str, tag: str) -> str:
    tag = re.sub(r'\bid="', f'id="{name}-', tag)
    tag = re.sub(r'url\(#|href="#', lambda found: found[0] + f"{name}-", tag)
    for color, variable in VARIABLES.items():
        tag = tag.replace(color, f"var(--{variable})")
    return tag
