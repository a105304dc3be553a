"""Messages about mistakes in a config: the key, the mistake, where it was written, and what was probably meant."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from rlinf_core.config.aliases import hint
from rlinf_core.config.toml import dotted, is_list_of_tables, read_toml
from rlinf_core.errors import did_you_mean
from rlinf_core.plugins.owners import Owner

KeyPath = tuple[str | int, ...]
"""Keys and list indices from the root of the config: `("data", "mixture", 0, "weight")`."""
Tables = dict[KeyPath, dict[str, FieldInfo]]
"""The fields of each table by its key path; those of the root are under `()`."""

COMMAND_LINE = "command line"
_ABSENT = object()


@dataclass(frozen=True)
class Layer:
    """A layer of the config and where it was written: a file, the command line, or a class's defaults."""

    origin: str
    table: Mapping[str, Any]
    typed: Mapping[tuple[str, ...], str] = field(default_factory=dict)
    """Key path -> its value as it was typed, where that is known."""

    def reaches(self, place: KeyPath) -> bool:
        """Whether this layer sets a key path, a part of it, or a table that contains it."""
        found: Any = self.table
        for part in place:
            if not isinstance(found, Mapping) and not is_list_of_tables(found):
                return True
            if (found := _inside(found, part)) is _ABSENT:
                return False
        return True


def value_at(table: Mapping[str, Any], place: KeyPath) -> Any:
    """The value at a key path of a table; None if it is not set."""
    found: Any = table
    for part in place:
        if (found := _inside(found, part)) is _ABSENT:
            return None
    return found


def _inside(found: object, part: str | int) -> Any:
    """An item of a table or list. Overrides give the index of a list as a string: `data.mixture.0.weight=2`."""
    if isinstance(found, list):
        return found[part] if isinstance(part, int) and part < len(found) else _ABSENT
    if isinstance(found, Mapping):
        return found.get(part, found.get(str(part), _ABSENT))
    return _ABSENT


def mistake(
    place: KeyPath, what: str, layers: Sequence[Layer], value: Any = None, *, owner: Owner | None = None
) -> str:
    """One line (or more, if `what` has more): `optim.lr: must be larger than 0 [run.toml]`.

    Args:
        place: Key path of the mistake.
        what: What is wrong.
        layers: The layers of the config, lowest first.
        value: The value at `place`; a table may come from several layers.
        owner: The plugin that defines the table, for a plugin's own table: `[run.toml; table of acme-arm 1.2]`.
    """
    sources = [", ".join(_origins(place, layers, value))]
    sources += [f"table of {owner.distribution} {owner.version}"] if owner else []
    bracket = "; ".join(filter(None, sources))
    head, line_end, rest = what.partition("\n")
    text = f"{dotted(place)}: {head}" if place else head
    return (f"{text} [{bracket}]" if bracket else text) + line_end + rest


def _origins(place: KeyPath, layers: Sequence[Layer], value: Any) -> list[str]:
    """The origins of a value: the highest layer that sets it, or for a table every layer that contributes."""
    origins = [layer.origin for layer in layers if place and layer.reaches(place)]
    return origins if isinstance(value, Mapping) else origins[-1:]


def explain(error: ErrorDetails, layers: Sequence[Layer], tables: Tables, owner: Owner | None = None) -> str:
    """A pydantic error as one line for users; `owner` as in `mistake`."""
    place, given = error["loc"], error["input"]
    match error["type"]:
        case "extra_forbidden":
            what = f"unknown key{_near(place, given, tables)}"
        case "missing":
            return mistake(place, "is required", layers, owner=owner)
        case "registered_class":  # `contract.registered.REGISTERED_CLASS`; its owner is that class's.
            return mistake(place, error["msg"], layers, given, owner=error["ctx"]["owner"])
        case _:
            what = _in_words_of_toml(error["msg"].removeprefix("Value error, "))
            typed = _as_typed(place, given, layers)
            if not isinstance(given, Mapping | BaseModel):
                what += f" (got {_short(given) if typed is None else typed})"
                what += _meaning_of_zero(error, tables)
                what += _as_list(error, tables)
            else:
                what += _who_set(place, what, layers, tables)
            is_key = bool(place) and isinstance(place[-1], str)
            if error["type"] == "string_type" and is_key and typed is not None:
                if _origins(place, layers, given) == [COMMAND_LINE]:
                    what += f"""; for text that looks like TOML write {dotted(place)}='"{typed}"'"""
                else:
                    what += f'; text needs quotes: {place[-1]} = "{typed}"'
    return mistake(place, what, layers, given, owner=owner)


