"""How the ranks of one start find each other, and nobody of an earlier one.

torchrun keeps one store for all restarts of a job. What a dead worker has left there, its gloo address or NCCL id, lies
under the key where the next one looks for that of a living rank, which then fails to connect. The number of restarts in
the keys does not help: it stays the same when machines come and go. So ranks first agree on a word that no start before
has used, and all else goes under it.
"""

from __future__ import annotations

import json
import time
import uuid
from datetime import timedelta

from torch.distributed import PrefixStore, Store, rendezvous  # type: ignore[attr-defined]  # torch's stubs

from rlinf_core.errors import RunError

PAUSE = 0.02
"""Seconds between two looks into the store."""


def meet(timeout: timedelta) -> tuple[Store, int, int]:
    """What `torch.distributed.init_process_group` needs of a process that torchrun has started: store, rank, size.

    Raises:
        RunError: Some rank has not come in time.
    """
    store, rank, size = next(iter(rendezvous("env://", timeout=timeout)))
    return agree(store, rank, size, timeout), rank, size


def agree(store: Store, rank: int, size: int, timeout: timedelta) -> Store:
    """The part of a store that is for the ranks that are now alive.

    Each rank writes a nonce. Rank 0 publishes what it finds, its own nonce first, and again whenever that changes. A
    rank that finds its own nonce there confirms rank 0's, which becomes the prefix once all have.

    Args:
        store: What the launcher gives, with whatever earlier ranks have left there.
        rank: Of this process.
        size: Number of ranks.
        timeout: How long to wait for the others.

    Raises:
        RunError: Some rank has not come in time.
    """
    nonce, meeting = uuid.uuid4().hex, PrefixStore("meeting", store)
    meeting.set(f"nonce/{rank}", nonce)
    end = time.monotonic() + timeout.total_seconds()
    lead = _gather if rank == 0 else _follow
    while (word := lead(meeting, rank, size, nonce)) is None:
        if time.monotonic() > end:
            raise RunError(f"rank {rank} waited {timeout.total_seconds():g} s for the other {size - 1} to start")
        time.sleep(PAUSE)
    return PrefixStore(word, store)


def _gather(meeting: Store, _: int, size: int, nonce: str) -> str | None:
    """Rank 0: publish who is there; the word, once all of them have confirmed it."""
    present = [nonce, *(_read(meeting, f"nonce/{rank}") for rank in range(1, size))]
    if _read(meeting, "present") != (text := json.dumps(present)):
        meeting.set("present", text)
    if any(_read(meeting, f"confirmed/{rank}") != f"{nonce} {present[rank]}" for rank in range(1, size)):
        return None
    meeting.set(f"complete/{nonce}", "")
    return nonce


def _follow(meeting: Store, rank: int, size: int, nonce: str) -> str | None:
    """Another rank: confirm rank 0's word; the word, once all have."""
    present = json.loads(_read(meeting, "present") or "[]")
    if len(present) != size or present[rank] != nonce:
        return None  # Rank 0's list is of another start, or not yet of this one.
    meeting.set(f"confirmed/{rank}", f"{present[0]} {nonce}")
    return present[0] if meeting.check([f"complete/{present[0]}"]) else None


def _read(meeting: Store, key: str) -> str:
    return meeting.get(key).decode() if meeting.check([key]) else ""
