"""Shell completion of `rlinf` with argcomplete: commands, their options, files, and the keys and values of a config.

The shell runs `rlinf` without arguments and with `_ARGCOMPLETE` set for each press of the tab key, so plugins are
loaded only for the name of a command, and only the module of the command on the line is imported.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection, Mapping, Sequence
from importlib import import_module
from typing import Any

from rlinf_core.commands.overrides import complete_override, complete_path
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
            _add_completers(subparser)
            _leave_options_out(subparser)
    argcomplete.autocomplete(parser)


def _add_completers(parser: argparse.ArgumentParser) -> None:
    """Complete the config of a run by its ending, and `key=value` by its tables."""
    for action in parser._actions:  # argparse has no other way to list them.
        if action.dest == "config":
            vars(action)["completer"] = _complete_config
        if action.dest == "overrides":
            vars(action)["completer"] = _complete_override


def _leave_options_out(parser: argparse.ArgumentParser) -> None:
    """Take options from the shell's line: `cli` accepts a `key=value` behind one, but argcomplete offers none there."""
    line = os.environ.get("COMP_LINE", "")[: int(os.environ.get("COMP_POINT", "0") or 0)]
    *words, last = line.split(" ")
    if last.startswith("-") or set(line) & {"'", '"', "\\"}:
        return
    kept, values = [], 0
    for word in words:
        if word in parser._option_string_actions:
            nargs = parser._option_string_actions[word].nargs
            values = nargs if isinstance(nargs, int) else 1
        elif values:
            values -= 1
        elif not word.startswith("-"):
            kept.append(word)
    if not values:
        os.environ["COMP_LINE"] = " ".join([*kept, last])
        os.environ["COMP_POINT"] = str(len(os.environ["COMP_LINE"].encode()))


def _complete_config(prefix: str, **_: Any) -> list[str]:
    return list(complete_path(prefix, ".toml"))


def _complete_override(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> Mapping[str, str]:
    config = getattr(parsed_args, "config", None) or getattr(parsed_args, "dataset", None)
    return complete_override(prefix, config, parsed_args.overrides or ()) if config else {}


def _of_plugins(taken: Collection[str]) -> list[Command]:
    """The commands of plugins, one for each name that is not taken."""
    from rlinf_core.plugins.registry import get_plugins

    return list({one.name: one.item for one in get_plugins().commands() if one.name not in taken}.values())
