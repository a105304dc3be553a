"""The page of `rlinf triage`, in the look of `rlinf report`: one HTML file that loads nothing and runs no script."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rlinf_core.pages.one_file import OneFile

if TYPE_CHECKING:
    from rlinf_core.triage.chain import Triage

PAGE = OneFile("rlinf triage")
MOST_ROWS = 60
"""Rows of a table on the page."""


def page_of(folder: Path, dataset: str, triage: Triage) -> str:
    """The page.

    Args:
        folder: The run or the exported folder.
        dataset: The rows of the site; empty: there are none.
        triage: What the tests found.
    """
    return PAGE.render(
        Path(__file__).with_name("triage.html"),
        folder=folder,
        dataset=dataset,
        triage=triage,
        found=triage.cause is not None,
        shown=[*triage.ranked, *(one for one in triage.findings if one not in triage.ranked)],
        images={one.test.name: _urls(one.outcome.images) for one in triage.findings},
        most_rows=MOST_ROWS,
    )


def _urls(images: Mapping[str, NDArray[np.uint8]]) -> list[tuple[str, str]]:
    """Captions and data URLs of images."""
    from PIL import Image

    found = []
    for caption, pixels in images.items():
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "PNG", optimize=True)
        found.append((caption, "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()))
    return found
