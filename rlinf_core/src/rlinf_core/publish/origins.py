"""Where the base weights and the datasets of a policy come from, and under which licences, without the network.

A model card names ids on the hub, and never a path of this machine. A licence is what `README.md` beside the weights
or the data says; without one it is `unknown`, and not guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlinf_core.errors import UserError
from rlinf_core.hub import Kind, NotInRepositoryError, cached_file, local_path, parse_hub_id
from rlinf_core.untrusted.text import read_text

README = "README.md"
UNKNOWN = "unknown"
"""The hub's own word for a licence that nobody knows."""
LARGEST_CARD = 2**20
"""Bytes of a model card that is read."""
_IN_CACHE = re.compile(r"(?P<kind>model|dataset)s--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots/(?P<commit>[^/]+)")
"""The path of a repository in the cache of the hub's client."""


@dataclass(frozen=True)
class Origin:
    """Base weights or a dataset, as a model card names it."""

    name: str
    """The id on the hub, or the name of the folder."""
    hub_id: str = ""
    """`owner/name`; empty if it is not known to be on the hub."""
    revision: str = ""
    """Branch, tag or commit; empty if it is not known."""
    licence: str = UNKNOWN
    """What its own model card says: an id of the hub such as `apache-2.0`, or the licence's name."""

    def __str__(self) -> str:
        if not self.hub_id:
            return f"`{self.name}` (a local folder, not known to be on the hub)" if self.name else "a local folder"
        return f"`{self.hub_id}`" + (f" at `{self.revision}`" if self.revision else "")


def origin_of(text: str, kind: Kind, revision: str = "", setting: str = "data.repo_id") -> Origin:
    """The origin that a setting names: a hub id, or a local folder or file.

    Args:
        text: `data.repo_id` or `policy.weights`.
        kind: Whether it is a model or a dataset.
        revision: Branch, tag or commit, if another setting names one.
        setting: The setting, for messages.
    """
    try:
        path = local_path(text, setting)
    except UserError:  # A path of another machine, or one that is gone.
        return Origin(Path(text).name)
    if path is None:
        name, own = parse_hub_id(text)
        return Origin(name, name, own or revision, _licence(_cached_card(name, own or revision, kind)))
    card = path / README if path.is_dir() else path.with_name(README)
    if found := _IN_CACHE.search(path.absolute().as_posix()):
        name = f"{found['owner']}/{found['name']}"
        return Origin(name, name, found["commit"], _licence(card))
    return Origin(path.resolve().name if path.is_dir() else "", licence=_licence(card))


def front_matter(card: Path) -> Mapping[str, Any]:
    """The YAML table at the head of a model card that somebody wrote; empty if there is none, or it cannot be read."""
    import yaml

    try:
        if card.stat().st_size > LARGEST_CARD:
            return {}
        text = read_text(card)
        found = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
        # Aliases could multiply a small table into one of gigabytes.
        if found is None or any(isinstance(token, yaml.AliasToken) for token in yaml.scan(found[1])):
            return {}
        table = yaml.safe_load(found[1])
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return table if isinstance(table, dict) else {}


def _cached_card(name: str, revision: str, kind: Kind) -> Path | None:
    try:
        return cached_file(name, README, revision or None, kind)
    except (NotInRepositoryError, ValueError):
        return None


def _licence(card: Path | None) -> str:
    """What a model card says of its licence: its name where the id is only `other`."""
    table = front_matter(card) if card is not None else {}
    named = table.get("license_name") if table.get("license") in (None, "other") else None
    return ", ".join(_texts(named)) or ", ".join(_texts(table.get("license"))) or UNKNOWN


def _texts(value: object) -> Iterator[str]:
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, str) and re.fullmatch(r"[\w .+()-]{1,80}", one.strip()):
            yield one.strip()
