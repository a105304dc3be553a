"""The `[cluster]` table: on which machines and accelerators a run's processes are started, and by which launcher.

The keys and their meaning are RLinf's. `rlinf launch` starts processes accordingly; a run that was started otherwise
(torchrun by hand) must match the table too (`check_world_size`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from rlinf_core.contract.tables.runner import Section
from rlinf_core.contract.tables.slurm import SlurmConfig
from rlinf_core.errors import UserError

TORCHRUN, SLURM = "torchrun", "slurm"
LAUNCHERS = (TORCHRUN, SLURM)
"""The launchers that core brings."""
COMPONENT = "actor"
"""RLinf's name for the processes that train, the only ones in supervised fine-tuning."""


def parse_ranks(text: str) -> tuple[int, ...] | None:
    """Accelerator ranks of a placement, ascending; None means `"all"`.

    Args:
        text: RLinf's syntax: `"all"`, or comma-separated numbers and inclusive ranges, e.g. `"0,2,5-7"`.

    Raises:
        ValueError: The text has another syntax, or names a rank twice.
    """
    if text.strip() == "all":
        return None
    if ":" in text:
        raise ValueError(
            f"{text!r} assigns process ranks (after the colon), which training does not use: it runs one process on "
            f"each accelerator. Write {text.partition(':')[0]!r}"
        )
    ranks: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise ValueError(f'invalid placement {text!r}: write "all", a range "0-3" or a list "0,2,5-7"')
        ranks += range(first, last + 1)
    if twice := sorted({rank for rank in ranks if ranks.count(rank) > 1}):
        raise ValueError(f"{text!r} names {', '.join(map(str, twice))} twice: an accelerator runs one process")
    return tuple(sorted(ranks))


def _read_placement(table: Any) -> Any:
    """Parse e.g. `{"actor": "0-3"}`; as in RLinf, keys may be comma-separated and ranks may be numbers."""
    if not isinstance(table, Mapping):
        raise ValueError('must be a table, e.g. { actor = "all" }')
    placed: dict[str, str] = {}
    for key, ranks in table.items():
        for component in (name.strip() for name in str(key).split(",")):
            if component != COMPONENT:
                raise ValueError(
                    f"there is no component {component!r}: supervised fine-tuning runs only {COMPONENT!r} processes"
                )
            if component in placed:
                raise ValueError(f"{component!r} is placed twice")
            placed[component] = _text(ranks)
    if not placed:
        raise ValueError('is empty: write { actor = "all" }')
    return placed


def _text(ranks: Any) -> str:
    if isinstance(ranks, Mapping):
        raise ValueError(f'node groups are not supported here: write {{ {COMPONENT} = "0-3" }}')
    if isinstance(ranks, bool) or not isinstance(ranks, int | str):
        raise ValueError(f'invalid placement {ranks!r}: write "all", a range "0-3" or a list "0,2,5-7"')
    parse_ranks(str(ranks))
    return str(ranks).strip()


def _check_endpoint(endpoint: str) -> str:
    host, _, port = endpoint.rpartition(":")
    if endpoint and not (host and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError("must be host:port, e.g. node0:29500")
    return endpoint


class ClusterConfig(Section):
    """Where and how a run's processes are started."""

    num_nodes: int = Field(default=1, ge=1)
    """Number of machines. With several, run the same command on each."""
    component_placement: Annotated[dict[str, str], BeforeValidator(_read_placement)] = {COMPONENT: "all"}
    """Accelerators to train on, with one process each: `{ actor = "0-3" }`, ranks counted over the cluster, or `"all"`.
    Without accelerators the ranks only set the number of processes, and `"all"` means one per machine."""
    launcher: str = Field(default=TORCHRUN, min_length=1)
    """What starts the processes of `rlinf launch`: core's `torchrun` or `slurm`, or a launcher that a plugin
    provides."""
    slurm: SlurmConfig = SlurmConfig()
    """What the launcher `slurm` asks for: the table `[cluster.slurm]`."""
    rdzv_endpoint: Annotated[str, AfterValidator(_check_endpoint)] = ""
    """`host:port` of one of the machines, for torchrun's rendezvous; required for several machines."""
    preflight: Literal["auto", "always", "never"] = "auto"
    """Before the first step, print a table of the machines with versions, clocks and the speed of their network, and
    write it to `machines.json`; takes a second or two. `auto`: if there are several."""
    join_timeout_seconds: int = Field(default=600, ge=1)
    """How long a machine waits for the others, at the start and after a failure, before it gives up."""
    max_restarts: int = Field(default=0, ge=0)
    """How often the processes are restarted after a failure; they continue from the last checkpoint."""

    @model_validator(mode="after")
    def _nodes_must_meet(self) -> ClusterConfig:
        if self.launcher == TORCHRUN and self.num_nodes > 1 and not self.rdzv_endpoint:
            raise ValueError(
                f"num_nodes = {self.num_nodes} needs rdzv_endpoint: host:port of one of the machines, the same on each"
            )
        if (placed := self.ranks) is not None and len(placed) < self.num_nodes:
            raise ValueError(
                f"num_nodes = {self.num_nodes}, but component_placement has {len(placed)} processes: give every "
                "machine at least one"
            )
        return self

    @property
    def ranks(self) -> tuple[int, ...] | None:
        """Accelerator ranks counted over the cluster, ascending; None means all."""
        return parse_ranks(self.component_placement[COMPONENT])


def check_world_size(cluster: ClusterConfig, world_size: int) -> None:
    """Check a run that was started without `rlinf launch`, for example by hand, against its `[cluster]` table.

    Args:
        cluster: The table.
        world_size: Number of processes over all machines.

    Raises:
        UserError: The number differs from the placement, or is not a multiple of `num_nodes`.
    """
    placement = f'cluster.component_placement = {{ {COMPONENT} = "{cluster.component_placement[COMPONENT]}" }}'
    if cluster.ranks is not None and len(cluster.ranks) != world_size:
        raise UserError(
            f"{placement} asks for {len(cluster.ranks)} processes, but {world_size} were started: start as many, let "
            '`rlinf launch` do it, or set the placement to "all"'
        )
    if world_size % cluster.num_nodes:
        raise UserError(
            f"cluster.num_nodes = {cluster.num_nodes}, but {world_size} processes were started, which is not a "
            "multiple of it: start equally many on each machine, or correct cluster.num_nodes"
        )
