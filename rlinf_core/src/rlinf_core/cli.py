"""The command `rlinf`: find the subcommand, run it, and turn how it ended into an exit code (`errors.Exit`).

Core's own commands are looked up first, so that `rlinf datasets` loads no plugin; another name, or `--help`, loads them
all. The module of a command is imported when the command is called.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from rlinf_core.commands.output import print_error
from rlinf_core.contract.command import Command
from rlinf_core.errors import Exit, PluginError, UserError, did_you_mean

COMMANDS = (
    Command("launch", "start a run's processes where its config says, and wait for them", "rlinf_core.commands.launch"),
    Command("validate", "check a run's config, data and files without starting it", "rlinf_core.commands.validate"),
    Command("plan", "say what memory, time and communication a run will take", "rlinf_core.commands.plan"),
    Command("inspect", "write a page that shows what a run's model will see", "rlinf_core.commands.inspect"),
    Command("norm-stats", "compute, diagnose, compare and import statistics", "rlinf_core.commands.norm_stats"),
    Command(
        "check-dataset", "find what is wrong with the files of a LeRobot dataset", "rlinf_core.commands.check_dataset"
    ),
    Command("bench-data", "measure how fast data come, and how many GPUs that feeds", "rlinf_core.commands.bench_data"),
    Command("cache", "decode a run's pictures once, into files that are read as they are", "rlinf_core.commands.cache"),
    Command("export", "write a run's policy to a folder to act with or to train on", "rlinf_core.commands.export"),
    Command("datasets", "list the dataset formats that installed packages offer", "rlinf_core.commands.datasets"),
    Command("plugins", "list plugins, what they registered, and what failed", "rlinf_core.commands.plugins"),
)
"""Core's own."""

EXIT_CODES = """\
exit codes:
  0    done; a run that SIGTERM asked to leave has saved
  1    a defect, with its traceback, or a process that was killed
  2    something to mend, with one message
  130  Ctrl-C; a run has saved
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    split = next((i for i, argument in enumerate(given) if not argument.startswith("-")), len(given))
    parser = _parser()
    options = parser.parse_args(given[:split])
    try:
        code = _run(parser, options, given[split:])
        sys.stdout.flush()  # Else a closed pipe is noticed only while Python shuts down.
        return code
    except UserError as error:
        if options.debug:
            traceback.print_exc()
        else:
            print_error(str(error))
        return Exit.USER_ERROR
    except KeyboardInterrupt:
        if options.debug:
            traceback.print_exc()
        return Exit.INTERRUPTED
    except BrokenPipeError:  # Whoever reads has seen enough (`| head`). What is still in the buffer goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.OK


def _parser() -> argparse.ArgumentParser:
    """What stands before the command."""
    parser = argparse.ArgumentParser(
        prog="rlinf",
        usage="rlinf [-h] [--debug] [--version] COMMAND ...",
        description="Fine-tune robot and text policies with supervision.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this help, or a command's after its name")
    parser.add_argument("--debug", action="store_true", help="show the traceback of errors that have a message")
    parser.add_argument("--version", action="store_true", help="show the version")
    return parser


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace, rest: Sequence[str]) -> int:
    if options.help:
        parser.epilog = f"{_list_commands()}\n\n{EXIT_CODES}"
        parser.print_help()
        return Exit.OK
    if options.version:
        from importlib import metadata  # The command also runs from a source tree that is not installed.

        print(f"rlinf-core {metadata.version('rlinf-core')}")
        return Exit.OK
    if not rest:
        names = ", ".join(command.name for command in COMMANDS)
        raise UserError(f"name a command: {names}, or a plugin's; `rlinf --help` describes them")
    command, module = _find(rest[0])
    commands_parser = argparse.ArgumentParser(
        prog=f"rlinf {command.name}",
        description=command.help[:1].upper() + command.help[1:] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(commands_parser)
    code = module.run(_parse(commands_parser, rest[1:]))
    return Exit.OK if code is None else int(code)


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Options may stand between `key=value`s, unless the command has subcommands or takes the rest as it is."""
    try:
        return parser.parse_intermixed_args(arguments)
    except TypeError:
        return parser.parse_args(arguments)


def _find(name: str) -> tuple[Command, Any]:
    """The command of a name and its module."""
    for command in COMMANDS:
        if command.name == name:
            return command, import_module(command.module)
    from rlinf_core.plugins.registry import get_plugins

    plugins = get_plugins()
    known = sorted({command.name for command in (*COMMANDS, *(one.item for one in plugins.commands()))})
    if name not in known:
        lines = [f"unknown command {name!r}{did_you_mean(name, known)}", f"there is: {', '.join(known)}"]
        lines += [f"failed: {failure}" for failure in plugins.failures]
        lines += [f"left out by RLINF_DISABLE_PLUGINS: {distribution}" for distribution in plugins.blocked]
        raise UserError("\n  ".join(lines))
    found = plugins.find("command", name)
    try:
        module = import_module(found.item.module)
    except ImportError as error:
        raise PluginError(
            f"the command {name!r} of {found.owner} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if missing := [part for part in ("add_arguments", "run") if not hasattr(module, part)]:
        raise PluginError(f"the command {name!r} of {found.owner}: {module.__name__} has no {' and no '.join(missing)}")
    return found.item, module


def _list_commands() -> str:
    """All commands with a line each, who brought a plugin's, and what failed."""
    from rlinf_core.plugins.registry import get_plugins

    plugins = get_plugins()
    own = {command.name for command in COMMANDS}
    rows = [(command.name, command.help) for command in COMMANDS]
    rows += [
        (one.name, f"{one.item.help} ({one.owner.distribution})") for one in plugins.commands() if one.name not in own
    ]
    width = max(len(name) for name, _ in rows)
    lines = ["commands:", *(f"  {name.ljust(width)}  {what}" for name, what in rows)]
    lines += [f"failed: {str(failure).partition(chr(10))[0]}" for failure in plugins.failures]
    return "\n".join([*lines, "", "`rlinf COMMAND --help` describes a command."])


if __name__ == "__main__":
    sys.exit(main())
