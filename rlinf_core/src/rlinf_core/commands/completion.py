"""Shell completion of `rlinf` with argcomplete: commands, their options, and files.

The shell runs `rlinf` without arguments and with `_ARGCOMPLETE` set for each press of the tab key, so plugins are
loaded only for the name of a command, and only the module of the command on the line is imported.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection, Sequence
from importlib import import_module

from rlinf_core.contract.command import Command

VARIABLE = "_ARGCOMPLETE"


def complete(parser: argparse.ArgumentParser, commands: Sequence[Command]) -> None:
    """Print what may follow on the shell's line, and end the process; return where argcomplete is not installed.

    Args:
        parser: The options before the command's name.
        commands: Core's commands.
    """
    try:
        import argcomplete
    except ImportError:
        return
    words = os.environ.get("COMP_LINE", "").split()
    own = [command for command in commands if command.name in words]
    subparsers = parser.add_subparsers()
    for command in own or (*commands, *_of_plugins({command.name for command in commands})):
        subparser = subparsers.add_parser(command.name, help=command.help)
        if command.name in words:
            import_module(command.module).add_arguments(subparser)
    argcomplete.autocomplete(parser)


def _of_plugins(taken: Collection[str]) -> list[Command]:
    """The commands of plugins, one for each name that is not taken."""
    from rlinf_core.plugins.registry import get_plugins

    return list({one.name: one.item for one in get_plugins().commands() if one.name not in taken}.values())
