"""A plugin for test_memory.py: each rank writes the memory of itself and of its loader workers, every 1,000 steps."""

import ctypes
import gc
import json
import os
from pathlib import Path

from rlinf_core import hookimpl

EVERY = 1_000
M_ARENA_MAX = -8
# Every save is a thread, and glibc gives threads arenas that fragment at first: some MB, whatever is allocated in them.
ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
PAGE = os.sysconf("SC_PAGE_SIZE")


def resident(process):
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * PAGE


def children():
    return [int(one) for task in Path("/proc/self/task").iterdir() for one in (task / "children").read_text().split()]


@hookimpl
def rlinf_gradients_ready(trainer, policy, step, scale):
    if step % EVERY:
        return
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    found = {"step": step, "rank": resident("self"), "workers": [resident(one) for one in children()]}
    with (trainer.run.folder / f"memory_{os.environ['RANK']}.jsonl").open("a") as file:
        file.write(json.dumps(found) + "\n")
