"""What a policy shows of a sample it is given, as values that `rlinf inspect` puts on its page.

A policy answers `PolicyConfig.illustrate` with them and knows nothing of pages; the page knows nothing of policies.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Picture:
    """An image as it stands at some point between the dataset and the model."""

    caption: str
    """What was done to it."""
    pixels: NDArray[np.uint8]
    """[height, width, 3], RGB."""


@dataclass(frozen=True, eq=False)
class Camera:
    """A camera of the policy."""

    name: str
    """As the keys of a sample's `images`; the page puts the pictures after those of the data of that name."""
    pictures: tuple[Picture, ...] = ()
    note: str = ""
    """A sentence below them."""


@dataclass(frozen=True)
class Token:
    """A token of a text."""

    id: int
    piece: str
    """Its text, with white space made visible."""
    kind: str
    """What it belongs to, in a word or two; kinds have colours and a legend."""


@dataclass(frozen=True)
class TokenText:
    """A text as the model reads it."""

    title: str
    tokens: tuple[Token, ...]
    cut: int = 0
    """Tokens at its end that did not fit and that the model never sees; the page warns of them."""
    note: str = ""
    """How many there may be."""


@dataclass(frozen=True, eq=False)
class Grid:
    """Which of several things each element of a mask or of a tensor is."""

    title: str
    values: NDArray[np.integer]
    """[rows, columns], indices into `names`."""
    names: tuple[str, ...]
    """What a value means: the legend."""
    rows: str = ""
    """What the rows are."""
    columns: str = ""
    """What the columns are."""
    note: str = ""


@dataclass(frozen=True)
class Illustration:
    """What a policy shows of one sample."""

    cameras: tuple[Camera, ...] = ()
    texts: tuple[TokenText, ...] = ()
    grids: tuple[Grid, ...] = ()
