"""The ranks of a run, as a trainer and everything below it see them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class ProcessGroup(Protocol):
    """The running process group. Every rank makes the same calls in the same order."""

    rank: int
    """This process, from 0."""
    size: int
    """Number of processes."""
    device: torch.device
    """What this process computes on."""

    def decide(self, decision: Callable[[], T]) -> T:
        """Rank 0's decision on every rank; the others wait as long as it takes. Its `UserError` is raised on all."""
        ...

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank, on every rank."""
        ...

    def first_on_each_machine(self) -> AbstractContextManager[None]:
        """Run the body on one process of each machine before the others, so that files are downloaded once."""
        ...

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank, on every rank."""
        ...

    def wait(self) -> None:
        """Wait until every rank is here."""
        ...

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place, on `device`."""
        ...
