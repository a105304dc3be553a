"""Which distribution something comes from: implementations of hooks and failures, with their owner."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata, util
from typing import Any

from rlinf_core.errors import PluginError, UserError

CORE = "rlinf-core"
"""Core's own distribution. Its errors are about the user's input and name no plugin."""
FAULTS = (Exception, SystemExit)
"""What a plugin's code raises when it fails; a library's `sys.exit` must not end the run. Ctrl-C passes through."""


@dataclass(frozen=True, order=True)
class Owner:
    """The source of a plugin: a distribution and one of its entry points."""

    distribution: str
    version: str
    entry_point: str
    """As in its `pyproject.toml`: `name = module:attribute`."""

    def __str__(self) -> str:
        return f"{self.distribution} {self.version} (entry point '{self.entry_point}')"

    @property
    def module(self) -> str:
        """The module that the entry point names."""
        return self.entry_point.partition(" = ")[2].partition(":")[0].strip()


@dataclass(frozen=True)
class Implementation:
    """One plugin's implementation of a hook, for hooks whose results or failures must be attributed to their plugin."""

    hook: str
    owner: Owner
    call: Callable[..., Any]
    """Calls this implementation alone; takes the hook's arguments by name. Errors are those of `plugins.hook`."""

    def __str__(self) -> str:
        return f"{self.hook} of {self.owner}"


@dataclass(frozen=True)
class Failure:
    """A plugin, or a part of one, that could not be used."""

    owner: Owner
    doing: str
    """The action that failed: loading the plugin, or calling one of its registration hooks."""
    cause: Exception | SystemExit
    hook: str = ""
    """The registration hook that failed; empty if loading failed."""

    @property
    def reason(self) -> str:
        """The cause in words; for a missing module, what to install."""
        return explain(self.cause, self.owner)

    def __str__(self) -> str:
        return f"{self.owner}: {self.doing}: {self.reason}"


def explain(cause: Exception | SystemExit, owner: Owner) -> str:
    """A cause in words: user errors verbatim, a missing module with what to install."""
    if isinstance(cause, UserError):
        return str(cause)
    if isinstance(cause, ModuleNotFoundError) and cause.name:
        return _missing_module(cause.name, owner)
    if isinstance(cause, SystemExit):
        return exited(cause)
    return f"{type(cause).__name__}: {cause}"


def exited(cause: SystemExit) -> str:
    """In words: code of a plugin tried to end the process."""
    given = "" if cause.code is None else repr(cause.code)
    return f"it called sys.exit({given}) instead of raising an error"


def exiting_code(error: SystemExit) -> PluginError:
    """The message for code of a dataset or policy that called `sys.exit`: names its distribution, file and line."""
    place, owner = "", ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package not in (__package__.partition(".")[0], "torch", *sys.stdlib_module_names):
            place, owner = f"{frame.f_code.co_filename}:{line}", _distribution(package)
    return PluginError(f"{owner or 'the data code of the run'}: {exited(error)}{f' ({place})' if place else ''}")


def _distribution(package: str) -> str:
    """The distribution whose entry points name a package, with its version; otherwise the package."""
    for group in ("rlinf.plugins", "rlinf.datasets"):
        for entry in metadata.entry_points(group=group):
            if entry.module.partition(".")[0] == package and entry.dist:
                return f"{entry.dist.name} {entry.dist.version}"
    return package


def _missing_module(name: str, owner: Owner) -> str:
    if f"{owner.module}.".startswith(f"{name}."):
        return f"No module named {name!r}: reinstall {owner.distribution}, or correct its entry point"
    package = name.partition(".")[0]
    if package != name and (package in sys.modules or util.find_spec(package)):
        return (
            f"No module named {name!r} in the installed {package!r}, and {owner.distribution} needs it: "
            f"install the version of {package!r} that it requires"
        )
    return (
        f"No module named {name!r}, and {owner.distribution} needs it: pip install {package} "
        "(or the package that provides this module)"
    )
