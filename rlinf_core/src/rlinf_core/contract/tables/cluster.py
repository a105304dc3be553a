"""The `[cluster]` table: on which machines and accelerators a run's processes are started, and by which launcher.

The keys and their meaning are RLinf's. `rlinf launch` starts processes accordingly; a run that was started otherwise
(torchrun by hand) must match the table too (`check_world_size`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from rlinf_core.contract.tables.placement import (
    ALL_MACHINES,
    COMPONENT,
    WITHOUT_ACCELERATORS,
    GroupPlacement,
    NodeGroup,
    parse_ranks,
    read_groups,
    read_placement,
)
from rlinf_core.contract.tables.runner import Section
from rlinf_core.contract.tables.slurm import SlurmConfig
from rlinf_core.errors import UserError, did_you_mean

TORCHRUN, SLURM = "torchrun", "slurm"
LAUNCHERS = (TORCHRUN, SLURM)
"""The launchers that core brings."""


def _check_endpoint(endpoint: str) -> str:
    host, _, port = endpoint.rpartition(":")
    if endpoint and not (host and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError("must be host:port, e.g. node0:29500")
    return endpoint


class ClusterConfig(Section):
    """Where and how a run's processes are started."""

    num_nodes: int = Field(default=1, ge=1)
    """Number of machines. With several, run the same command on each."""
    component_placement: Annotated[dict[str, str | GroupPlacement], BeforeValidator(read_placement)] = {
        COMPONENT: "all"
    }
    """Accelerators to train on, with one process each: `{ actor = "0-3" }`, ranks counted over the cluster, or `"all"`,
    or of a group of machines: `{ actor = { node_group = "a100", placement = "0-7" } }`. Without accelerators the ranks
    only set the number of processes, and `"all"` means one per machine. Other components of RLinf may be there."""
    node_groups: Annotated[tuple[NodeGroup, ...], BeforeValidator(read_groups)] = ()
    """Groups of machines to which `component_placement` may refer. A run that is placed on a group starts on its
    machines only."""
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
    def _groups_have_machines(self) -> ClusterConfig:
        labels = [group.label for group in self.node_groups]
        for group in self.node_groups:
            if labels.count(group.label) > 1 or group.label in (ALL_MACHINES, WITHOUT_ACCELERATORS):
                taken = "is RLinf's own" if labels.count(group.label) == 1 else "is there twice"
                raise ValueError(f"node_groups: the label {group.label!r} {taken}: choose another")
            if (last := max(group.machines(self.num_nodes))) >= self.num_nodes:
                raise ValueError(
                    f"node_groups: {group.label!r} has machine {last}, but num_nodes = {self.num_nodes}: machines are "
                    f"counted from 0 to {self.num_nodes - 1}"
                )
        for component, placed in self.component_placement.items():
            for label in placed.labels if isinstance(placed, GroupPlacement) else ():
                if label not in (*labels, ALL_MACHINES, WITHOUT_ACCELERATORS):
                    raise ValueError(
                        f"component_placement.{component}: there is no node group {label!r}"
                        f"{did_you_mean(label, labels)}: describe it in [[cluster.node_groups]]"
                    )
        return self

    @model_validator(mode="after")
    def _nodes_must_meet(self) -> ClusterConfig:
        if WITHOUT_ACCELERATORS in self._labels:
            raise ValueError(
                f"component_placement.{COMPONENT}: node_group = {WITHOUT_ACCELERATORS!r} means machines without regard "
                "to their accelerators, which training needs: name a group of yours, or leave node_group out"
            )
        chosen = self._chosen_machines()
        if twice := sorted({machine for machine in chosen if chosen.count(machine) > 1}):
            raise ValueError(f"component_placement.{COMPONENT}: its node groups share machine {twice[0]}")
        if self.launcher == TORCHRUN and self.machines > 1 and not self.rdzv_endpoint:
            raise ValueError(
                f"num_nodes = {self.num_nodes} needs rdzv_endpoint: host:port of one of the machines, the same on each"
            )
        if (placed := self.ranks) is not None and len(placed) < self.machines:
            raise ValueError(
                f"num_nodes = {self.num_nodes}, but component_placement has {len(placed)} processes: give every "
                f"machine{' of the node group' * bool(self._labels)} at least one"
            )
        return self

    @property
    def _labels(self) -> list[str]:
        placed = self.component_placement[COMPONENT]
        return placed.labels if isinstance(placed, GroupPlacement) else []

    def _chosen_machines(self) -> list[int]:
        """The machines of the groups that the run is placed on."""
        groups = {group.label: group.machines(self.num_nodes) for group in self.node_groups}
        groups[ALL_MACHINES] = tuple(range(self.num_nodes))
        return [machine for label in self._labels for machine in groups[label]]

    @property
    def machines(self) -> int:
        """Number of machines that train: `num_nodes`, or those of the node groups that the run is placed on."""
        return len(self._chosen_machines()) if self._labels else self.num_nodes

    @property
    def placement(self) -> str:
        """The accelerators to train on, as the config says it."""
        placed = self.component_placement[COMPONENT]
        return placed.placement if isinstance(placed, GroupPlacement) else placed

    @property
    def placement_setting(self) -> str:
        """The same as a setting, for messages."""
        if not self._labels:
            return f'cluster.component_placement = {{ {COMPONENT} = "{self.placement}" }}'
        group = f'node_group = "{",".join(self._labels)}", placement = "{self.placement}"'
        return f"cluster.component_placement = {{ {COMPONENT} = {{ {group} }} }}"

    @property
    def ranks(self) -> tuple[int, ...] | None:
        """Accelerator ranks counted over the machines that train, ascending; None means all."""
        return parse_ranks(self.placement)

    @property
    def unused(self) -> str:
        """What the table says about components that do not exist in training, in one sentence; empty: nothing."""
        others = [component for component in self.component_placement if component != COMPONENT]
        if not others:
            return ""
        return (
            f"cluster.component_placement: only {COMPONENT!r} trains; nothing is started for "
            f"{', '.join(map(repr, others))}, which supervised fine-tuning does not have"
        )


def check_world_size(cluster: ClusterConfig, world_size: int) -> None:
    """Check a run that was started without `rlinf launch`, for example by hand, against its `[cluster]` table.

    Args:
        cluster: The table.
        world_size: Number of processes over all machines.

    Raises:
        UserError: The number differs from the placement, or is not a multiple of `num_nodes`.
    """
    if cluster.ranks is not None and len(cluster.ranks) != world_size:
        raise UserError(
            f"{cluster.placement_setting} asks for {len(cluster.ranks)} processes, but {world_size} were started: "
            'start as many, let `rlinf launch` do it, or set the placement to "all"'
        )
    if world_size % cluster.machines:
        raise UserError(
            f"cluster.num_nodes = {cluster.machines}, but {world_size} processes were started, which is not a "
            "multiple of it: start equally many on each machine, or correct cluster.num_nodes"
        )