def _as_typed(place: KeyPath, given: object, layers: Sequence[Layer]) -> str | None:
    """A number, a truth value or a date as it was typed (`1e5`, `2026_07_01`); None if that is not known."""
    if isinstance(given, str | list | Mapping | BaseModel):
        return None
    names = tuple(map(str, place))
    layer = next((one for one in reversed(layers) if one.reaches(place)), None)
    typed = layer.typed.get(names) if layer else None
    try:  # Never quote something else, whatever the file looks like.
        return typed if typed and read_toml(f"value = {typed}")["value"] == given else None
    except ValueError:
        return None


def is_model(annotation: object) -> TypeGuard[type[BaseModel]]:
    """Whether a field's annotation is a table's class."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _in_words_of_toml(message: str) -> str:
    """Pydantic names Python's types; a config has lists."""
    return message.replace("valid tuple", "valid list").replace("Tuple should", "List should")


def _meaning_of_zero(error: ErrorDetails, tables: Tables) -> str:
    """What 0 means for a key that got -1, the word for "no limit" elsewhere: the key's own description says it."""
    if error["type"] != "greater_than_equal" or error["input"] != -1 or error.get("ctx", {}).get("ge") != 0:
        return ""
    *table, key = error["loc"]
    field = tables.get(tuple(table), {}).get(str(key))
    meaning = re.search(r"\b0: ([^.;]+)", (field and field.description) or "")
    return f"; 0 means {' '.join(meaning[1].split())}" if meaning else ""


def _as_list(error: ErrorDetails, tables: Tables) -> str:
    """How to write one value for a key that takes a list of any length."""
    *table, key = error["loc"]
    field = tables.get(tuple(table), {}).get(str(key))
    any_length = field is not None and (get_origin(field.annotation) is list or ... in get_args(field.annotation))
    if error["type"] not in ("tuple_type", "list_type") or not any_length or not isinstance(error["input"], str | int):
        return ""
    return f"; a list of one is [{json.dumps(error['input'])}]"


def _who_set(place: KeyPath, message: str, layers: Sequence[Layer], tables: Tables) -> str:
    """Where the keys that a message about a whole table names were set, if in different layers."""
    named = [key for key in tables.get(place, {}) if re.search(rf"(?<![\w.]){re.escape(key)}\b", message)]
    origins = {key: (_origins((*place, key), layers, None) or ["its default"])[0] for key in named}
    if len(set(origins.values())) < 2:
        return ""
    return f" ({', '.join(f'{key} is from {origin}' for key, origin in origins.items())})"


UNSPECIFIC = frozenset({"type", "name"})
"""Keys of so many tables that one in the wrong table says nothing of the right one."""


def _near(place: KeyPath, given: object, tables: Tables) -> str:
    """A suggestion for an unknown key, or nothing.

    In this order: the same key in another table, if only the `[table]` line is wrong; the word of another project; a
    misspelt key of the own table; at the root, a misspelt key of any table, if the `[table]` line is missing.
    """
    *above, last = place
    key = str(last)
    table = max((known for known in tables if known == tuple(above[: len(known)])), key=len)
    fields = tables[table]
    for part in above[len(table) :]:
        field = fields.get(str(part))
        fields = field.annotation.model_fields if field and is_model(field.annotation) else {}
    others = [(name, dotted((*place, name))) for place, other in tables.items() if place for name in other]
    if key not in UNSPECIFIC and (same := sorted({path for name, path in others if name == key})):
        return f"; did you mean {' or '.join(map(repr, same))}?"
    if said := hint(key, {path for _, path in others}, is_table=isinstance(given, Mapping)):
        return said
    if own := did_you_mean(key, fields):
        return own
    near = [] if above else difflib.get_close_matches(key, [name for name, _ in others], n=1, cutoff=0.8)
    return f"; did you mean {dict(others)[near[0]]!r}?" if near else ""
