"""Linear layers with low-rank adapters. Torch and the standard library only.

A layer may stack several published matrices along its rows, as queries, keys and values: each has adapters of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import nn

Read = Callable[[], torch.Tensor]
"""Reads a tensor from a file when it is needed."""


class LowRank(NamedTuple):
    """The change of a matrix [outputs, inputs], in PEFT's terms: scale · B A."""

    a: torch.Tensor
    """[rank, inputs]"""
    b: torch.Tensor
    """[outputs, rank]"""
    scale: float


@runtime_checkable
class LowRankAdapter(Protocol):
    """An adapter that can be written in PEFT's layout."""

    def low_rank(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, LowRank]:
        """The changes that it makes, by the published names of modules.

        Args:
            tensors: The parameters that the module adds, by their names within it: whole, float32, on the CPU.
        """
        ...


class Slice(NamedTuple):
    """Rows of a layer's weight that are one published matrix."""

    module: str
    """Published name of the module that the matrix is the weight of."""
    first: int
    rows: int
    rank: int
    scale: float
    start: tuple[Read, Read] | None = None
    """Read the values of A and B to start from; None: PEFT's initial values."""

    @property
    def name(self) -> str:
        """The last word of the module's name, by which the layer's parameters are distinguished."""
        return self.module.rpartition(".")[2]


class LoraLinear(nn.Linear):
    """A linear layer whose weight W is changed by scale · B A in some rows; only A and B are trained.

    It holds the parameters of the layer whose place it takes. Those it adds are `lora_A_<name>` [rank, inputs] and
    `lora_B_<name>` [rows, rank] for each slice.

    Args:
        layer: The layer.
        slices: The rows with adapters, first rows first, each with a rank of at least 1.
        dropout: Probability with which an element of an adapter's input is zeroed in training.
    """

    def __init__(self, layer: nn.Linear, slices: Sequence[Slice], dropout: float = 0.0) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        self.kept_for_export = False
        """Whether it is a layer that no loss reaches, so that the adapters only are what they were."""
        self.weight, self.bias = layer.weight, layer.bias
        self.slices, self.dropout = tuple(slices), dropout
        for one in slices:
            a = torch.empty(one.rank, layer.in_features, dtype=torch.float32, device=layer.weight.device)
            b = torch.empty(one.rows, one.rank, dtype=torch.float32, device=layer.weight.device)
            self.register_parameter(f"lora_A_{one.name}", nn.Parameter(a))
            self.register_parameter(f"lora_B_{one.name}", nn.Parameter(b))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., inputs] -> [..., outputs]."""
        base = super().forward(input)
        low = self._low(input)
        # All slices in one product that also adds: the outputs are read and written once. B with zeros between slices
        # is small, as ranks are.
        flat = torch.addmm(base.flatten(0, -2), low.flatten(0, -2), self._b().t())
        return flat.view(base.shape)

    def _low(self, x: torch.Tensor) -> torch.Tensor:
        """The inputs multiplied with every A: [..., sum of ranks]."""
        matrices = [getattr(self, f"lora_A_{one.name}") for one in self.slices]
        if not (self.dropout and self.training):
            return F.linear(x, torch.cat(matrices) if len(matrices) > 1 else matrices[0])
        # A mask for each adapter, as PEFT has one for each.
        return torch.cat([F.linear(F.dropout(x, self.dropout), a) for a in matrices], dim=-1)

    def _b(self) -> torch.Tensor:
        """Every scale · B at its rows and ranks, zeros elsewhere: [outputs, sum of ranks]."""
        blocks: list[torch.Tensor] = []
        row = 0
        for one in self.slices:
            b = getattr(self, f"lora_B_{one.name}")
            if one.first > row:
                blocks.append(b.new_zeros(one.first - row, 0))
            blocks.append(b if one.scale == 1.0 else one.scale * b)
            row = one.first + one.rows
        if row < self.out_features:
            blocks.append(blocks[0].new_zeros(self.out_features - row, 0))
        whole: torch.Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
        return whole

    def initial_value(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        """B is zero, so that the policy starts unchanged; A is uniform within 1/sqrt(inputs) (PEFT's default)."""
        kind, _, which = name.removeprefix("lora_").partition("_")
        start = next(one.start for one in self.slices if one.name == which)
        if start is not None:
            return start[kind == "B"]().float()
        if kind == "B":
            return torch.zeros(shape, device="cpu")
        bound = 1.0 / math.sqrt(shape[1])
        return torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator)

    def low_rank(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, LowRank]:
        """See `LowRankAdapter`."""
        return {
            one.module: LowRank(tensors[f"lora_A_{one.name}"], tensors[f"lora_B_{one.name}"], one.scale)
            for one in self.slices
        }

    def merged(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weight with the adapters in it; the product is computed in float64."""
        weight = tensors["weight"].clone()
        for one in self.slices:
            a, b, scale = self.low_rank(tensors)[one.module]
            weight[one.first : one.first + one.rows] += (scale * (b.double() @ a.double())).to(weight.dtype)
        return {"weight": weight}
