"""`rlinf plugins`: list plugins, what they registered, and what failed."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import TYPE_CHECKING, Any

from rlinf_core.commands.output import print_json, print_table

if TYPE_CHECKING:
    from rlinf_core.plugins.registry import Plugins

JSON_KEYS = """\
--json prints an object: "plugins", a list of {"distribution", "version", "entry_point", "registers": [{"kind",
"name"}]}; "datasets", a list of {"distribution", "version", "count"}; "failures", a list of {"distribution", "version",
"entry_point", "doing", "cause"}; "blocked", a list of distributions.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = JSON_KEYS
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")


def run(options: argparse.Namespace) -> None:
    """List plugin modules, distributions with dataset formats, failures and disabled distributions."""
    from rlinf_core.plugins.registry import get_plugins

    found = _collect(get_plugins())
    if options.json:
        print_json(found)
    else:
        _print(found)


def _collect(plugins: Plugins) -> dict[str, list[Any]]:
    registered = plugins.registered  # Must come first: it calls the hooks whose failures are listed below.
    modules = [
        {
            "distribution": owner.distribution,
            "version": owner.version,
            "entry_point": owner.entry_point,
            "registers": [{"kind": one.kind, "name": one.name} for one in registered if one.owner == owner],
        }
        for owner in plugins.owners
    ]
    formats = Counter((entry.owner.distribution, entry.owner.version) for entry in plugins.datasets())
    failures = [
        {
            "distribution": one.owner.distribution,
            "version": one.owner.version,
            "entry_point": one.owner.entry_point,
            "doing": one.doing,
            "cause": one.reason,
        }
        for one in plugins.failures
    ]
    return {
        "plugins": modules,
        "datasets": [{"distribution": d, "version": v, "count": n} for (d, v), n in sorted(formats.items())],
        "failures": failures,
        "blocked": list(plugins.blocked),
    }


def _print(found: dict[str, list[Any]]) -> None:
    rows = []
    for one in found["plugins"]:
        offers = ", ".join(f"{offer['kind']} {offer['name']}" for offer in one["registers"])
        rows.append([one["distribution"], one["version"], one["entry_point"], offers])
    print_table(["distribution", "version", "entry point", "registers"], rows)
    if found["datasets"]:
        print()
        rows = [[one["distribution"], one["version"], str(one["count"])] for one in found["datasets"]]
        print_table(["distribution", "version", "dataset formats"], rows)
    for one in found["failures"]:
        owner = f"{one['distribution']} {one['version']} (entry point '{one['entry_point']}')"
        print(f"failed: {owner}: {one['doing']}: {one['cause']}")
    for distribution in found["blocked"]:
        print(f"disabled by RLINF_DISABLE_PLUGINS: {distribution}")
