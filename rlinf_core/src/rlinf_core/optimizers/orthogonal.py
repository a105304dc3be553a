"""Orthogonalise matrices that are sharded by rows, each on one rank.

Muon's update of a matrix needs the whole matrix, but FSDP2 leaves every rank with some of its rows. Each matrix is
therefore sent to one rank, which computes for all, and every rank gets its own rows of the result: as much work per
rank as there are matrices / ranks, and two exchanges of all elements, in the dtype of the iterations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the iteration x -> a·x + b·x³ + c·x⁵ on singular values, https://kellerjordan.github.io/posts/muon/.
They are steep at 0 and leave values between about 0.7 and 1.2 instead of converging to 1."""
SMALLEST_NORM = 1e-7


def newton_schulz(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """Move a matrix's singular values close to 1.

    Args:
        matrix: [M, N], bfloat16 or float32, in which it is computed.
        steps: Iterations.

    Returns:
        [M, N], in the same dtype.
    """
    a, b, c = QUINTIC
    x = matrix
    tall = x.size(0) > x.size(1)  # The Gram matrix of the shorter side is smaller.
    if tall:
        x = x.T
    x = x / x.norm().clamp(min=SMALLEST_NORM)  # The Frobenius norm bounds the spectral norm.
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Sharding(NamedTuple):
    """How the ranks of a group share a parameter's rows."""

    group: dist.ProcessGroup | None
    """None: this rank has all rows."""
    rank: int
    ranks: int
    device: torch.device
    """Where matrices are exchanged and computed: the accelerator, even if the parameters are offloaded to the CPU."""

    @classmethod
    def of(cls, parameter: nn.Parameter) -> Sharding:
        """The sharding of a parameter.

        Raises:
            ValueError: It is sharded otherwise than along axis 0 over one dimension of the device mesh.
        """
        if not isinstance(parameter, DTensor):
            return cls(None, 0, 1, parameter.device)
        mesh, placements = parameter.device_mesh, parameter.placements
        device = torch.device(mesh.device_type)
        over = [dim for dim, placement in enumerate(placements) if placement != Replicate()]
        if len(over) > 1 or (over and placements[over[0]] != Shard(0)):
            raise ValueError(f"Muon needs matrices that are sharded by rows, not {placements}")
        if not over or mesh.size(over[0]) == 1:
            return cls(None, 0, 1, device)
        return cls(mesh.get_group(over[0]), mesh.get_local_rank(over[0]), mesh.size(over[0]), device)


class Matrix(NamedTuple):
    """A matrix: some rows of a parameter, or all."""

    parameter: nn.Parameter
    start: int
    """Its first row in the parameter."""
    rows: int
    columns: int

    def held(self, rank: int, ranks: int) -> slice:
        """Its rows on a rank, counted from the first row of that rank's shard; FSDP2 cuts as `torch.chunk` does."""
        chunk = -(-self.parameter.shape[0] // ranks)
        first = rank * chunk
        begin, end = max(self.start, first), min(self.start + self.rows, first + chunk)
        return slice(begin - first, max(begin, end) - first)

    def numel(self, rank: int, ranks: int) -> int:
        """Number of its elements on a rank."""
        rows: slice = self.held(rank, ranks)
        return int(rows.stop - rows.start) * self.columns


Directions = Iterator[tuple[Matrix, slice, torch.Tensor]]
"""A matrix, its rows in this rank's shard, and those rows of the orthogonalised matrix."""


class Iterations(NamedTuple):
    """How matrices are orthogonalised."""

    steps: int
    dtype: torch.dtype
    """Dtype of the matrix products and of what ranks exchange."""


def orthogonalize(
    matrices: Sequence[Matrix],
    rows_of: Callable[[Matrix, slice], torch.Tensor],
    sharding: Sharding,
    iterations: Iterations,
) -> Directions:
    """Orthogonalise matrices; every rank of the group calls it with the same ones.

    Args:
        matrices: All have the same `sharding`. Like shapes are computed at the same time, one on each rank.
        rows_of: This rank's rows of a matrix, given their place in its shard.
        sharding: How the rows are shared.
        iterations: Their number and dtype.
    """
    ordered = sorted(matrices, key=lambda one: (-one.rows * one.columns, one.rows))
    for first in range(0, len(ordered), sharding.ranks):
        yield from _one_each(ordered[first : first + sharding.ranks], rows_of, sharding, iterations)


def _one_each(
    matrices: Sequence[Matrix],
    rows_of: Callable[[Matrix, slice], torch.Tensor],
    sharding: Sharding,
    iterations: Iterations,
) -> Directions:
    """Orthogonalise at most one matrix per rank: the rank at its place in the list computes it."""
    rank, ranks = sharding.rank, sharding.ranks
    places = [matrix.held(rank, ranks) for matrix in matrices]
    own = [
        rows_of(matrix, place).to(sharding.device, iterations.dtype)
        for matrix, place in zip(matrices, places, strict=True)
    ]
    if sharding.group is None:
        found = [newton_schulz(one, iterations.steps) for one in own]
    else:
        idle = [0] * (ranks - len(matrices))
        sent = [one.numel() for one in own] + idle
        mine = matrices[rank] if rank < len(matrices) else None
        received = [mine.numel(other, ranks) if mine else 0 for other in range(ranks)]
        whole = _exchange(torch.cat([one.flatten() for one in own]), sent, received, sharding.group)
        if mine:
            whole = newton_schulz(whole.view(mine.rows, mine.columns), iterations.steps).flatten()
        shares = torch.split(_exchange(whole, received, sent, sharding.group), sent)
        found = [share.view(one.shape) for share, one in zip(shares, own, strict=False)]
    yield from zip(matrices, places, found, strict=True)


def _exchange(
    sent: torch.Tensor, sent_sizes: Sequence[int], received_sizes: Sequence[int], group: dist.ProcessGroup
) -> torch.Tensor:
    """Send a piece of a flat tensor to each rank; returns the pieces from all ranks, one after the other."""
    received = sent.new_empty(sum(received_sizes))
    dist.all_to_all_single(received, sent.contiguous(), list(received_sizes), list(sent_sizes), group=group)
    return received


def rate_factor(rows: int, columns: int, adjust: str) -> float:
    """By what the learning rate of a matrix is multiplied.

    Args:
        rows: M: outputs.
        columns: N: inputs.
        adjust: `"original"`: sqrt(max(1, M/N)); `"match_rms_adamw"`: 0.2 * sqrt(max(M, N)), with which an update
            has about the root mean square of AdamW's (https://arxiv.org/abs/2502.16982, equation 4).
    """
    return math.sqrt(max(1.0, rows / columns)) if adjust == "original" else 0.2 * math.sqrt(max(rows, columns))
