"""On how many machines the ranks of a run are, as their launcher has placed them. Torch-free."""

from __future__ import annotations

import os

from rlinf_core.contract.process_group import ProcessGroup


def count_machines(group: ProcessGroup) -> int:
    """Number of machines, if each has equally many ranks and they are neighbours; 1 if not, or if nobody says so.

    Called on every rank.
    """
    if group.size == 1:
        return 1
    local = int(os.environ.get("LOCAL_WORLD_SIZE", group.size))
    first = group.rank - int(os.environ.get("LOCAL_RANK", group.rank))
    found = group.gather((local, first))
    regular = all(one == (local, rank // local * local) for rank, one in enumerate(found))
    return group.size // local if regular and group.size % local == 0 else 1
