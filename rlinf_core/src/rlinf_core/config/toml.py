"""Config as text and as tables: reading TOML, `key=value` overrides, merging, writing, comparing.

A *table* is a document as `tomllib` parses it: nested dicts with string keys. Nothing here knows what the keys mean.
"""

from __future__ import annotations

import datetime
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from rlinf_core.errors import UserError

Table = dict[str, Any]
_YAML_LINE = re.compile(r"(- )?[\w.-]+:(\s|$)")
"""The first line of a YAML document that TOML does not know: `optim:`, `lr: 1e-4` or `- name: x`."""
DEEPEST = 50
"""Maximum nesting of tables and lists; Python's recursion allows a few hundred, and no config needs ten."""


def read_toml(source: Path | str) -> Table:
    """Read a TOML document: a `Path` is a file, a `str` is the document itself.

    Raises:
        UserError: If the file cannot be read or is not TOML; the message names file, line and column.
    """
    if isinstance(source, str):
        return _loads(source)
    try:
        text = source.read_text(encoding="utf-8-sig")  # Editors on Windows put a byte order mark first.
        return _loads(text)
    except IsADirectoryError as error:
        inside = source / "config.toml"
        raise UserError(
            f"{source}: cannot be read: it is a folder; name the TOML file in it" + f", as {inside}" * inside.is_file()
        ) from error
    except FileNotFoundError as error:
        raise UserError(f"{source}: no such file (relative to {Path.cwd()})") from error
    except OSError as error:
        raise UserError(f"{source}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not TOML, which is UTF-8 text: {error}") from error
    except tomllib.TOMLDecodeError as error:
        if _looks_like_yaml(text):
            raise UserError(
                f"{source}: it is YAML, and a config is TOML: `[optim]` for `optim:`, `lr = 1e-4` for `lr: 1e-4`, and "
                'quotes around text (`name = "first"`); README has a whole one'
            ) from error
        raise UserError(f"{source}: not valid TOML: {error}") from error


def _looks_like_yaml(text: str) -> bool:
    """Whether the first line with content is YAML's, not TOML's."""
    lines = (line.strip() for line in text.splitlines())
    first = next((line for line in lines if line and not line.startswith(("#", "%")) and line != "---"), "")
    return bool(_YAML_LINE.match(first)) or text.lstrip().startswith("---")


def _loads(text: str) -> Table:
    """Parse a document, unless it is nested more deeply than any config."""
    too_deep = tomllib.TOMLDecodeError(f"it is nested more than {DEEPEST} levels deep")
    try:
        table = tomllib.loads(text)
    except RecursionError as error:
        raise too_deep from error
    level: list[Any] = [table]
    for _ in range(DEEPEST):
        inner = (one.values() if isinstance(one, dict) else one for one in level)
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
        if not level:
            return table
    raise too_deep


_TABLE = re.compile(r"\s*\[([\w.-]+)\]\s*(#.*)?")
_SCALAR = re.compile(r"\s*([\w.-]+)\s*=\s*([\w.+:-]+)\s*(#.*)?")


def typed_values(path: Path) -> dict[tuple[str, ...], str]:
    """Numbers, truth values and dates of a TOML file as they are typed there, by key path; for messages.

    Only plain lines, `key = value` below `[table]`: a value that is not found is quoted as it was understood.
    """
    found: dict[tuple[str, ...], str] = {}
    above: tuple[str, ...] | None = ()
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        if match := _TABLE.fullmatch(line):
            above = tuple(match[1].split("."))
        elif line.lstrip().startswith("["):
            above = None  # A list of tables, or a table with quotes in its name.
        elif above is not None and (match := _SCALAR.fullmatch(line)):
            found[*above, *match[1].split(".")] = match[2]
    return found


def parse_override(text: str) -> Table:
    """Turn `section.key=value` into a table.

    The value is parsed as TOML (`1e-4`, `true`, `["a", "b"]`); anything else is taken as a string, so that names and
    paths need no quotes. Dates are strings too: no config key is a date, but runs are often named after one.

    Raises:
        UserError: If there is no `=`, the key is not a dotted key, or the value is an unfinished list, table or string.
    """
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals:
        raise UserError(f"{text!r} is not an override: write section.key=value")
    try:
        table = _loads(f"{key} = 0")
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{text!r} is not an override: {key!r} is not a dotted key, as in section.key=value") from error
    try:
        parsed = _parse_value(value)
    except ValueError as error:
        raise UserError(f"{text!r}: the value is not TOML ({error}); does the shell need quotes around it?") from error
    return _with_leaf(table, parsed)


def _parse_value(text: str) -> Any:
    try:
        document = _loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        if text.startswith(("[", "{", '"', "'")):
            raise
        return text
    if isinstance(document["value"], datetime.date | datetime.time) or len(document) > 1:
        return text
    return document["value"]


def _with_leaf(table: Table, leaf: Any) -> Table:
    """Replace the one value at the bottom of a chain of one-key tables."""
    return {key: _with_leaf(value, leaf) if isinstance(value, dict) else leaf for key, value in table.items()}


def merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> Table:
    """Override one table with another: tables merge key by key, any other value replaces the lower one.

    A table whose keys are numbers changes entries of a list of tables: `{"0": {"weight": 2}}` changes the first.
    """
    merged = dict(low)
    for key, value in high.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and below and is_list_of_tables(below) and _are_numbers(value, len(below)):
            merged[key] = [merge(entry, value.get(str(number), {})) for number, entry in enumerate(below)]
        elif isinstance(value, Mapping):
            merged[key] = merge(below if isinstance(below, Mapping) else {}, value)
        else:
            merged[key] = value
    return merged


def _are_numbers(table: Mapping[str, Any], below: int) -> bool:
    return all(isinstance(value, Mapping) for value in table.values()) and table.keys() <= {*map(str, range(below))}


def write_toml(table: Table) -> str:
    """TOML text of a table. Raises `TypeError` for values that TOML cannot represent, such as None."""
    # Imported here, because listing, validating and every rank but the first never write.
    import tomli_w

    return tomli_w.dumps(table)


def diff_tables(old: Table, new: Table) -> list[tuple[str, Any, Any]]:
    """The leaves that differ, as (dotted key, old, new); None for a missing key."""
    before, after = dict(leaves(old)), dict(leaves(new))
    keys = [*before, *(key for key in after if key not in before)]
    return [(dotted(key), before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]


def leaves(
    table: Mapping[str, Any] | list[Table], above: tuple[str | int, ...] = ()
) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Every value that is not a table, with its key path."""
    for key, value in table.items() if isinstance(table, Mapping) else enumerate(table):
        if value and (isinstance(value, dict) or is_list_of_tables(value)):
            yield from leaves(value, (*above, key))
        else:
            yield (*above, key), value


def is_list_of_tables(value: object) -> TypeGuard[list[Table]]:
    """Whether a value is a list of tables, written `[[...]]` in TOML."""
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def dotted(path: tuple[str | int, ...]) -> str:
    """A key path as text: `("data", "images", "my.cam")` -> `data.images."my.cam"`, `("betas", 0)` -> `betas[0]`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            bare = part.replace("_", "").replace("-", "").isalnum() and part.isascii()
            text += ("." if text else "") + (part if bare else f'"{part}"')
    return text
