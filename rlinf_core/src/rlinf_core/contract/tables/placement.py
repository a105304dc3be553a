"""RLinf's placement: which accelerators of the cluster, or of groups of its machines, a component's processes get.

The syntax is RLinf's (`scheduler.placement`). Supervised fine-tuning has one component, whose processes train. What a
recipe says about others is kept and named (`ClusterConfig.unused`): one placement serves several kinds of runs there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from rlinf_core.contract.tables.runner import Section

COMPONENT = "actor"
"""RLinf's name for the processes that train, the only ones in supervised fine-tuning."""
ALL_MACHINES, WITHOUT_ACCELERATORS = "cluster", "node"
"""RLinf's own labels: all machines; machines without regard to their accelerators."""

MOST = 2**20
"""Most accelerators in a range."""


def parse_ranks(text: str) -> tuple[int, ...] | None:
    """Accelerator ranks of a placement, ascending; None means `"all"`.

    Args:
        text: RLinf's syntax: `"all"`, or comma-separated numbers and inclusive ranges, e.g. `"0,2,5-7"`. Ranks of
            processes, after a colon, have to give each accelerator one process: `"0-3:0-3"`.

    Raises:
        ValueError: The text has another syntax, names a rank twice, or gives an accelerator several processes.
    """
    if text.strip() == "all":
        return None
    ranks: list[int] = []
    processes = 0
    for part in text.split(","):
        resources, colon, of_processes = part.partition(":")
        found = _parse_range(resources, text)
        ranks += found
        if colon and _parse_range(of_processes, text) != list(range(processes, processes + len(found))):
            plain = re.sub(r"\s*:[^,]*", "", text)
            raise ValueError(
                f"{text!r} assigns process ranks (after the colon) that training does not use: it runs one process on "
                f"each accelerator, in order. Write {plain!r}"
            )
        processes += len(found)
    if twice := sorted({rank for rank in ranks if ranks.count(rank) > 1}):
        raise ValueError(f"{text!r} names {', '.join(map(str, twice))} twice: an accelerator runs one process")
    return tuple(sorted(ranks))


def _parse_range(part: str, text: str) -> list[int]:
    match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part, re.ASCII)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if last < first or last - first >= MOST:
        raise ValueError(f'invalid placement {text!r}: write "all", a range "0-3" or a list "0,2,5-7"')
    return list(range(first, last + 1))


def _as_text(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f'invalid placement {value!r}: write "all", a range "0-3" or a list "0,2,5-7"')
    parse_ranks(str(value))
    return str(value).strip()


def _as_labels(value: Any) -> Any:
    """Labels as RLinf writes them: one, several with commas, or a list."""
    labels = value.split(",") if isinstance(value, str) else value
    if not isinstance(labels, list | tuple) or not all(isinstance(label, str) and label.strip() for label in labels):
        raise ValueError(f'{value!r} names no node group: write "a100", or "a100,h100" for several')
    return ",".join(label.strip() for label in labels)


Ranks = Annotated[str, BeforeValidator(_as_text)]


class GroupPlacement(Section):
    """Accelerators of some machines: `{ node_group = "a100", placement = "0-7" }`."""

    node_group: Annotated[str, BeforeValidator(_as_labels)] = ALL_MACHINES
    """Label in `cluster.node_groups`, or several with commas, whose machines follow one another."""
    placement: Ranks = "all"
    """Ranks counted over the machines of these groups."""

    @property
    def labels(self) -> list[str]:
        """The labels of the groups."""
        return self.node_group.split(",")


class NodeGroup(Section):
    """An entry of `[[cluster.node_groups]]`: machines that are alike."""

    label: str = Field(pattern=r"^[^,\s]+$")
    """Name by which placements refer to the group."""
    node_ranks: Ranks
    """Its machines, from 0: `"0-3"`, `"0,2"`, or `"all"`."""

    def machines(self, num_nodes: int) -> tuple[int, ...]:
        """The machines, ascending."""
        ranks = parse_ranks(self.node_ranks)
        return tuple(range(num_nodes)) if ranks is None else ranks


USELESS = ("env_configs", "hardware")
"""Keys of RLinf's node groups that say how Ray starts workers, and what robots there are."""


def read_groups(groups: Any) -> Any:
    """Refuse in one message what training has no use for."""
    if not isinstance(groups, list | tuple):
        raise ValueError(
            'must be a list of tables, e.g. [[cluster.node_groups]] with label = "a100", node_ranks = "0-1"'
        )
    found = [
        f"{key} of {group.get('label')!r}"
        for group in groups
        if isinstance(group, Mapping)
        for key in USELESS
        if key in group
    ]
    if found:
        raise ValueError(
            f"training has no use for {', '.join(found)}: leave them out. It runs with the Python and the environment "
            "of `rlinf launch` on each machine"
        )
    return groups


def read_placement(table: Any) -> Any:
    """Parse e.g. `{"actor,env": "0-3"}`: keys may join components, and ranks may be numbers or of a node group."""
    if not isinstance(table, Mapping):
        raise ValueError('must be a table, e.g. { actor = "all" }')
    placed: dict[str, Any] = {}
    for key, ranks in table.items():
        for component in (name.strip() for name in str(key).split(",")):
            if component in placed:
                raise ValueError(f"{component!r} is placed twice")
            placed[component] = ranks if isinstance(ranks, Mapping | GroupPlacement) else _as_text(ranks)
    if COMPONENT not in placed:
        others = f" besides {', '.join(placed)}" if placed else ""
        raise ValueError(f'places no {COMPONENT!r}{others}, the component that trains: write {{ {COMPONENT} = "all" }}')
    return placed
