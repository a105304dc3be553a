"""The tables of `[[data.mixture]]` before validation: names, misplaced keys, and common defaults."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlinf_core.config.mistakes import value_at
from rlinf_core.config.toml import Table, leaves, merge
from rlinf_core.contract.tables.mixture import LOADER_KEYS

NOT_CHUNKED = (
    "is for a run of one dataset; mixtures support random order only: leave it out, and if seeking in the videos is "
    "slow, convert them with `rlinf cache`"
)


def wrong_shape(found: object, below: int) -> str:
    """Why a value of `data.mixture` is not a list of tables.

    Args:
        found: The value.
        below: Length of the list that an override like `data.mixture.0.weight=2` should have changed; 0: no list.
    """
    if below and isinstance(found, Mapping):
        numbers = f"are {below} entries, numbered 0 {'and' if below == 2 else 'to'} {below - 1}"
        entries = numbers if below > 1 else "is one entry, numbered 0"
        return f"an override names an entry by its number, data.mixture.0.weight=2: there {entries}"
    return "must be a list of tables, [[data.mixture]], each for one dataset"


def name_sources(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The name of each entry: its `name`, or its `config_name` without the distribution, numbered if taken."""
    taken = {str(entry["name"]) for entry in entries if entry.get("name")}
    names = []
    for entry in entries:
        name = str(entry.get("name") or "")
        if not name:
            stem = re.sub(r"[^A-Za-z0-9._-]", "-", str(entry.get("config_name") or "dataset").rpartition(":")[2])
            name = next(n for n in (stem, *(f"{stem}_{i}" for i in range(2, len(entries) + 2))) if n not in taken)
            taken.add(name)
        names.append(name)
    return names


def misplaced_keys(data: Mapping[str, Any]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Keys of `[data]` that belong in its entries, and the reverse: (key path in `[data]`, what is wrong)."""
    beside = ", ".join(LOADER_KEYS)
    for key in data.keys() - {"mixture", *LOADER_KEYS}:
        if key == "shuffle" and data[key] == "chunked":
            yield (key,), NOT_CHUNKED
        elif key == "config_name":
            yield (key,), "is for a run of one dataset, data.mixture for several: leave out one of them"
        else:
            yield (key,), f"belongs in the entries of data.mixture (only {beside} goes beside them)"
    for number, entry in enumerate(data["mixture"]):
        if entry.get("shuffle") == "chunked":
            yield ("mixture", number, "shuffle"), NOT_CHUNKED
        for key in LOADER_KEYS:
            if key in entry:
                yield ("mixture", number, key), f"applies to all sources: set data.{key}"


def common_defaults(defaults: Mapping[str, Mapping[str, Any]]) -> tuple[Table, dict[tuple[str, ...], str]]:
    """Split the `run_defaults` of several datasets into common and differing values.

    Args:
        defaults: Source -> its class's `run_defaults`.

    Returns:
        The table of common values, and for the others: key path -> the value of each source, in words.
    """
    common: Table = {}
    differing: dict[tuple[str, ...], str] = {}
    for place in dict.fromkeys(place for table in defaults.values() for place, _ in leaves(table)):
        values = {name: value_at(table, place) for name, table in defaults.items()}
        first = next(iter(values.values()))
        path = tuple(map(str, place))
        if all(value == first for value in values.values()):
            nested: Any = first
            for key in reversed(path):
                nested = {key: nested}
            common = merge(common, nested)
        else:
            said = (f"{name} sets none" if value is None else f"{name} {value!r}" for name, value in values.items())
            differing[path] = ", ".join(said)
    return common, differing
