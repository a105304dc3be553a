"""Weights of a model that trains only some rows of its embedding (`train_embedding = "used_rows"`).

The model then has two parameters, the whole table and the trained rows; published files have one table. Importing this
loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from rlinf_plugins_openpi.weights.source import PublishedWeights

WHOLE, TRAINED = "embedding.weight", "embedding_rows.weight"
"""The model's names of the whole table and of the trained rows."""


def whole_name(name: str) -> str:
    """The parameter whose published tensor contains a parameter: the whole table for trained rows, else itself."""
    return WHOLE if name == TRAINED else name


def with_trained_rows(tensors: Mapping[str, torch.Tensor], rows: Sequence[int]) -> Mapping[str, torch.Tensor]:
    """Insert the trained rows into the whole table, as in published files.

    Args:
        tensors: The model's own parameter names -> whole tensors on the CPU.
        rows: The ids of the trained rows; empty if the whole table is trained.
    """
    if not rows:
        return tensors
    import torch

    whole = tensors[WHOLE].index_copy(0, torch.tensor(rows, device="cpu"), tensors[TRAINED])
    return {name: tensor for name, tensor in tensors.items() if name != TRAINED} | {WHOLE: whole}


class WithRows:
    """A `WeightSource` for a model that trains some rows, which are read from the whole table.

    Args:
        weights: The published weights.
        rows: The ids of the trained rows.
    """

    def __init__(self, weights: PublishedWeights, rows: Sequence[int]) -> None:
        self._weights, self._rows = weights, list(rows)

    def tensor(self, name: str) -> torch.Tensor:
        """See `WeightSource`."""
        tensor = self._weights.tensor(whole_name(name))
        return tensor[self._rows] if name == TRAINED else tensor

    def file_of(self, name: str) -> str:
        """See `rlinf_core.contract.module.LocatedWeights`."""
        return self._weights.file_of(whole_name(name))

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """See `WeightSource`."""
        self._weights.check({name: shape for name, shape in shapes.items() if name != TRAINED})
