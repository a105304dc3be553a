"""Find plugins, load them, and explain those that fail.

Plugins are found by entry point alone. The group `rlinf.plugins` names modules with hook implementations, which are
loaded together when a hook or a registered class is first needed. The group `rlinf.datasets` names one config class
each, which is loaded alone when it is used: listing two hundred datasets imports none of them.

A plugin that fails costs itself and nobody else. The failure is kept with its owner and cause, and repeated where
something that this plugin might have brought is missing.
"""

from __future__ import annotations

import functools
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal, get_args, get_origin

import pluggy
from pydantic import BaseModel

from rlinf_core import hookspecs
from rlinf_core.datasets import DatasetConfig
from rlinf_core.errors import PluginError, UserError, did_you_mean
from rlinf_core.logger import LoggerConfig
from rlinf_core.policy import PolicyConfig
from rlinf_core.trainer import TrainerConfig

PLUGIN_GROUP = "rlinf.plugins"
DATASET_GROUP = "rlinf.datasets"

Kind = Literal["policy", "trainer", "logger"]
_KINDS: Mapping[Kind, tuple[str, type[BaseModel]]] = {
    "policy": ("rlinf_register_policies", PolicyConfig),
    "trainer": ("rlinf_register_trainers", TrainerConfig),
    "logger": ("rlinf_register_loggers", LoggerConfig),
}
"""What plugins register: the hook that asks for it, and what the answers derive from."""


@dataclass(frozen=True, order=True)
class Owner:
    """Who brought something: a distribution, by one of its entry points."""

    distribution: str
    version: str
    entry_point: str
    """As its `pyproject.toml` says it: `name = module:attribute`."""

    def __str__(self) -> str:
        return f"{self.distribution} {self.version} (entry point '{self.entry_point}')"


@dataclass(frozen=True)
class Failure:
    """A plugin, or a part of one, that could not be used."""

    owner: Owner
    doing: str
    """What was tried: loading the plugin, or calling one of its registration hooks."""
    cause: Exception

    def __str__(self) -> str:
        return f"{self.owner}: {self.doing}: {_explain(self.cause)}"


@dataclass(frozen=True)
class Registered:
    """A config class under the `type` that selects it."""

    kind: Kind
    name: str
    config: type[Any]
    owner: Owner


@dataclass(frozen=True)
class DatasetEntry:
    """A dataset format as its distribution's metadata announces it; nothing of it is imported."""

    name: str
    owner: Owner
    read: Callable[[], Any]
    """Import the object that the entry point names."""

    @property
    def qualified_name(self) -> str:
        """`distribution:name`, which is unambiguous."""
        return f"{self.owner.distribution}:{self.name}"

    def load(self) -> type[DatasetConfig]:
        """Import the config class.

        Raises:
            PluginError: If the import fails or yields something else; the message names the owner and the cause.
        """
        try:
            found = self.read()
        except Exception as error:
            raise PluginError(f"dataset {self.name!r} of {self.owner} cannot be loaded: {_explain(error)}") from error
        if not (isinstance(found, type) and issubclass(found, DatasetConfig)):
            raise PluginError(f"dataset {self.name!r} of {self.owner} is {found!r}, not a DatasetConfig")
        return found


