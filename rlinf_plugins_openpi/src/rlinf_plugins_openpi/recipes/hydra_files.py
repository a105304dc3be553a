"""Read a recipe of RLinf: YAML that Hydra composes from several files and OmegaConf interpolates.

Hydra and OmegaConf do it themselves (the extra `rlinf`), since only they know their rules. Nothing that a recipe names
is imported or called: `_target_` is a key like any other, folders to search are local, and interpolations are those of
OmegaConf and of RLinf's four arithmetic resolvers.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlinf_core import UserError
from rlinf_core.untrusted.text import is_secret

INSTALL = (
    "reading RLinf's recipes needs Hydra: pip install 'rlinf-plugins-openpi[rlinf]' (or: uv pip install hydra-core)"
)
MOST_BYTES = 1 << 20
"""The largest YAML file that is read; RLinf's longest recipe has 6 kB."""
MOST_VALUES = 20_000
"""The most values of a YAML file; RLinf's longest recipe has 200."""
SCRIPTS = "EMBODIED_PATH"
"""The variable that RLinf's start script sets to its own folder, the one above the recipes'."""
_VARIABLE = re.compile(r"\$\{\s*oc\.env\s*:\s*([A-Za-z_]\w*)")

Keys = tuple[str, ...]
"""A key's path: `("actor", "optim", "lr")`."""


@dataclass(frozen=True)
class RecipeFile:
    """A recipe after composition and interpolation."""

    path: Path
    leaves: Mapping[Keys, Any]
    """Key path -> value that is no mapping: None, a boolean, a number, a text, or a list."""
    variables: tuple[str, ...]
    """Environment variables that it read, sorted."""


def read_recipe(path: Path, overrides: Sequence[str] = (), folders: Sequence[Path] = ()) -> RecipeFile:
    """Compose a recipe as RLinf's start script does.

    Args:
        path: The recipe, a `.yaml` file.
        overrides: Hydra's overrides: `actor.optim.lr=1e-5`, `+key=value`, `~key`.
        folders: Further folders with the files that its `defaults` name. Its own folder comes first, and those that
            its `hydra.searchpath` names last.

    Raises:
        UserError: Hydra is not installed; a file is missing, is not YAML or is no recipe; an override is wrong; or
            values are missing, refer to one another in a circle, or to what is not there. All of the latter at once.
    """
    try:
        import hydra  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(INSTALL) from error
    whole = _load(path)
    if not whole:
        raise UserError(f"{path} is empty: name a recipe of RLinf, such as examples/sft/config/libero_sft_openpi.yaml")
    with _scripts_folder(path):
        searched = (*folders, *_search_path(path, whole))
        for inherited in _inherited(whole, (path.parent, *searched)):
            _load(inherited)
        config = _compose(path, overrides, searched)
        return RecipeFile(path, _resolved(path, config), _variables(path, config))


