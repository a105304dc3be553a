"""A subcommand of `rlinf`, from core or a plugin. Its module is imported when the command is called."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A subcommand: its name, its line in `rlinf --help`, and the module with its code.

    The module has two functions: `add_arguments(parser)` gets an `argparse.ArgumentParser`; `run(options)` gets the
    parsed namespace and returns an exit code, or None for 0. It raises `UserError` for anything the user can fix.
    `options.plugins`, in commands of plugins, are the loaded plugins, for what they register.
    """

    name: str
    """What follows `rlinf` on the command line."""
    help: str
    """One line for `rlinf --help`, without a full stop."""
    module: str
    """Dotted name of the module."""
