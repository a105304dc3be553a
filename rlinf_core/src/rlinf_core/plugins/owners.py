"""Who brought something, and what became of those that failed."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import util

from rlinf_core.errors import UserError


@dataclass(frozen=True, order=True)
class Owner:
    """Who brought something: a distribution, by one of its entry points."""

    distribution: str
    version: str
    entry_point: str
    """As its `pyproject.toml` says it: `name = module:attribute`."""

    def __str__(self) -> str:
        return f"{self.distribution} {self.version} (entry point '{self.entry_point}')"

    @property
    def module(self) -> str:
        """The module that the entry point names."""
        return self.entry_point.partition(" = ")[2].partition(":")[0].strip()


@dataclass(frozen=True)
class Failure:
    """A plugin, or a part of one, that could not be used."""

    owner: Owner
    doing: str
    """What was tried: loading the plugin, or calling one of its registration hooks."""
    cause: Exception
    hook: str = ""
    """The registration hook that failed; empty: loading did."""

    @property
    def reason(self) -> str:
        """The cause in words; of a missing module what to install."""
        return explain(self.cause, self.owner)

    def __str__(self) -> str:
        return f"{self.owner}: {self.doing}: {self.reason}"


def explain(cause: Exception, owner: Owner) -> str:
    """A cause in words: a message that was written for users as it is, a missing module with what to install."""
    if isinstance(cause, UserError):
        return str(cause)
    if isinstance(cause, ModuleNotFoundError) and cause.name:
        return _missing_module(cause.name, owner)
    return f"{type(cause).__name__}: {cause}"


def _missing_module(name: str, owner: Owner) -> str:
    if f"{owner.module}.".startswith(f"{name}."):
        return f"No module named {name!r}: install {owner.distribution} again, or correct its entry point"
    package = name.partition(".")[0]
    if package != name and (package in sys.modules or util.find_spec(package)):
        return (
            f"No module named {name!r} in the installed {package!r}, and {owner.distribution} needs it: "
            f"install the version of {package!r} that it asks for"
        )
    return (
        f"No module named {name!r}, and {owner.distribution} needs it: pip install {package} "
        "(or the package that brings this module)"
    )
