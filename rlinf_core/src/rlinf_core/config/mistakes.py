"""Say what is wrong with a config: the place, the mistake, where it was written, and what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from rlinf_core.config.toml import dotted, is_list_of_tables
from rlinf_core.errors import did_you_mean
from rlinf_core.plugins.owners import Owner

Place = tuple[str | int, ...]
Tables = dict[Place, dict[str, FieldInfo]]
"""The fields of each table by its place; those of the whole config are under `()`."""

COMMAND_LINE = "command line"
_ABSENT = object()


@dataclass(frozen=True)
class Layer:
    """A table of the config and where it was written: a file, the command line, somebody's defaults."""

    origin: str
    table: Mapping[str, Any]

    def reaches(self, place: Place) -> bool:
        """Whether this layer says something about a place: sets it, a part of it, or the whole that it is a part of."""
        found: Any = self.table
        for part in place:
            if not isinstance(found, Mapping) and not is_list_of_tables(found):
                return True
            if (found := _inside(found, part)) is _ABSENT:
                return False
        return True


def value_at(table: Mapping[str, Any], place: Place) -> Any:
    """The value at a place of a table; None if there is none."""
    found: Any = table
    for part in place:
        if (found := _inside(found, part)) is _ABSENT:
            return None
    return found


def _inside(found: object, part: str | int) -> Any:
    """What a table or list holds; an override names an entry of a list by its number: `data.mixture.0.weight=2`."""
    if isinstance(found, list):
        return found[part] if isinstance(part, int) and part < len(found) else _ABSENT
    if isinstance(found, Mapping):
        return found.get(part, found.get(str(part), _ABSENT))
    return _ABSENT


def mistake(place: Place, what: str, layers: Sequence[Layer], value: Any = None, *, owner: Owner | None = None) -> str:
    """One line (or more, if `what` has more): `optim.lr: must be larger than 0 [run.toml]`.

    Args:
        place: Where in the config.
        what: What is wrong.
        layers: Who wrote the config, lowest first.
        value: What stands there; a table may be the work of several layers.
        owner: Who says what may stand there, if it is a plugin's own table: `[run.toml; table of acme-arm 1.2]`.
    """
    sources = [", ".join(_origins(place, layers, value))]
    sources += [f"table of {owner.distribution} {owner.version}"] if owner else []
    bracket = "; ".join(filter(None, sources))
    head, line_end, rest = what.partition("\n")
    text = f"{dotted(place)}: {head}" if place else head
    return (f"{text} [{bracket}]" if bracket else text) + line_end + rest


def _origins(place: Place, layers: Sequence[Layer], value: Any) -> list[str]:
    """A single value was written by the highest layer that has it; a table may be the work of several."""
    origins = [layer.origin for layer in layers if place and layer.reaches(place)]
    return origins if isinstance(value, Mapping) else origins[-1:]


def explain(error: ErrorDetails, layers: Sequence[Layer], tables: Tables, owner: Owner | None = None) -> str:
    """A pydantic error as a line for people; `owner` as in `mistake`."""
    place, given = error["loc"], error["input"]
    match error["type"]:
        case "extra_forbidden":
            what = f"unknown key{_near(place, tables)}"
        case "missing":
            return mistake(place, "is required", layers, owner=owner)
        case _:
            what = error["msg"].removeprefix("Value error, ")
            if not isinstance(given, Mapping | BaseModel):
                what += f" (got {_short(given)})"
            is_key = bool(place) and isinstance(place[-1], str)
            if error["type"] == "string_type" and is_key and _origins(place, layers, given) == [COMMAND_LINE]:
                what += f"""; for text that looks like TOML write {dotted(place)}='"{given}"'"""
    return mistake(place, what, layers, given, owner=owner)


def is_model(annotation: object) -> TypeGuard[type[BaseModel]]:
    """Whether a field's annotation is a table's class."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _near(place: Place, tables: Tables) -> str:
    """Names that a misspelt key may have meant in its own table, else in another (a `[table]` line is missing)."""
    *above, last = place
    key = str(last)
    table = max((known for known in tables if known == tuple(above[: len(known)])), key=len)
    fields = tables[table]
    for part in above[len(table) :]:
        field = fields.get(str(part))
        fields = field.annotation.model_fields if field and is_model(field.annotation) else {}
    own = did_you_mean(key, fields)
    others = {name: dotted((*place, name)) for place, other in tables.items() if place for name in other}
    near = difflib.get_close_matches(key, others, n=1, cutoff=0.8)
    return own or (f"; did you mean {others[near[0]]!r}?" if near else "")
