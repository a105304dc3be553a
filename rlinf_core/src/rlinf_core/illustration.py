"""How a policy illustrates a sample: the values that `rlinf inspect` displays.

`PolicyConfig.illustrate` returns them. The policy knows nothing of the page, and the page knows nothing of policies.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Picture:
    """An image at some stage between the dataset and the model."""

    caption: str
    """What was done to it."""
    pixels: NDArray[np.uint8]
    """[height, width, 3], RGB."""


@dataclass(frozen=True, eq=False)
class Camera:
    """A camera of the policy."""

    name: str
    """A key of a sample's `images`; the page shows the images after the dataset's image of that name."""
    pictures: tuple[Picture, ...] = ()
    note: str = ""
    """A sentence below the images."""


@dataclass(frozen=True)
class Token:
    """A token of a text."""

    id: int
    piece: str
    """The token's text, with visible white space."""
    kind: str
    """The part of the text that it belongs to, in a word or two; it determines the colour and the legend."""


@dataclass(frozen=True)
class TokenText:
    """A text as the model reads it."""

    title: str
    tokens: tuple[Token, ...]
    cut: int = 0
    """Number of tokens at the end that did not fit, which the model never sees; the page warns about them."""
    note: str = ""
    """For example the maximum number of tokens."""


@dataclass(frozen=True, eq=False)
class Grid:
    """The category of each element of a mask or tensor."""

    title: str
    values: NDArray[np.integer]
    """[rows, columns], indices into `names`."""
    names: tuple[str, ...]
    """The meaning of each value, for the legend."""
    rows: str = ""
    """Label of the rows."""
    columns: str = ""
    """Label of the columns."""
    note: str = ""


@dataclass(frozen=True)
class Illustration:
    """Everything that a policy shows of one sample."""

    cameras: tuple[Camera, ...] = ()
    texts: tuple[TokenText, ...] = ()
    grids: tuple[Grid, ...] = ()
