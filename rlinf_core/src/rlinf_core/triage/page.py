"""The page of `rlinf triage`, in the look of `rlinf report`: one HTML file that loads nothing and runs no script."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rlinf_core.errors import UserError
from rlinf_core.files import check_writable, write_text, writing
from rlinf_core.results import Cell, Estimate, cell_text
from rlinf_core.untrusted.text import without_controls

if TYPE_CHECKING:
    from rlinf_core.triage.chain import Triage

NAME_OUTPUT = "Name another file with --output"
MARK = "<!-- written by rlinf triage -->"
MOST_ROWS = 60
"""Rows of a table on the page."""


def check_libraries() -> None:
    """Raise `UserError` if a library that the page needs is not installed."""
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise UserError(
            "the page of rlinf triage needs jinja2, which is not installed: pip install 'rlinf-core[inspect]', or use "
            "--json"
        ) from error


def check_output(path: Path) -> None:
    """Raise `UserError` unless the file can be written, and is missing or an earlier page."""
    check_writable(path, NAME_OUTPUT, file=True)
    if path.is_dir():
        raise UserError(f"{path} is a folder. {NAME_OUTPUT}")
    if path.exists():
        with path.open("rb") as file:
            if MARK.encode() not in file.read(200):
                raise UserError(
                    f"{path} is not an earlier page of rlinf triage, and would be replaced: name another file with "
                    "--output"
                )


def write(path: Path, html: str) -> None:
    """Write the page; an earlier one is replaced."""
    check_output(path)
    with writing(path, NAME_OUTPUT):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, html)


def page_of(folder: Path, dataset: str, triage: Triage) -> str:
    """The page.

    Args:
        folder: The run or the exported folder.
        dataset: The rows of the site; empty: there are none.
        triage: What the tests found.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader([here, here.parent / "inspect"]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = _cell
    html = environment.get_template("triage.html").render(
        mark=Markup(MARK),
        folder=folder,
        dataset=dataset,
        triage=triage,
        found=triage.cause is not None,
        shown=[*triage.ranked, *(one for one in triage.findings if one not in triage.ranked)],
        images={one.test.name: _urls(one.outcome.images) for one in triage.findings},
        most_rows=MOST_ROWS,
    )
    return without_controls(html)


def _urls(images: Mapping[str, NDArray[np.uint8]]) -> list[tuple[str, str]]:
    """Captions and data URLs of images."""
    from PIL import Image

    found = []
    for caption, pixels in images.items():
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "PNG", optimize=True)
        found.append((caption, "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()))
    return found


def _cell(value: Cell) -> str:
    if isinstance(value, float | Estimate):
        return cell_text(value).replace("-", "\N{MINUS SIGN}")
    return cell_text(value)
