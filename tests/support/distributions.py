"""Plugins for tests: distributions written into a folder, entry points in memory, and this repository's own."""

import tomllib
from importlib import import_module
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace

from rlinf_core.plugins.registry import DATASET_GROUP, PLUGIN_GROUP, Plugins

ROOT = Path(__file__).parents[2]


def install(site, distribution, *, plugins=None, datasets=None, version="1.0", **modules):
    """Write an installed distribution into a folder for `sys.path`: modules (name=source) and metadata."""
    info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    groups = {PLUGIN_GROUP: plugins or {}, DATASET_GROUP: datasets or {}}
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items()) for group, entries in groups.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
    for name, source in modules.items():
        (site / f"{name}.py").write_text(dedent(source))


def entry_point(group, name, value, distribution="toy", version="1.0"):
    """An entry point that yields `value`: an object, or a string `module:attribute` to import."""

    def load():
        if not isinstance(value, str):
            return value
        module, _, attribute = value.partition(":")
        return getattr(import_module(module), attribute) if attribute else import_module(module)

    text = value if isinstance(value, str) else f"toy:{getattr(value, '__name__', name)}"
    dist = SimpleNamespace(name=distribution, version=version)
    return SimpleNamespace(group=group, name=name, value=text, dist=dist, load=load)


def entry_points_of(project):
    """The entry points that a `pyproject.toml` of this repository declares."""
    table = tomllib.loads((ROOT / project / "pyproject.toml").read_text())["project"]
    return [
        entry_point(group, name, value, table["name"], table["version"])
        for group in (PLUGIN_GROUP, DATASET_GROUP)
        for name, value in table.get("entry-points", {}).get(group, {}).items()
    ]


APART = ("rlinf_plugins_ray",)
"""Distributions that are installed with a dependency group of their own; `tests/ray_cluster` tests this one."""


def repository_entry_points():
    """The entry points of the distributions of this repository, except those `APART`."""
    plugins = [path.parent for path in ROOT.glob("plugins/*/pyproject.toml") if path.parent.name not in APART]
    projects = ["rlinf_core", "rlinf_plugins_openpi", *plugins]
    return [entry for project in projects for entry in entry_points_of(project)]


def repository_plugins():
    """The plugins of this repository, but for those `APART`."""
    return Plugins(repository_entry_points())
