"""The types of the data path, and the letters that name their axes.

Axes used in names and docstrings throughout the project:

    B batch   H action horizon (steps of a chunk)   D action or state width of the data   A action width of the policy
    C camera  T tokens   L layers   N frames of a dataset

A *row* is one frame as the dataset stores it, under the dataset's own column names. A *sample* is the same frame under
the keys of `Sample`, in NumPy, as the transforms see it. A *batch* is what a policy's `collate` builds from samples; it
contains only tensors.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

Row = dict[str, Any]
"""One frame: images uint8 [height, width, 3] RGB, vectors float32 [D], chunks float32 [H, D] with `<column>_is_pad`
bool [H], `task` str, and the integers `index`, `episode_index`, `frame_index`."""

Batch = Mapping[str, Any]
"""Tensors (or nested mappings of tensors), sample axis first; only those under `PACKING` have other axes."""

PACKING = "packing"
"""Key of a batch's index tensors, for a policy that concatenates samples of different lengths."""

SOURCE = "rlinf_source"
"""Key of a mixture's training batches: int64 [B], the index of each sample's source. The trainer removes it."""

REPLACED = "rlinf_replaced"
"""Key of training batches in which bad rows were replaced: a list of `ReplacedRow`. The trainer removes it."""


class ReplacedRow(NamedTuple):
    """A row that could not be read, and the one that was used instead (`data.on_bad_sample`)."""

    source: int
    """Index of its dataset in the run."""
    row: int
    """The row that was due."""
    by: int
    """The row that is used instead."""
    error: str
    """Why it could not be read."""


class Sample(TypedDict, total=False):
    """One frame as the transforms see it. Policies and datasets may add keys."""

    images: dict[str, NDArray[np.uint8]]
    """The policy's camera name -> uint8 [height, width, 3], RGB. A camera that the robot lacks has no entry."""
    state: NDArray[np.floating]
    """Proprioceptive state, [D], in the robot's units until it is normalised."""
    actions: NDArray[np.floating]
    """Action chunk, [H, D]; past the end of the episode the last action is repeated. Absent at inference."""
    actions_is_pad: NDArray[np.bool_]
    """[H], True where the chunk runs past the end of the episode."""
    prompt: str
    """The instruction to the robot."""
    noise: NDArray[np.float32]
    """The sample's own random numbers (contract 1), drawn by `PolicyConfig.draw`."""
