"""Plugins that need not be installed."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from types import SimpleNamespace
from typing import Any

from rlinf_core.contract.datasets import DatasetConfig
from rlinf_core.plugins import builtin
from rlinf_core.plugins.owners import CORE
from rlinf_core.plugins.registry import DATASET_GROUP, PLUGIN_GROUP, Plugins


class _InMemory(metadata.EntryPoint):
    """An entry point whose object is already imported."""

    def __init__(self, group: str, name: str, found: object, distribution: str, version: str) -> None:
        super().__init__(name, getattr(found, "__name__", name), group)
        vars(self).update(found=found, dist=SimpleNamespace(name=distribution, version=version))

    def load(self) -> Any:
        return vars(self)["found"]


def plugins_in_memory(
    *plugins: object,
    datasets: Mapping[str, type[DatasetConfig]] | None = None,
    distribution: str = "in-memory",
    strict: bool = True,
) -> Plugins:
    """Core's own plugin and the given ones, as if from one distribution; ignores the environment's plugins.

    Args:
        plugins: Modules, or objects with functions, that implement hooks.
        datasets: Name -> config class, as in the group `rlinf.datasets`.
        distribution: The distribution's name in messages.
        strict: Raise a plugin's failure immediately: a test should not pass without its plugin.
    """
    entries = [_InMemory(PLUGIN_GROUP, CORE, builtin, CORE, metadata.version(CORE))]
    entries += [_InMemory(PLUGIN_GROUP, f"plugin{i}", found, distribution, "0") for i, found in enumerate(plugins)]
    entries += [_InMemory(DATASET_GROUP, name, found, distribution, "0") for name, found in (datasets or {}).items()]
    return Plugins(entries, strict=strict)
