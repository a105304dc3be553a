"""The command `rlinf`: what is installed. `torchrun -m rlinf_core.train` runs the training.

Exit codes: 0; 2 for what is the user's to mend, with one message on stderr. A defect keeps its traceback and exits 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

from rlinf_core.errors import UserError
from rlinf_core.plugins import DatasetEntry, get_plugins


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], None] = options.command
    try:
        command(options)
    except UserError as error:
        if options.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rlinf", description="Fine-tune robot and text policies with supervision.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of errors that have a message")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    datasets = commands.add_parser("datasets", help="list the dataset formats that installed packages offer")
    datasets.add_argument("--details", action="store_true", help="import each format: policy, repository, purpose")
    datasets.add_argument("--json", action="store_true", help="the details as a JSON list")
    datasets.set_defaults(command=list_datasets)
    plugins = commands.add_parser("plugins", help="list plugin modules, what they registered, and what failed")
    plugins.set_defaults(command=list_plugins)
    return parser


class _Version(argparse.Action):
    """Reads the metadata only when asked: the command also runs from a source tree that is not installed."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"rlinf-core {metadata.version('rlinf-core')}")
        parser.exit()


def list_datasets(options: argparse.Namespace) -> None:
    """`rlinf datasets`: from metadata alone, unless details are asked for."""
    entries = get_plugins().datasets()
    names = [entry.name for entry in entries]
    rows = []
    for entry in entries:
        name = entry.name if names.count(entry.name) == 1 else entry.qualified_name
        row = {"name": name, "distribution": entry.owner.distribution, "version": entry.owner.version}
        rows.append(row | (_details(entry) if options.details or options.json else {}))
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        columns = ["name", "distribution", "version"] + ["policy", "repo_id", "description"] * options.details
        # A format that cannot be imported says why where the others say what they are.
        rows = [{"description": row.get("error", "")} | row for row in rows]
        _print_table(columns, [[row.get(key, "") for key in columns] for row in rows])


def _details(entry: DatasetEntry) -> dict[str, str]:
    try:
        config = entry.load()
    except UserError as error:
        return {"error": str(error)}
    policy = config.run_defaults.get("policy", {})
    return {
        "policy": policy.get("type", ""),
        "repo_id": config.model_fields["repo_id"].default,
        "description": (config.__doc__ or "").strip().partition("\n")[0],
    }


def list_plugins(options: argparse.Namespace) -> None:
    """`rlinf plugins`: who is there, what each registered, and every failure with its cause."""
    plugins = get_plugins()
    rows = []
    for owner in plugins.owners:
        offers = [f"{one.kind} {one.name}" for one in plugins.registered if one.owner == owner]
        rows.append([owner.distribution, owner.version, owner.entry_point, ", ".join(offers)])
    _print_table(["distribution", "version", "entry point", "registers"], rows)
    for failure in plugins.failures:
        print(f"failed: {failure}")
    for distribution in plugins.blocked:
        print(f"left out by RLINF_DISABLE_PLUGINS: {distribution}")


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*row)
    # A pipe has no width: rich would fold names at 80 columns.
    Console(width=None if sys.stdout.isatty() else 1000, markup=False, highlight=False).print(table)


if __name__ == "__main__":
    sys.exit(main())
