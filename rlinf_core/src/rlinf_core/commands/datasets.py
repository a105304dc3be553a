"""`rlinf datasets`: list the dataset formats of installed packages."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from rlinf_core.commands.output import print_json, print_table
from rlinf_core.errors import UserError

if TYPE_CHECKING:
    from rlinf_core.plugins.registry import DatasetEntry

JSON_KEYS = """\
--json prints a list with one object per format: "name", "distribution", "version", and either "error" (why its class
cannot be imported) or "policy" (the type it sets, or ""), "action_horizon" (the chunk length it sets, or null),
"repo_id", "description" and facts about its data. For robot data these are "cameras" (the policy's, with their
columns), "state" and "actions" (columns); formats for pi0 and pi0.5 add "state_dim" and "action_dim", null if the data
determine them.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = JSON_KEYS
    parser.add_argument("--details", action="store_true", help="import each format: policy, repository, description")
    parser.add_argument("--json", action="store_true", help="print the details as a JSON list")


def run(options: argparse.Namespace) -> None:
    """List the formats from package metadata alone, unless details are requested."""
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
    # A format that cannot be imported shows the reason instead of a description.
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