class Plugins:
    """The plugins of this process: their hooks, what they registered, and what failed.

    Args:
        entry_points: Entry points of both groups, with their distributions; `load()` takes those of the environment.
        strict: Raise a plugin's failure at once instead of keeping it.
        disabled: Distributions whose entry points are left out, in both groups.
    """

    def __init__(
        self, entry_points: Iterable[metadata.EntryPoint] = (), *, strict: bool = False, disabled: Iterable[str] = ()
    ) -> None:
        named = {_normalize(name) for name in disabled}
        # Every rank must call hooks in one order, and the order in which a file system lists distributions differs.
        offered = sorted(((_owner(entry), entry) for entry in entry_points), key=lambda pair: pair[0])
        used = [(owner, entry) for owner, entry in offered if _normalize(owner.distribution) not in named]
        out = {owner.distribution for owner, _ in offered if _normalize(owner.distribution) in named}
        self.blocked = tuple(sorted(out))
        """Distributions that were left out because `RLINF_DISABLE_PLUGINS` names them."""
        self._strict = strict
        self._modules = [(owner, entry) for owner, entry in used if entry.group == PLUGIN_GROUP]
        self._datasets = [DatasetEntry(e.name, owner, e.load) for owner, e in used if e.group == DATASET_GROUP]
        self._owners: dict[str, Owner] = {}
        self._failures: list[Failure] = []

    @classmethod
    def load(cls) -> Plugins:
        """The plugins of the environment, under `RLINF_STRICT_PLUGINS` and `RLINF_DISABLE_PLUGINS`."""
        strict = os.environ.get("RLINF_STRICT_PLUGINS", "")
        if strict not in ("", "0", "1"):
            raise UserError(f"RLINF_STRICT_PLUGINS is {strict!r}: set it to 1 (raise plugin failures at once) or 0")
        disabled = [name.strip() for name in os.environ.get("RLINF_DISABLE_PLUGINS", "").split(",") if name.strip()]
        found = metadata.entry_points()
        entry_points = [*found.select(group=PLUGIN_GROUP), *found.select(group=DATASET_GROUP)]
        return cls(entry_points, strict=strict == "1", disabled=disabled)

    @property
    def hook(self) -> pluggy.HookRelay:
        """Call a hook in every plugin: `plugins.hook.rlinf_configure(run=run)`."""
        return self._manager.hook

    @property
    def owners(self) -> tuple[Owner, ...]:
        """The plugins of group `rlinf.plugins` that are loaded and in use."""
        return tuple(self._owners[name] for name, _ in self._manager.list_name_plugin())

    @property
    def failures(self) -> tuple[Failure, ...]:
        """Everything that failed while loading the plugins and calling their registration hooks."""
        _ = self.registered
        return tuple(self._failures)

    def policy(self, name: str) -> type[PolicyConfig]:
        """The policy config of this `type`. Raises `UserError` if there is none, `PluginError` if two."""
        return self._pick("policy", name)

    def trainer(self, name: str) -> type[TrainerConfig]:
        """The trainer config of this `type`. Raises `UserError` if there is none, `PluginError` if two."""
        return self._pick("trainer", name)

    def logger(self, name: str) -> type[LoggerConfig]:
        """The logger config of this `type`. Raises `UserError` if there is none, `PluginError` if two."""
        return self._pick("logger", name)

    def dataset(self, name: str) -> type[DatasetConfig]:
        """Import the dataset config of this name, and no other.

        Args:
            name: The name of an entry point, or `distribution:name` when two distributions use one name.

        Raises:
            UserError: If there is no such dataset.
            PluginError: If two distributions offer it, or if it cannot be imported.
        """
        distribution, _, short = name.rpartition(":")
        found = [entry for entry in self._datasets if entry.name == short]
        if distribution:
            found = [entry for entry in found if _normalize(entry.owner.distribution) == _normalize(distribution)]
        if not found:
            raise UserError(self._unknown("dataset", name, [entry.name for entry in self._datasets]))
        if len(found) > 1:
            owners = " and by ".join(str(entry.owner) for entry in found)
            choices = " or ".join(f'config_name = "{entry.qualified_name}"' for entry in found)
            raise PluginError(f"dataset {name!r} is offered by {owners}. Say which: {choices}")
        return found[0].load()

    def datasets(self) -> tuple[DatasetEntry, ...]:
        """Every dataset format that the installed distributions announce; imports none of them."""
        return tuple(sorted(self._datasets, key=lambda entry: (entry.name, entry.owner)))

    @functools.cached_property
    def _manager(self) -> pluggy.PluginManager:
        manager = pluggy.PluginManager(hookspecs.PROJECT)
        manager.add_hookspecs(hookspecs)
        for owner, entry in self._modules:
            name = f"{owner.distribution}: {owner.entry_point}"
            try:
                plugin = entry.load()
                hookspecs.check_plugin(manager, plugin)
                self._owners[name] = owner
                manager.register(plugin, name)
            except Exception as error:
                # Before pluggy 1.7 a plugin that fails validation is left half registered.
                if manager.has_plugin(name):
                    manager.unregister(name=name)
                self._fail(owner, "loading the plugin", error)
        return manager

    @functools.cached_property
    def registered(self) -> tuple[Registered, ...]:
        """Every policy, trainer and logger that a plugin registered, with its owner."""
        found = [one for kind, (hook, base) in _KINDS.items() for one in self._collect(kind, hook, base)]
        return tuple(sorted(found, key=lambda one: (one.kind, one.name, one.owner)))

    def _collect(self, kind: Kind, hook: str, base: type[BaseModel]) -> Iterator[Registered]:
        """Call a hook one implementation at a time, so that every result and every failure has an owner."""
        for implementation in getattr(self._manager.hook, hook).get_hookimpls():
            owner = self._owners[implementation.plugin_name]
            try:
                offered = list(implementation.function())
            except Exception as error:
                self._fail(owner, f"calling {hook}", error)
                continue
            for config in offered:
                try:
                    yield Registered(kind, _type_of(config, base), config, owner)
                except PluginError as error:
                    self._fail(owner, f"using what {hook} returned", error)

    def _fail(self, owner: Owner, doing: str, cause: Exception) -> None:
        failure = Failure(owner, doing, cause)
        if self._strict:
            raise PluginError(str(failure)) from cause
        self._failures.append(failure)

    def _pick(self, kind: Kind, name: str) -> type[Any]:
        registered = [one for one in self.registered if one.kind == kind]
        match [one for one in registered if one.name == name]:
            case []:
                raise UserError(self._unknown(kind, name, [one.name for one in registered]))
            case [one]:
                return one.config
            case several:
                owners = " and by ".join(str(one.owner) for one in several)
                raise PluginError(
                    f"{kind} {name!r} is registered by {owners}. "
                    f"Uninstall one, or leave it out: RLINF_DISABLE_PLUGINS={several[-1].owner.distribution}"
                )

    def _unknown(self, kind: str, name: str, names: Iterable[str]) -> str:
        known = sorted(set(names))
        lines = [f"unknown {kind} {name!r}{did_you_mean(name, known)}"]
        lines.append(f"there is: {', '.join(known)}" if known else f"no {kind} is installed")
        lines += [f"failed: {failure}" for failure in self.failures]
        lines += [f"left out by RLINF_DISABLE_PLUGINS: {distribution}" for distribution in self.blocked]
        if not self._modules and not self.blocked:
            lines.append("no plugin is installed, not even rlinf-core's own: install rlinf-core with pip or uv")
        return "\n".join([lines[0], textwrap.indent("\n".join(lines[1:]), "  ")])


@functools.cache
def get_plugins() -> Plugins:
    """The plugins of the environment, found once a process."""
    return Plugins.load()


def _owner(entry: metadata.EntryPoint) -> Owner:
    entry_point = f"{entry.name} = {entry.value}"
    if entry.dist is None:
        return Owner("(no distribution)", "", entry_point)
    return Owner(entry.dist.name, entry.dist.version, entry_point)


def _normalize(distribution: str) -> str:
    """The form of a distribution's name that packaging compares (PEP 503)."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _explain(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _type_of(config: object, base: type[BaseModel]) -> str:
    """The name that selects a config class: the one value of its field `type`."""
    if not (isinstance(config, type) and issubclass(config, base)):
        raise PluginError(f"expected a subclass of {base.__name__}, found {config!r}")
    annotation = config.model_fields["type"].annotation
    names = get_args(annotation) if get_origin(annotation) is Literal else ()
    if len(names) != 1 or not isinstance(names[0], str):
        raise PluginError(f'{config.__qualname__} must declare its name as the one value of `type: Literal["name"]`')
    return names[0]
