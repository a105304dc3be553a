"""Keys of `[optim]` that the chosen optimizer and schedule do not have, but others have."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from rlinf_core.config.mistakes import Layer
from rlinf_core.plugins.registrations import RegistrationKind
from rlinf_core.plugins.registry import Plugins

CHOOSES: Mapping[RegistrationKind, str] = {"optimizer": "type", "schedule": "schedule"}
"""The key of `[optim]` that chooses each kind."""

Having = Mapping[RegistrationKind, list[str]]
"""The names of the optimizers and schedules that have a key."""


def having(keys: Collection[str], plugins: Plugins) -> dict[str, Having]:
    """Which registered optimizers and schedules have each of these keys; without those that none has."""
    found = {
        key: {
            kind: [one.name for one in plugins.registered_as(kind) if key in one.item.model_fields] for kind in CHOOSES
        }
        for key in keys
    }
    return {key: kinds for key, kinds in found.items() if any(kinds.values())}


def explain(table: Mapping[str, Any], others: Having) -> str:
    """The mistake of a user who sets a key that only others have.

    Args:
        table: The merged `[optim]`.
        others: Who has the key.
    """
    said = [
        f"{kind} {table[CHOOSES[kind]]!r} (optim.{CHOOSES[kind]}) has no such key, but {_listed(names)}"
        for kind, names in others.items()
        if names
    ]
    return f"the {'; the '.join(said)}: leave it out, or choose another"


def _listed(names: list[str]) -> str:
    quoted = [repr(name) for name in names]
    return f"{quoted[0]} has" if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]} have"


def without(layer: Layer, keys: Collection[str]) -> Layer:
    """The layer without some keys of `[optim]`."""
    table = layer.table.get("optim")
    if not isinstance(table, Mapping) or not table.keys() & set(keys):
        return layer
    kept = {key: value for key, value in table.items() if key not in keys}
    return Layer(layer.origin, {**layer.table, "optim": kept})
