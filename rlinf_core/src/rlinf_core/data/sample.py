"""The values that flow through the data path, and the letters that name their axes.

Axes used in names and docstrings throughout the project:

    B batch   H action horizon (steps of a chunk)   D action or state width of the data   A action width of the policy
    C camera  T tokens   L layers   N frames of a dataset

A *row* is one frame as the dataset stores it, under the dataset's own column names. A *sample* is the same frame under
the names below, in NumPy, on its way through the transforms. A *batch* is what a policy's `collate` makes of samples:
tensors only.
"""

from collections.abc import Mapping
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

Row = dict[str, Any]
"""One frame: images uint8 [height, width, 3] RGB, vectors float32 [D], chunks float32 [H, D] with `<column>_is_pad`
bool [H], `task` str, and the integers `index`, `episode_index`, `frame_index`."""

Batch = Mapping[str, Any]
"""Tensors (or nested mappings of tensors) with the sample axis first; those under `PACKING` have axes of their own."""

PACKING = "packing"
"""Key of a batch's mapping of indices, for a policy that lays samples of different lengths end to end."""

SOURCE = "rlinf_source"
"""Key of a mixture's training batches, which the trainer takes out: int64 [B], the number of each sample's source."""


class Sample(TypedDict, total=False):
    """One frame on its way through the pipeline. Policies and datasets may add further keys."""

    images: dict[str, NDArray[np.uint8]]
    """Camera name of the policy -> uint8 [height, width, 3], RGB. A camera that the robot lacks has no entry."""
    state: NDArray[np.floating]
    """Proprioception, [D], the robot's units until normalised."""
    actions: NDArray[np.floating]
    """Action chunk, [H, D]; past the end of the episode the last action repeats. Missing at inference."""
    actions_is_pad: NDArray[np.bool_]
    """[H], True where the chunk runs past the end of the episode."""
    prompt: str
    """What the robot is told to do."""
    noise: NDArray[np.float32]
    """A draw of the sample's own (contract 1), made by `PolicyConfig.draw`."""
