"""Rendezvous of the ranks of one start, without those of an earlier one.

torchrun keeps one store for all restarts of a job. An address that a dead worker left there (gloo's, or NCCL's id) has
the same key as that of the rank that replaces it, and ranks that read it fail to connect. The restart count in the keys
does not help: it stays the same when machines join or leave. So the ranks first agree on a prefix of the store that no
earlier start has used.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

from rlinf_core.errors import RunError
from rlinf_core.torch_names import DistError, PrefixStore, Store
from rlinf_core.torch_names import rendezvous as torch_rendezvous

PAUSES = (0.02, 0.5)
"""Seconds between two polls of the store: at first, and at most."""
NAMED = 8
"""Most ranks that an error lists."""


def rendezvous(timeout: timedelta) -> tuple[Store, int, int]:
    """Store, rank and size for `torch.distributed.init_process_group` in a process that torchrun started.

    Raises:
        RunError: Some rank has not arrived in time, or the store is gone.
    """
    store, rank, size = next(iter(torch_rendezvous("env://", timeout=timeout)))
    try:
        return agree(store, rank, size, timeout), rank, size
    except DistError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RunError(f"rank {rank} lost the rendezvous store at {place}: {error}") from error


def agree(store: Store, rank: int, size: int, timeout: timedelta) -> Store:
    """The part of a store that belongs to the ranks alive now.

    Rank 0 draws the number of this start. Every other rank writes a nonce, which rank 0 answers with that number; once
    all ranks have confirmed the number, its prefix is used. A nonce and its answer each prove that the writer is alive.

    Args:
        store: The launcher's store, with whatever earlier ranks left there.
        rank: The rank of this process.
        size: Number of ranks.
        timeout: How long to wait for the others.

    Raises:
        RunError: Some rank has not arrived in time, or this process is left over from an earlier start.
    """
    end, pause, parent = time.monotonic() + timeout.total_seconds(), PAUSES[0], os.getppid()
    shared = PrefixStore("rendezvous", store)
    member = _Leader(shared, size) if rank == 0 else _Follower(shared, rank)
    while (start := member.poll()) is None:
        if os.getppid() != parent:
            raise RunError(f"rank {rank} is left over: its parent process is gone")
        if time.monotonic() > end:
            raise RunError(f"rank {rank} waited {timeout.total_seconds():g} s for {member.missing()} to start")
        time.sleep(pause)
        pause = min(1.2 * pause, PAUSES[1])
    return PrefixStore(f"start {start}", store)


class _Leader:
    """Rank 0."""

    def __init__(self, store: Store, size: int) -> None:
        self._store = store
        self._number = store.add("starts", 1)
        self._missing = list(range(1, size))
        """Ranks that have not confirmed."""

    def poll(self) -> int | None:
        """Answer all nonces; returns the number of the start once all ranks have confirmed it."""
        if self._store.add("starts", 0) != self._number:
            raise RunError("rank 0 is left over: the ranks have been started again")
        self._missing = [rank for rank in self._missing if not self._has_confirmed(rank)]
        if self._missing:
            return None
        self._store.set(f"complete/{self._number}", "")
        return self._number

    def _has_confirmed(self, rank: int) -> bool:
        if nonce := _read(self._store, f"nonce/{rank}"):
            # On every poll: a left-over rank 0 may have overwritten the answer with its own number.
            self._store.set(f"number/{nonce}", str(self._number))
        return bool(nonce) and _read(self._store, f"confirmed/{self._number}/{rank}") == nonce

    def missing(self) -> str:
        ranks = self._missing
        more = f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
        return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:NAMED]))}{more}"


class _Follower:
    """Any other rank."""

    def __init__(self, store: Store, rank: int) -> None:
        self._store, self._rank, self._nonce = store, rank, uuid.uuid4().hex
        self._confirmed = ""
        store.set(f"nonce/{rank}", self._nonce)

    def poll(self) -> int | None:
        """Confirm rank 0's number; returns it once all ranks have confirmed."""
        if _read(self._store, f"nonce/{self._rank}") != self._nonce:
            raise RunError(f"rank {self._rank} is left over: another process has taken its place")
        number = _read(self._store, f"number/{self._nonce}")
        if number != self._confirmed:
            self._store.set(f"confirmed/{number}/{self._rank}", self._nonce)
            self._confirmed = number
        return int(number) if number and self._store.check([f"complete/{number}"]) else None

    def missing(self) -> str:
        return "others" if self._confirmed else "rank 0"


def _read(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""
