"""Who started a run's processes: torchrun's agents, one on each machine.

torchrun starts all processes anew, with the same arguments, when one has failed and when machines come or go; of the
latter it does not tell them. What is in the folder is then the run's own, which `--overwrite` and
`runner.resume = "never"` do not mean. So the folder remembers the agents; a job is the same as long as one of them is.
Torch-free.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Set
from pathlib import Path

from rlinf_core.files import write_text

FILE = "agents"


def own_agent() -> str:
    """The agent that started this process, by a name that no other has; empty: torchrun did not start it."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE", "")  # <a new folder for each agent>/attempt_0/0/error.json
    return f"{socket.gethostname()} {Path(file).parents[2]}" if file else ""


def is_restart(folder: Path, agents: Set[str]) -> bool:
    """Whether one of these agents has started the run in this folder before."""
    return not agents.isdisjoint(_read(folder))


def remember(folder: Path, agents: Set[str]) -> None:
    """Write down who started the run; those of the same job before, which may come again, stay known."""
    if agents:
        known = _read(folder)
        agents = agents | known if not agents.isdisjoint(known) else agents
        write_text(folder / FILE, "".join(f"{agent}\n" for agent in sorted(agents)))


def _read(folder: Path) -> set[str]:
    path = folder / FILE
    return set(path.read_text(encoding="utf-8").splitlines()) if path.exists() else set()
