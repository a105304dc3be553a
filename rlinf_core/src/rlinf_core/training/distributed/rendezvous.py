"""How the ranks of one start find each other, and nobody of an earlier one.

torchrun keeps one store for all restarts of a job. What a dead worker has left there, its gloo address or NCCL id, lies
under the key where the next one looks for that of a living rank, which then fails to connect. The number of restarts in
the keys does not help: it stays the same when machines come and go. So ranks first agree on a part of the store that no
start before has used.
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
"""Seconds between two looks into the store: at first, and when it takes long."""
NAMED = 8
"""Ranks that an error names at most."""


def rendezvous(timeout: timedelta) -> tuple[Store, int, int]:
    """What `torch.distributed.init_process_group` needs of a process that torchrun has started: store, rank, size.

    Raises:
        RunError: Some rank has not come in time, or the store has gone.
    """
    store, rank, size = next(iter(torch_rendezvous("env://", timeout=timeout)))
    try:
        return agree(store, rank, size, timeout), rank, size
    except DistError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RunError(f"rank {rank} lost the store at {place} through which ranks meet: {error}") from error


def agree(store: Store, rank: int, size: int, timeout: timedelta) -> Store:
    """The part of a store that is for the ranks that are now alive.

    Rank 0 takes the next number of a start. Every other rank writes a nonce, which rank 0 answers with that number; the
    number's part is taken once all have confirmed it. Who asks is alive, and so is who answers a nonce.

    Args:
        store: What the launcher gives, with whatever earlier ranks have left there.
        rank: Of this process.
        size: Number of ranks.
        timeout: How long to wait for the others.

    Raises:
        RunError: Some rank has not come in time; or this process is left over from an earlier start.
    """
    end, pause, parent = time.monotonic() + timeout.total_seconds(), PAUSES[0], os.getppid()
    shared = PrefixStore("rendezvous", store)
    member = _Leader(shared, size) if rank == 0 else _Follower(shared, rank)
    while (start := member.poll()) is None:
        if os.getppid() != parent:
            raise RunError(f"rank {rank} is left over: what started it is gone")
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
        """Answer whoever asks; the number of the start, once all have confirmed it."""
        if self._store.add("starts", 0) != self._number:
            raise RunError("rank 0 is left over: the ranks have been started anew")
        self._missing = [rank for rank in self._missing if not self._has_confirmed(rank)]
        if self._missing:
            return None
        self._store.set(f"complete/{self._number}", "")
        return self._number

    def _has_confirmed(self, rank: int) -> bool:
        if nonce := _read(self._store, f"nonce/{rank}"):
            # Each time: a rank 0 that is left over may just have given its own answer, for the last time.
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
        """Confirm rank 0's number; it, once all have."""
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