def _load(path: Path) -> Mapping[str, Any]:
    """The file alone, with clear errors for all that is wrong with it."""
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if path.suffix != ".yaml":
        raise UserError(f"{path} is not a .yaml file, which Hydra needs: name a recipe of RLinf, or rename it")
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path} has more than {MOST_BYTES >> 20} MiB: it is no recipe")
        if _size(path) > MOST_VALUES:
            raise UserError(f"{path} has more than {MOST_VALUES} values, counting aliases: it is no recipe")
        loaded = OmegaConf.load(path)
        if not isinstance(loaded, DictConfig):
            raise UserError(f"{path} is no recipe: it holds a list or a text, not keys with values")
        raw: Any = OmegaConf.to_container(loaded, resolve=False)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (YAMLError, UnicodeError, OmegaConfBaseException, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {_one_line(error)}") from error
    return {str(key): value for key, value in raw.items()}


def _size(path: Path) -> int:
    """Values of a file once its aliases are written out, which a few lines can make billions."""
    from yaml import SafeLoader, compose
    from yaml.nodes import MappingNode, Node, SequenceNode

    sizes: dict[int, int] = {}

    def size(node: Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = MOST_VALUES  # Of a node within itself.
            if isinstance(node, MappingNode):
                inner = [part for pair in node.value for part in pair]
            else:
                inner = node.value if isinstance(node, SequenceNode) else []
            sizes[id(node)] = 1 + sum(map(size, inner))
        return sizes[id(node)]

    root = compose(path.read_text(encoding="utf-8-sig"), SafeLoader)
    return size(root) if root is not None else 0


def _inherited(whole: Mapping[str, Any], folders: Sequence[Path]) -> list[Path]:
    """The files that `defaults` name, and those that they name, where Hydra will find them."""
    found: list[Path] = []
    waiting: list[tuple[str, Mapping[str, Any]]] = [("", whole)]
    while waiting:
        group, table = waiting.pop()
        for name in _named(table.get("defaults")):
            for path in (folder / place / f"{name}.yaml" for folder in folders for place in {"", group}):
                if path.is_file() and path not in found:
                    found.append(path)
                    waiting.append((str(Path(group, name).parent), _load(path)))
    return found


def _named(defaults: Any) -> Iterator[str]:
    """The files of a list of defaults: `group/option@package`, or a mapping of group to option."""
    for entry in defaults if isinstance(defaults, list) else []:
        pairs = entry.items() if isinstance(entry, Mapping) else [("", entry)]
        for group, option in pairs:
            words = [*str(group).split()[-1:], str(option)]  # Before the group: `optional` or `override`.
            yield "/".join(word.partition("@")[0] for word in words).lstrip("/")


@contextmanager
def _scripts_folder(path: Path) -> Iterator[None]:
    """Set the variable of RLinf's start script, unless the user has set it."""
    if SCRIPTS in os.environ:
        yield
        return
    os.environ[SCRIPTS] = str(path.resolve().parent.parent)
    try:
        yield
    finally:
        del os.environ[SCRIPTS]


def _search_path(path: Path, whole: Mapping[str, Any]) -> list[Path]:
    """The folders of `hydra.searchpath` that are there; others hold nothing."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    settings = whole.get("hydra")
    named = settings.get("searchpath") if isinstance(settings, Mapping) else None
    if named is None:
        return []
    try:
        entries = OmegaConf.to_container(OmegaConf.create({"searchpath": named}), resolve=True)["searchpath"]  # type: ignore[index, call-overload]
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: hydra.searchpath: {_one_line(error)}") from error
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise UserError(f"{path}: hydra.searchpath must be a list of folders")
    if others := [entry for entry in entries if not entry.startswith("file://")]:
        raise UserError(
            f"{path}: hydra.searchpath names {', '.join(others)}: only folders, file://..., are searched, no packages; "
            "name the folder with --config-path"
        )
    return [folder for entry in entries if (folder := Path(entry.removeprefix("file://"))).is_dir()]


def _compose(path: Path, overrides: Sequence[str], folders: Sequence[Path]) -> Any:
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    _register_resolvers()
    searched = ",".join(_quoted(f"file://{folder.resolve()}") for folder in folders)
    settings = [f"hydra.searchpath=[{searched}]"] if searched else []
    try:
        with warnings.catch_warnings():
            # Hydra explains its own migrations; RLinf runs it with the rules of version 1.1.
            warnings.simplefilter("ignore")
            with initialize_config_dir(version_base="1.1", config_dir=str(path.resolve().parent)):
                return compose(path.stem, overrides=[*settings, *overrides])
    except RecursionError as error:
        raise UserError(f"{path}: its defaults include one another in a circle") from error
    except (HydraException, OmegaConfBaseException, YAMLError, UnicodeError, OSError) as error:
        hint = ""
        if "Could not find" in str(error) or "Could not load" in str(error):
            hint = (
                ". The files that `defaults` names are beside the recipe in RLinf's repository: import it from there, "
                "or name that folder with --config-path .../examples/sft/config"
            )
        raise UserError(f"{path} cannot be composed: {_one_line(error)}{hint}") from error


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _register_resolvers() -> None:
    """RLinf's own, by their meaning: plain arithmetic, and a name of a dtype, which stays a name."""
    from omegaconf import OmegaConf

    own: dict[str, Callable[..., Any]] = {
        "multiply": lambda x, y: x * y,
        "int_div": lambda x, y: x // y,
        "subtract": lambda x, y: x - y,
        "not": lambda x: not bool(x),
        "torch.dtype": lambda name: name,
    }
    for name, resolver in own.items():
        if not OmegaConf.has_resolver(name):
            OmegaConf.register_new_resolver(name, resolver)


def _resolved(path: Path, config: Any) -> dict[Keys, Any]:
    """All leaves; every one that cannot be resolved is named."""
    problems: list[str] = []
    found = dict(_leaves(config, (), problems))
    if problems:
        raise UserError(f"{path} has values that cannot be resolved:\n" + "\n".join(f"  {one}" for one in problems))
    return found


def _leaves(config: Any, above: Keys, problems: list[str]) -> Iterator[tuple[Keys, Any]]:
    from omegaconf import DictConfig, ListConfig, OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    for key in config:
        place = (*above, str(key))
        try:
            value = config[key]
            if isinstance(value, ListConfig):
                value = OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
        except MissingMandatoryValue:
            problems.append(f"{'.'.join(place)} is ???: give it as {'.'.join(place)}=... behind the recipe")
            continue
        except (OmegaConfBaseException, ArithmeticError, TypeError, ValueError, RecursionError) as error:
            problems.append(f"{'.'.join(place)}: {_explained(error)}")
            continue
        if isinstance(value, DictConfig) and len(value):
            yield from _leaves(value, place, problems)
        else:
            yield place, None if isinstance(value, DictConfig) else value


def _explained(error: Exception) -> str:
    """OmegaConf's first line, and a way out."""
    text = _one_line(error)
    if unset := re.search(r"Environment variable '(\w+)' not found", text):
        return f"the environment variable {unset[1]} is not set: set it, or give the key behind the recipe"
    if unknown := re.search(r"Unsupported interpolation type (\S+)", text):
        return f"there is no interpolation ${{{unknown[1]}:...}} in RLinf or OmegaConf: write the value itself"
    if text.startswith("Recursive interpolation"):
        return "its interpolation refers to itself in a circle: write the value"
    return text


def _one_line(error: Exception) -> str:
    """The first lines of a message of Hydra, OmegaConf or PyYAML, without their debugging details."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith(("full_key:", "object_type=", "reference_type=", "set "))]
    text = re.sub(r"provider=\w+, path=(?:(?:pkg|structured)://\S*\s?|file://)", "", " ".join(kept[:6]))
    return text.strip() or type(error).__name__


def _variables(path: Path, config: Any) -> tuple[str, ...]:
    """The environment variables in interpolations; those of secrets must not end up in a config."""
    from omegaconf import OmegaConf

    names = {*_VARIABLE.findall(OmegaConf.to_yaml(config, resolve=False))} - {SCRIPTS}
    if secret := sorted(name for name in names if is_secret(name, os.environ.get(name, ""))):
        raise UserError(
            f"{path} reads {', '.join(secret)} from the environment, by its name a secret, which would be written to "
            "the config: leave the key out (~key behind the recipe)"
        )
    return tuple(sorted(names))
