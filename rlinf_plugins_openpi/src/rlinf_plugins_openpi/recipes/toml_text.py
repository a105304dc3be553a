"""A config as TOML, with comments: what was imported, what differs, and which keys have no counterpart."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import tomli_w

from rlinf_core.untrusted.text import without_controls

COLUMNS = 118


def comment(text: str, *, bullet: bool = False) -> Iterator[str]:
    """Lines of a comment; controls and line breaks of the text cannot end it."""
    first, rest = ("# - ", "#   ") if bullet else ("# ", "# ")
    # Long words, such as paths, stay whole.
    yield from textwrap.wrap(
        without_controls(" ".join(text.split())),
        width=COLUMNS,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    ) or ["#"]


def toml_tables(tables: Mapping[str, Any]) -> Iterator[str]:
    """Lines of TOML: a table for each table of the config, values and small tables on one line each."""
    for key, value in tables.items():
        if not isinstance(value, Mapping):
            yield f"{_key(key)} = {_value(value)}"
    for key, value in tables.items():
        if isinstance(value, Mapping):
            yield from _table(_key(key), value)


def _table(name: str, table: Mapping[str, Any]) -> Iterator[str]:
    inner = {key: value for key, value in table.items() if _is_table(value)}
    if len(inner) < len(table) or not table:
        yield ""
        yield f"[{name}]"
        yield from (f"{_key(key)} = {_value(value)}" for key, value in table.items() if key not in inner)
    for key, value in inner.items():
        if isinstance(value, Mapping):
            yield from _table(f"{name}.{_key(key)}", value)
        else:
            for entry in value:
                yield ""
                yield f"[[{name}.{_key(key)}]]"
                yield from (f"{_key(one)} = {_value(given)}" for one, given in entry.items())


def _is_table(value: Any) -> bool:
    """Whether a value gets lines of its own: a table of several keys, or a list of tables."""
    if isinstance(value, Mapping):
        return len(value) > 1
    return isinstance(value, list) and bool(value) and all(isinstance(entry, Mapping) for entry in value)


def _key(key: str) -> str:
    return tomli_w.dumps({key: 0}).removesuffix(" = 0\n")


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(key)} = {_value(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    return tomli_w.dumps({"x": value}).removeprefix("x = ").rstrip("\n")
