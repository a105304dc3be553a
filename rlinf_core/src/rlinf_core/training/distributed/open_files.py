"""How many files a process of a run opens at the same time, against the limit that it has (`ulimit -n`). Torch-free.

Sockets decide: each gloo group costs a rank one connection to every other rank of the group, and one that listens. A
run has two of all ranks (`Processes`, and the thread that writes checkpoints); with several copies of the model, one of
a copy's shards and one of a shard's copies. NCCL's sockets, a few per channel, are in `OTHERS`.
"""

from __future__ import annotations

import resource
from contextlib import suppress

from rlinf_core.errors import UserError

STORE = 2
"""Connections to the launcher's store: of the process group, and of the signs of life."""
WORKER = 6
"""Files that a worker of the data loader costs the process that has started it."""
OTHERS = 256
"""Allowed for files of datasets and checkpoints, libraries, loggers and NCCL."""


def count_sockets(ranks: int, copies: int = 1) -> int:
    """Sockets of a rank.

    Args:
        ranks: Number of processes.
        copies: Number of copies of the model (`trainer.num_replicas`).
    """
    if ranks == 1:
        return 0
    return 2 * ranks + (ranks // copies + copies if copies > 1 else 0) + STORE


def count_open_files(ranks: int, copies: int = 1, workers: int = 0) -> int:
    """Files that a rank has open at the same time, at most; see `count_sockets`.

    Args:
        ranks: Number of processes.
        copies: Number of copies of the model (`trainer.num_replicas`).
        workers: Number of its data loader's workers.
    """
    return count_sockets(ranks, copies) + WORKER * workers + OTHERS


def find_limit() -> int:
    """How many files a process may open here if it raises its limit to the highest that it may have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**31 if hard == resource.RLIM_INFINITY else hard


def too_few(needed: int, ranks: int) -> str:
    """What to say if the limit is too low; empty: it is not."""
    limit = find_limit()
    if needed <= limit:
        return ""
    return (
        f"each of the {ranks} processes opens up to {needed} files and sockets, and the limit is {limit} here "
        "(`ulimit -Hn`): raise it on every machine, with LimitNOFILE= of the service that starts the processes, in "
        "/etc/security/limits.conf, or `docker run --ulimit nofile=65536`"
    )


def allow_open_files(needed: int, ranks: int) -> None:
    """Raise this process's soft limit to what it needs; its children inherit it.

    Raises:
        UserError: The hard limit is lower.
    """
    if wrong := too_few(needed, ranks):
        raise UserError(wrong)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        with suppress(ValueError, OSError):  # A sandbox may forbid it; the soft limit may do.
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
