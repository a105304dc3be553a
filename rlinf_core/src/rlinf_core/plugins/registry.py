"""Find plugins, load them, and explain those that fail.

Plugins are found through entry points only. Entry points of the group `rlinf.plugins` name modules with hook
implementations, which are loaded together when a hook or a registered class is first needed. Those of the group
`rlinf.datasets` name one config class each, which is loaded alone when it is used: listing two hundred datasets imports
none of them.

A plugin that fails affects only itself. The failure is recorded with its owner and cause, and repeated in the error
message if something is missing that this plugin might have registered.

Listing imports nothing slow: pydantic and the config classes are loaded when one of them is needed.
"""

from __future__ import annotations

import fnmatch
import functools
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

import pluggy

from rlinf_core.errors import PluginError, UserError, did_you_mean
from rlinf_core.plugins.calls import OwnedPlugin, check_plugin, create_manager, naming, owned
from rlinf_core.plugins.observers import ObservedLogger, Observer
from rlinf_core.plugins.owners import FAULTS, Failure, Implementation, Owner, explain

if TYPE_CHECKING:
    from pydantic import BaseModel

    from rlinf_core.contract.command import Command
    from rlinf_core.contract.datasets import DatasetConfig
    from rlinf_core.contract.environment import EnvironmentConfig
    from rlinf_core.contract.evaluation import EvaluatorConfig
    from rlinf_core.contract.optim import OptimizerConfig, ScheduleConfig
    from rlinf_core.contract.policy import PolicyConfig
    from rlinf_core.contract.run import Logger, LoggerConfig, RunConfig, TrainerConfig
    from rlinf_core.plugins.evaluators import Chosen
    from rlinf_core.plugins.registrations import Registered, RegistrationKind

PLUGIN_GROUP = "rlinf.plugins"
DATASET_GROUP = "rlinf.datasets"
RECORD = "jsonl"
"""The logger that keeps the run's own record of its metrics."""
ALWAYS_ON = (RECORD, "console")
"""Loggers of every run, in the order in which they are called."""


@dataclass(frozen=True)
class DatasetEntry:
    """A dataset format as announced in its distribution's metadata; nothing is imported."""

    name: str
    owner: Owner
    read: Callable[[], Any]
    """Imports the object that the entry point names."""

    @property
    def qualified_name(self) -> str:
        """`distribution:name`, which is unambiguous."""
        return f"{self.owner.distribution}:{self.name}"

    def load(self) -> type[DatasetConfig]:
        """Import the config class.

        Raises:
            PluginError: If the import fails or gives something else; the message names the owner and the cause.
        """
        from rlinf_core.contract.datasets import DatasetConfig

        try:
            found = self.read()
        except FAULTS as error:
            raise PluginError(
                f"dataset {self.name!r} of {self.owner} cannot be loaded: {explain(error, self.owner)}"
            ) from error
        if not (isinstance(found, type) and issubclass(found, DatasetConfig)):
            raise PluginError(f"dataset {self.name!r} of {self.owner} is {found!r}, not a DatasetConfig")
        return found


