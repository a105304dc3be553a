"""`rlinf datasets`: the dataset formats that installed packages offer."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from rlinf_core.commands.output import print_json, print_table
from rlinf_core.errors import UserError

if TYPE_CHECKING:
    from rlinf_core.plugins.registry import DatasetEntry

JSON_KEYS = """\
--json prints a list with an object for each format: "name", "distribution", "version", and either "error", why its
class cannot be imported, or "policy" (the type it sets, or ""), "action_horizon" (the chunk it sets, or null),
"repo_id", "description" and what the class knows of its data. Of robot data that is "cameras" (of the policy, with
their columns), "state" and "actions" (columns); formats for pi0 and pi0.5 add "state_dim" and "action_dim", null where
they are left to the data.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = JSON_KEYS
    parser.add_argument("--details", action="store_true", help="import each format: policy, repository, purpose")
    parser.add_argument("--json", action="store_true", help="the details as a JSON list")


def run(options: argparse.Namespace) -> None:
    """List from metadata alone, unless details are asked for."""
    from rlinf_core.plugins.registry import get_plugins

    entries = get_plugins().datasets()
    names = [entry.name for entry in entries]
    rows = []
    for entry in entries:
        name = entry.name if names.count(entry.name) == 1 else entry.qualified_name
        row = {"name": name, "distribution": entry.owner.distribution, "version": entry.owner.version}
        rows.append(row | (_details(entry) if options.details or options.json else {}))
    if options.json:
        print_json(rows)
        return
    columns = ["name", "distribution", "version"] + ["policy", "repo_id", "description"] * options.details
    # A format that cannot be imported says why where the others say what they are.
    rows = [{"description": row.get("error", "")} | row for row in rows]
    print_table(columns, [[row.get(key, "") for key in columns] for row in rows])


def _details(entry: DatasetEntry) -> dict[str, Any]:
    try:
        config = entry.load()
    except UserError as error:
        return {"error": str(error)}
    policy = config.run_defaults.get("policy", {})
    return {
        "policy": policy.get("type", ""),
        "action_horizon": policy.get("action_horizon"),
        "repo_id": config.model_fields["repo_id"].default,
        "description": (config.__doc__ or "").strip().partition("\n")[0],
        **config.facts(),
    }
