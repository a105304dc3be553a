"""What must not become public: secrets, and paths of this machine, which name people."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from rlinf_core.untrusted.text import is_secret, parse_json, without_controls, without_secrets

_ABSOLUTE = re.compile(r"(?<![\w/.:~…])(?:~|/(?:[\w.@+-]+/)+)[\w.@+-]*(?:/[\w.@+-]+)*")
"""A path from the root, of at least two parts, or from a home folder."""
_ASSIGNED = re.compile(r"""^\s*(?:export\s+)?["']?([\w-]+)["']?\s*[:=]\s*["']?([^"'\s,]+)""")
"""`key = value` in TOML, YAML, shells and JSON."""


def private(text: str) -> str:
    """Text without secrets, control characters, and paths of this machine, of which the last part stays."""
    text = without_controls(without_secrets(text))
    return _ABSOLUTE.sub(lambda found: "…/" + found[0].rstrip("/").rpartition("/")[2], text)


def paths_in(text: str) -> list[str]:
    """Paths of a machine in a text, each once."""
    return list(dict.fromkeys(found[0] for found in _ABSOLUTE.finditer(text) if len(found[0]) > 1))


def secrets_in(text: str) -> Iterator[str]:
    """Where a text has a secret, without repeating it: a line, or a key of a JSON document.

    In JSON only texts count: vocabularies of tokenizers have keys such as `password`, with numbers.
    """
    lines = text.split("\n")
    if without_secrets(text) != text:
        yield from (f"line {number}" for number, line in enumerate(lines, 1) if without_secrets(line) != line)
    try:
        yield from _secret_keys(parse_json(text))
    except ValueError:
        for number, line in enumerate(lines, 1):
            if (found := _ASSIGNED.match(line)) and is_secret(found[1], found[2]):
                yield f"line {number}"


def _secret_keys(value: Any, key: str = "") -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, one in value.items():
            yield from _secret_keys(one, str(name))
    elif isinstance(value, list):
        for one in value:
            yield from _secret_keys(one, key)
    elif isinstance(value, str) and is_secret(key, value):
        yield f"the key {key!r}"
