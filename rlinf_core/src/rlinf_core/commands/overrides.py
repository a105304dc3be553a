"""What may be typed as `key=value` after a run's config: keys of its tables, values that are names, and files.

The keys depend on the classes that the config chooses, and importing these takes half a second, which is long for the
tab key. So they are kept in the cache folder under a digest of the config and of what is installed, together with the
times of the source files that are not installed packages; a later press reads one small file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rlinf_core.plugins.registrations import RegistrationKind

VERSION = 2
"""Version of the cached files; those of another version are not read."""
DESCRIPTION = 80
"""Maximum length of a key's description in characters."""

NAMES: Mapping[str, RegistrationKind] = {
    "policy.type": "policy",
    "trainer.type": "trainer",
    "optim.type": "optimizer",
    "optim.schedule": "schedule",
}
"""Keys whose value is the name of something that a plugin registered, and its kind."""


class Key(NamedTuple):
    """What completion knows of a key."""

    description: str
    """The first sentence about it."""
    values: list[str]
    """Every value, if these are names; otherwise empty."""
    is_text: bool
    """Whether a value may be a path."""


def complete_override(prefix: str, config: str, earlier: Sequence[str]) -> Mapping[str, str]:
    """Completions of a `key=value`, with descriptions.

    Args:
        prefix: What has been typed of it.
        config: The run's TOML file; nothing is offered if it cannot be read.
        earlier: The `key=value`s before it, which may choose other classes.
    """
    keys = _keys(config, [one for one in earlier if "=" in one])
    name, equals, value = prefix.partition("=")
    if not equals:
        return {f"{key}=": one.description for key, one in keys.items() if key.startswith(prefix)}
    key = keys.get(name, Key("", [], is_text=False))
    values = key.values or (list(complete_path(value)) if key.is_text else [])
    return {f"{name}={one}": "" for one in values if one.startswith(value)}


def complete_path(prefix: str, suffix: str = "") -> Iterator[str]:
    """Files and folders that begin like this; a folder ends in `/`.

    Args:
        prefix: What has been typed; hidden files are found if the name's dot has been.
        suffix: Leave out files with another ending.
    """
    above, name = os.path.split(prefix)
    with contextlib.suppress(OSError), os.scandir(os.path.expanduser(above) or ".") as found:
        for entry in found:
            if not entry.name.startswith(name or "") or (entry.name.startswith(".") and not name):
                continue
            if entry.is_dir():
                yield os.path.join(above, entry.name) + "/"
            elif entry.name.endswith(suffix):
                yield os.path.join(above, entry.name)


def _keys(config: str, earlier: Sequence[str]) -> dict[str, Key]:
    from rlinf_core.errors import UserError

    try:
        path = _cache_file(Path(config).read_bytes(), earlier)
    except (OSError, UserError):
        return {}
    if (known := _read(path)) is not None:
        return known
    try:
        keys = _find_keys(config, earlier)
    except UserError:
        return {}
    _write(path, keys)
    return keys


def _find_keys(config: str, earlier: Sequence[str]) -> dict[str, Key]:
    from rlinf_core.config.load import find_tables
    from rlinf_core.plugins.registry import get_plugins

    plugins = get_plugins()
    names = {"data.config_name": [one.name for one in plugins.datasets()]}
    names |= {key: [one.name for one in plugins.registered_as(kind)] for key, kind in NAMES.items()}
    tables = find_tables(config, earlier, plugins)
    found: dict[str, Key] = {}
    for place, fields in sorted(tables.items(), key=lambda item: tuple(map(str, item[0]))):
        found |= dict(_described(".".join(map(str, place)), fields, outer={str(name[0]) for name in tables if name}))
    for key in found.keys() & names.keys():
        found[key] = Key(found[key].description or f"Name of a registered {NAMES[key]}", names[key], is_text=True)
    return found


def _described(table: str, fields: Mapping[str, Any], outer: set[str]) -> Iterator[tuple[str, Key]]:
    """The keys of a table and of the tables in it; `outer` are tables that come separately."""
    from rlinf_core.config.mistakes import is_model

    for name, field in fields.items():
        if not table and name in outer:
            continue
        key = f"{table}.{name}" if table else name
        if is_model(field.annotation):
            yield from _described(key, field.annotation.model_fields, set())
            continue
        sentence = " ".join((field.description or "").split()).partition(". ")[0].partition("; ")[0].rstrip(".")
        short = sentence if len(sentence) <= DESCRIPTION else sentence[: DESCRIPTION - 3] + "..."
        yield key, Key(short, list(_names(field.annotation)), is_text=_is_text(field.annotation))


def _names(annotation: Any) -> Iterator[str]:
    """The values of a type that has few of them: literals and booleans, which may also be left unset."""
    if annotation is bool or bool in typing.get_args(annotation):
        yield from ("true", "false")
    elif typing.get_origin(annotation) is typing.Literal:
        yield from (str(one) for one in typing.get_args(annotation) if one != "")


def _is_text(annotation: Any) -> bool:
    return annotation is str or str in typing.get_args(annotation)


def _cache_file(config: bytes, earlier: Sequence[str]) -> Path:
    """The file of a config and of what is installed: installing and removing change a folder of packages."""
    from rlinf_core.cache import cache_folder

    digest = hashlib.blake2b(config, digest_size=16)
    packages = [(folder, _changed(folder)) for folder in sys.path if os.path.isdir(folder)]
    disabled = os.environ.get("RLINF_DISABLE_PLUGINS", "")
    digest.update(json.dumps([list(earlier), packages, disabled, sys.version]).encode())
    return cache_folder() / "completion" / f"{digest.hexdigest()}.json"


def _read(path: Path) -> dict[str, Key] | None:
    """The keys in a file; None if it does not exist, is damaged or of older source files."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["version"] != VERSION or any(_changed(file) != time for file, time in known["sources"].items()):
            return None
        return {key: Key(*one) for key, one in known["keys"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _write(path: Path, keys: Mapping[str, Key]) -> None:
    """Write the keys for the next time; without room or permission there is none."""
    from rlinf_core.cache import replacing

    files = (getattr(module, "__file__", None) for module in tuple(sys.modules.values()))
    own = [file for file in files if file and not {"site-packages", "dist-packages"} & {*Path(file).parts}]
    standard = os.path.dirname(os.__file__)
    sources = {file: _changed(file) for file in own if not file.startswith(standard + os.sep)}
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as aside:
            aside.write_text(json.dumps({"version": VERSION, "sources": sources, "keys": keys}), encoding="utf-8")


def _changed(path: str) -> int:
    """When a file or folder changed, in nanoseconds; 0: it does not exist."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0