class Plugins:
    """The plugins of this process: their hooks, what they registered, and what failed.

    Args:
        entry_points: Entry points of both groups, with their distributions; `load()` uses those of the environment.
        strict: Raise a plugin's failure immediately instead of recording it.
        disabled: Distributions whose entry points are ignored, in both groups.
    """

    def __init__(
        self, entry_points: Iterable[metadata.EntryPoint] = (), *, strict: bool = False, disabled: Iterable[str] = ()
    ) -> None:
        named = {_normalize(name) for name in disabled}
        # Every rank must call hooks in the same order, but file systems list distributions in different orders.
        offered = sorted(((_owner(entry), entry) for entry in entry_points), key=lambda pair: pair[0])
        used = [(owner, entry) for owner, entry in offered if _normalize(owner.distribution) not in named]
        out = {owner.distribution for owner, _ in offered if _normalize(owner.distribution) in named}
        self.blocked = tuple(sorted(out))
        """Distributions disabled by `RLINF_DISABLE_PLUGINS`."""
        self._strict = strict
        self._modules = [(owner, entry) for owner, entry in used if entry.group == PLUGIN_GROUP]
        self._datasets = [DatasetEntry(e.name, owner, e.load) for owner, e in used if e.group == DATASET_GROUP]
        self._failures: list[Failure] = []
        self._registered: dict[RegistrationKind, tuple[Registered[Any], ...]] = {}

    @classmethod
    def load(cls) -> Plugins:
        """The plugins of the environment; reads `RLINF_STRICT_PLUGINS` and `RLINF_DISABLE_PLUGINS`."""
        strict = os.environ.get("RLINF_STRICT_PLUGINS", "")
        if strict not in ("", "0", "1"):
            raise UserError(f"RLINF_STRICT_PLUGINS is {strict!r}: set it to 1 (raise plugin failures) or 0")
        disabled = [name.strip() for name in os.environ.get("RLINF_DISABLE_PLUGINS", "").split(",") if name.strip()]
        found = metadata.entry_points()
        entry_points = [*found.select(group=PLUGIN_GROUP), *found.select(group=DATASET_GROUP)]
        there = {_normalize(_owner(entry).distribution) for entry in entry_points}
        if absent := [name for name in disabled if _normalize(name) not in there]:
            raise UserError(
                f"RLINF_DISABLE_PLUGINS names {absent[0]!r}, but no installed plugin package has that name"
                f"{did_you_mean(_normalize(absent[0]), there)}"
            )
        return cls(entry_points, strict=strict == "1", disabled=disabled)

    @property
    def hook(self) -> pluggy.HookRelay:
        """Call a hook in every plugin: `plugins.hook.rlinf_configure(run=run)`.

        A call returns the implementations' results in call order, without None; for a hook with a single result
        (`firstresult`) the first that is not None, or None. A `UserError` of a plugin's implementation is raised as a
        `PluginError` that names hook and owner (core's own are raised unchanged), and so is a `SystemExit`; other
        exceptions get a note that names them.
        """
        return self._manager.hook

    def implementations(self, hook: str) -> list[Implementation]:
        """The implementations of a hook in call order, each with its owner, to be called alone."""
        caller: pluggy.HookCaller = getattr(self.hook, hook)
        plugins = [owned(implementation.plugin) for implementation in reversed(caller.get_hookimpls())]
        return [Implementation(hook, one.owner, self._calling(hook, one)) for one in plugins]

    def _calling(self, hook: str, plugin: OwnedPlugin) -> Callable[..., Any]:
        """A caller of the hook in this plugin alone."""
        others = [other for other in self._manager.get_plugins() if other is not plugin]
        caller = self._manager.subset_hook_caller(hook, others)
        is_single = caller.spec is not None and caller.spec.opts.get("firstresult")

        def call(**arguments: Any) -> Any:
            result = caller(**arguments)
            return result if is_single else next(iter(result), None)

        return call

    @property
    def owners(self) -> tuple[Owner, ...]:
        """The plugins of group `rlinf.plugins` that are loaded and in use."""
        return tuple(owned(plugin).owner for _, plugin in self._manager.list_name_plugin())

    @property
    def failures(self) -> tuple[Failure, ...]:
        """Failures so far: from loading the plugins, and from the registration hooks called so far."""
        _ = self._manager
        return tuple(self._failures)

    def raise_if_strict(self) -> None:
        """In strict mode, raise a plugin's failure now, before something that it registers is found missing."""
        if self._strict:
            _ = self.registered

    @property
    def registered(self) -> tuple[Registered[Any], ...]:
        """Everything that plugins registered, of all kinds; calls all registration hooks."""
        from rlinf_core.plugins.registrations import HOOKS

        return tuple(one for kind in HOOKS for one in self.registered_as(kind))

    def registered_as(self, kind: RegistrationKind) -> tuple[Registered[Any], ...]:
        """What plugins registered of one kind, with owners, sorted by name; calls only that kind's hook."""
        if kind not in self._registered:
            self._registered[kind] = tuple(sorted(self._collect(kind), key=lambda one: (one.name, one.owner)))
        return self._registered[kind]

    def find(self, kind: RegistrationKind, name: str) -> Registered[Any]:
        """The item registered under a name.

        Raises:
            UserError: If there is none; the message has similar names and failures that may be the reason.
            PluginError: If two plugins registered it; the message names both.
        """
        from rlinf_core.plugins.registrations import HOOKS

        registered = self.registered_as(kind)
        match [one for one in registered if one.name == name]:
            case []:
                failures = [failure for failure in self._failures if failure.hook in ("", HOOKS[kind].name)]
                instead = self.instead_of(name, kind) if kind in ("policy", "optimizer", "schedule") else ""
                names = [one.name for one in registered]
                raise UserError(self._unknown(HOOKS[kind].noun, name, names, failures, instead))
            case [one]:
                return one
            case several:
                owners = " and by ".join(str(one.owner) for one in several)
                raise PluginError(
                    f"{HOOKS[kind].noun} {name!r} is registered by {owners}. "
                    f"Uninstall one, or disable it: RLINF_DISABLE_PLUGINS={several[-1].owner.distribution}"
                )

    def policy(self, name: str) -> type[PolicyConfig]:
        """The policy config of this `type`. Raises as `find` does."""
        found: type[PolicyConfig] = self.find("policy", name).item
        return found

    def instead_of(self, name: str, kind: RegistrationKind = "policy") -> str:
        """What to use instead of an unavailable policy, optimizer or schedule, according to a registered one; empty if
        unknown. Policies know about dataset formats, too.
        """
        said = (
            text
            for one in self.registered_as(kind)
            for pattern, text in one.item.not_here.items()
            if fnmatch.fnmatchcase(name, pattern)
        )
        return next(said, "")

    def trainer(self, name: str) -> type[TrainerConfig]:
        """The trainer config of this `type`. Raises as `find` does."""
        found: type[TrainerConfig] = self.find("trainer", name).item
        return found

    def optimizer(self, name: str) -> type[OptimizerConfig]:
        """The optimizer config of this `type`. Raises as `find` does."""
        found: type[OptimizerConfig] = self.find("optimizer", name).item
        return found

    def schedule(self, name: str) -> type[ScheduleConfig]:
        """The schedule config of this name. Raises as `find` does."""
        found: type[ScheduleConfig] = self.find("schedule", name).item
        return found

    def logger(self, name: str) -> type[LoggerConfig]:
        """The logger config of this `type`. Raises as `find` does."""
        found: type[LoggerConfig] = self.find("logger", name).item
        return found

    def build_loggers(self, run: RunConfig, *, start_step: int, stop_step: int) -> list[Logger]:
        """The loggers of a run: the default ones and those in `runner.loggers`. Called on rank 0.

        One that fails while it is built is an error; one that fails later is left out (`plugins.observers`). Only
        `jsonl` ends the run if it fails: it keeps the run's own record, from which an interrupted run continues.

        Args:
            run: The frozen config.
            start_step: Steps already done.
            stop_step: The last step of the run.

        Raises:
            PluginError: A logger of a plugin raised a `UserError`, or lacks a library; other exceptions get a note that
                names its owner.
        """
        loggers = []
        for name in dict.fromkeys((*ALWAYS_ON, *run.runner.loggers)):
            found = self.find("logger", name)
            config: LoggerConfig = run.loggers.get(name) or found.item(type=name)
            build = naming(f"logger {name!r}", found.owner, config.build)
            try:
                logger: Logger = build(run, start_step=start_step, stop_step=stop_step)
            except ModuleNotFoundError as error:  # A tracker's library, which only rank 0 of a run imports.
                raise PluginError(f"the logger {name!r} cannot start: {explain(error, found.owner)}") from error
            observer = Observer(f"logger {name!r} of {found.owner}", run.folder)
            loggers.append(logger if name == RECORD else ObservedLogger(logger, observer))
        return loggers

    def evaluators(self, run: RunConfig) -> list[Chosen]:
        """The evaluators of a run with their settings, in the order in which they are called. Raises as `find` does."""
        from rlinf_core.plugins.evaluators import Chosen, evaluator_names

        chosen = []
        for name in evaluator_names(run):
            found: Registered[type[EvaluatorConfig]] = self.find("evaluator", name)
            config: Any = run.evaluators.get(name) or found.item(type=name)
            chosen.append(Chosen(config, found.owner))
        return chosen

    def environment(self, name: str) -> type[EnvironmentConfig]:
        """The environment config of this `type`. Raises as `find` does."""
        found: type[EnvironmentConfig] = self.find("environment", name).item
        return found

    def options(self, name: str) -> type[BaseModel]:
        """The class of the table `[plugins.<name>]`. Raises as `find` does."""
        found: type[BaseModel] = self.find("options", name).item
        return found

    def command(self, name: str) -> Command:
        """The subcommand of this name. Raises as `find` does."""
        found: Command = self.find("command", name).item
        return found

    def commands(self) -> tuple[Registered[Command], ...]:
        """Every registered subcommand of `rlinf`, with its owner, sorted by name."""
        return self.registered_as("command")

    def dataset(self, name: str) -> type[DatasetConfig]:
        """Import the dataset config of this name only; raises as `find_dataset` and `DatasetEntry.load` do."""
        return self.find_dataset(name).load()

    def find_dataset(self, name: str) -> DatasetEntry:
        """The dataset format with this name; imports nothing.

        Args:
            name: The name of an entry point, or `distribution:name` if two distributions use the same name.

        Raises:
            UserError: If there is no such dataset.
            PluginError: If two distributions offer it.
        """
        distribution, _, short = name.rpartition(":")
        found = [entry for entry in self._datasets if entry.name == short]
        if distribution:
            found = [entry for entry in found if _normalize(entry.owner.distribution) == _normalize(distribution)]
        if not found:
            names = [entry.name for entry in self._datasets]
            failures = [one for one in self.failures if not one.hook]
            raise UserError(self._unknown("dataset", name, names, failures, self.instead_of(short)))
        if len(found) > 1:
            owners = " and by ".join(str(entry.owner) for entry in found)
            choices = " or ".join(f'config_name = "{entry.qualified_name}"' for entry in found)
            raise PluginError(f"dataset {name!r} is offered by {owners}. Choose one: {choices}")
        return found[0]

    def datasets(self) -> tuple[DatasetEntry, ...]:
        """Every dataset format of the installed distributions; imports nothing."""
        return tuple(sorted(self._datasets, key=lambda entry: (entry.name, entry.owner)))

    @functools.cached_property
    def _manager(self) -> pluggy.PluginManager:
        manager = create_manager()
        for owner, entry in self._modules:
            name = f"{owner.distribution}: {owner.entry_point}"
            try:
                plugin = entry.load()
                if earlier := [one.owner for one in map(owned, manager.get_plugins()) if one.plugin is plugin]:
                    raise PluginError(f"this plugin is loaded already, for {earlier[0]}")
                check_plugin(manager, plugin)
                manager.register(OwnedPlugin(owner, plugin, manager), name)
            except FAULTS as error:
                # Before pluggy 1.7, a plugin that fails validation stays half registered.
                if manager.has_plugin(name):
                    manager.unregister(name=name)
                self._fail(owner, "loading the plugin", error)
        return manager

    def _collect(self, kind: RegistrationKind) -> Iterator[Registered[Any]]:
        """Call a registration hook, one implementation at a time, so that every result and failure has an owner."""
        from rlinf_core.plugins.registrations import HOOKS, Registered

        hook = HOOKS[kind].name
        for one in self.implementations(hook):
            try:
                items = list(HOOKS[kind].read(one.call()))
            except FAULTS as error:
                self._fail(one.owner, f"calling {hook}", error, hook)
                continue
            for name, item, mistake in items:
                if mistake:
                    self._fail(one.owner, f"using what {hook} returned", mistake, hook)
                else:
                    yield Registered(kind, name, item, one.owner)

    def _fail(self, owner: Owner, doing: str, cause: Exception | SystemExit, hook: str = "") -> None:
        failure = Failure(owner, doing, cause, hook)
        if self._strict:
            raise PluginError(str(failure)) from cause
        self._failures.append(failure)

    def _unknown(
        self, noun: str, name: str, names: Iterable[str], failures: Iterable[Failure], instead: str = ""
    ) -> str:
        known = sorted(set(names))
        lines = [f"unknown {noun} {name!r}" + (f": {instead}" if instead else did_you_mean(name, known))]
        lines.append(f"available: {', '.join(known)}" if known else "no installed plugin provides one")
        lines += [f"failed: {failure}" for failure in failures]
        lines += [f"disabled by RLINF_DISABLE_PLUGINS: {distribution}" for distribution in self.blocked]
        if not self._modules and not self.blocked:
            lines.append("no plugin is installed, not even rlinf-core's own: install rlinf-core with pip or uv")
        return "\n".join([lines[0], textwrap.indent("\n".join(lines[1:]), "  ")])


@functools.cache
def get_plugins() -> Plugins:
    """The plugins of the environment, found once per process."""
    return Plugins.load()


def _owner(entry: metadata.EntryPoint) -> Owner:
    entry_point = f"{entry.name} = {entry.value}"
    if entry.dist is None:
        return Owner("(no distribution)", "", entry_point)
    return Owner(entry.dist.name, entry.dist.version, entry_point)


def _normalize(distribution: str) -> str:
    """A distribution's name normalised for comparison (PEP 503)."""
    return re.sub(r"[-_.]+", "-", distribution).lower()
