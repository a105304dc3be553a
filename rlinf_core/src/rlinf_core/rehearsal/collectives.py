"""What the ranks of a run exchange: heard in order on each rank, compared between ranks, and summed up."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from rlinf_core.torch_names import TorchDispatchMode, group_size_of, tree_leaves

NAMES = {
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "allreduce_": "all-reduce",
    "alltoall_base_": "all-to-all",
    "alltoall_": "all-to-all",
    "broadcast_": "broadcast",
}
"""Names of torch's operations -> what they are called."""
_UNIT = re.compile(r"FSDP::\S+(?: for)? \(?([^()]+)\)?$")


@dataclass(frozen=True)
class Collective:
    """One collective, as one rank calls it."""

    kind: str
    """`all-gather`, `reduce-scatter`, `all-reduce`, ..."""
    ranks: int
    """Number of ranks in its group."""
    dtype: str
    nbytes: int
    """Size of the whole message: what a gather puts out, what a reduction takes in."""
    where: str
    """The unit whose parameters or gradients it exchanges, or the step's phase."""
    of_unit: bool
    """Whether it exchanges parameters or gradients of a unit."""

    @property
    def compared(self) -> tuple[object, ...]:
        """What has to be equal on all ranks; with `all-to-all`, each rank sends its own number of elements."""
        size = None if self.kind == "all-to-all" else self.nbytes
        return self.kind, self.ranks, self.dtype, size

    @property
    def received(self) -> float:
        """Bytes that this rank receives if the ranks form a ring."""
        rounds = 2 if self.kind == "all-reduce" else 1
        return rounds * self.nbytes * (self.ranks - 1) / self.ranks

    def __str__(self) -> str:
        return f"{self.kind} of {self.nbytes:,} bytes of {self.dtype} among {self.ranks} ranks ({self.where})"


class Listening(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hears a rank's collectives, in order, with the unit or the phase that they belong to."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.heard: list[Collective] = []
        self._labels: list[str] = []

    @contextmanager
    def labelled(self) -> Iterator[None]:
        """Learn unit and phase from the labels that FSDP and the trainer set for profilers, while the body runs."""
        label: Any = torch.profiler.record_function
        entered, left = label.__enter__, label.__exit__

        def enter(one: Any) -> Any:
            self._labels.append(one.name)
            return entered(one)

        def leave(one: Any, *error: Any) -> Any:
            self._labels.pop()
            return left(one, *error)

        with mock.patch.object(label, "__enter__", enter), mock.patch.object(label, "__exit__", leave):
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional") and "wait_tensor" not in func.name():
            self._hear(func, args)
        return out

    def _hear(self, func: Any, args: Any) -> None:
        tensors = [one for one in tree_leaves(args) if isinstance(one, torch.Tensor)]
        largest = max(tensors, key=lambda one: one.nbytes, default=torch.empty(0, device="meta"))
        name = func.name().partition("::")[2].partition(".")[0]
        kind = NAMES.get(name, name.strip("_").replace("_", "-"))
        inner = next((label for label in reversed(self._labels) if label.startswith("FSDP::")), "")
        where = self._labels[0] if self._labels and not inner else "setup"
        if inner:
            unit = _UNIT.match(inner)
            where = unit[1] if unit else "the root"
        dtype = str(largest.dtype).removeprefix("torch.")
        self.heard.append(Collective(kind, group_size_of(func, args), dtype, largest.nbytes, where, bool(inner)))


@dataclass(frozen=True)
class Difference:
    """Where two ranks first do something different."""

    number: int
    """Number of the collective, from 1."""
    rank: int
    collective: Collective | None
    """None: this rank is done."""
    other_rank: int
    other: Collective | None

    def __str__(self) -> str:
        return (
            f"collective {self.number} differs between ranks, which would wait for each other forever: "
            f"rank {self.rank} calls {self.collective or 'nothing more'}, "
            f"rank {self.other_rank} {self.other or 'nothing more'}"
        )


def first_difference(by_rank: Sequence[tuple[int, Sequence[Collective]]]) -> Difference | None:
    """The first collective that is not the same on all ranks; None if all are.

    Args:
        by_rank: Ranks, and what each calls.
    """
    (rank, first), *others = by_rank
    found: list[Difference] = []
    for other_rank, other in others:
        for number in range(max(len(first), len(other))):
            one, two = (calls[number] if number < len(calls) else None for calls in (first, other))
            if one is None or two is None or one.compared != two.compared:
                found.append(Difference(number + 1, rank, one, other_rank, two))
                break
    return min(found, key=lambda one: one.number, default=None)
