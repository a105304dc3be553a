"""The command `rlinf`: find the subcommand, run it, and map its outcome to an exit code (`errors.Exit`).

Core's own commands are looked up first, so that `rlinf datasets` loads no plugin; any other name, or `--help`, loads
all plugins. A command's module is imported when the command is called.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from rlinf_core.commands import completion
from rlinf_core.commands.output import print_error
from rlinf_core.contract.command import Command
from rlinf_core.errors import Exit, PluginError, UserError, beyond_environment, did_you_mean
from rlinf_core.plugins import builtin
from rlinf_core.process.start import prepare_process

COMMANDS = tuple(builtin.rlinf_register_commands())
"""Core's own commands, in the order of `rlinf --help`; from core's plugin directly, which loads no other plugin."""

TRAIN = frozenset({"train", "run", "start", "sft", "finetune", "fine-tune", "torchrun"})
"""What people type for `launch`."""

EXIT_CODES = """\
exit codes:
  0    done; also a run that saved after SIGTERM
  1    a bug, with its traceback, or a process that was killed
  2    something the user can fix, with one message
  130  Ctrl-C; a run has saved
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code."""
    prepare_process()
    given = list(sys.argv[1:] if arguments is None else arguments)
    split = next((i for i, argument in enumerate(given) if not argument.startswith("-")), len(given))
    parser = _parser()
    if completion.VARIABLE in os.environ and arguments is None:
        completion.complete(parser, COMMANDS)
        return Exit.OK
    options = parser.parse_args(given[:split])
    try:
        code = _run(parser, options, given[split:])
        sys.stdout.flush()  # Without this, a closed pipe is noticed only while Python shuts down.
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
    except BrokenPipeError:  # The reader has closed the pipe (`| head`): discard what is still buffered.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.OK
    except (UnicodeEncodeError, OSError) as error:
        mistake = beyond_environment(error)
        if mistake is None or options.debug:
            raise
        print_error(str(mistake))
        return Exit.USER_ERROR


def _parser() -> argparse.ArgumentParser:
    """The options before the command's name."""
    parser = argparse.ArgumentParser(
        prog="rlinf",
        usage="rlinf [-h] [--debug] [--version] COMMAND ...",
        description="Fine-tune robot and text policies with supervision.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this help, or after a command its help")
    parser.add_argument("--debug", action="store_true", help="also show the traceback of user errors")
    parser.add_argument("--version", action="store_true", help="show the version")
    return parser


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace, rest: Sequence[str]) -> int:
    if options.help or not (rest or options.version):
        parser.epilog = f"{_list_commands()}\n\n{EXIT_CODES}"
        parser.print_help()
        return Exit.OK
    if options.version:
        from importlib import metadata  # Imported here: the command also runs from a source tree without metadata.

        print(f"rlinf-core {metadata.version('rlinf-core')}")
        return Exit.OK
    command, module = _find(*rest)
    commands_parser = argparse.ArgumentParser(
        prog=f"rlinf {command.name}",
        description=command.help[:1].upper() + command.help[1:] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(commands_parser)
    parsed = _parse(commands_parser, rest[1:])
    if command not in COMMANDS:
        from rlinf_core.plugins.registry import get_plugins

        parsed.plugins = get_plugins()
    try:
        code = module.run(parsed)
    except SystemExit as error:
        if command in COMMANDS and not error.code:  # Of code that the command called: it has not done its work.
            raise RuntimeError("the command's code called sys.exit instead of raising an error") from error
        raise
    return Exit.OK if code is None else int(code)


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse; options may come between `key=value`s unless the command has subcommands or takes the rest verbatim."""
    try:
        return parser.parse_intermixed_args(arguments)
    except TypeError:
        return parser.parse_args(arguments)


def _find(name: str, *arguments: str) -> tuple[Command, Any]:
    """The command with this name, and its module; `arguments` follow the name on the command line."""
    for command in COMMANDS:
        if command.name == name:
            return command, import_module(command.module)
    from rlinf_core.plugins.registry import get_plugins

    plugins = get_plugins()
    known = sorted({*(command.name for command in COMMANDS), *(one.name for one in plugins.commands())})
    if name not in known:
        hint = _how_to_train(arguments) if name in TRAIN else did_you_mean(name, known)
        lines = [f"unknown command {name!r}{hint}", f"available: {', '.join(known)}"]
        lines += [f"failed: {failure}" for failure in plugins.failures]
        lines += [f"disabled by RLINF_DISABLE_PLUGINS: {distribution}" for distribution in plugins.blocked]
        raise UserError("\n  ".join(lines))
    found = plugins.find("command", name)
    try:
        module = import_module(found.item.module)
    except (ImportError, SystemExit) as error:
        raise PluginError(
            f"the command {name!r} of {found.owner} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if missing := [part for part in ("add_arguments", "run") if not hasattr(module, part)]:
        raise PluginError(f"the command {name!r} of {found.owner}: {module.__name__} has no {' and no '.join(missing)}")
    return found.item, module


def _how_to_train(arguments: Sequence[str]) -> str:
    given = shlex.join(arguments) or "CONFIG"
    return (
        f": a run is started by `rlinf launch {given}`, or by hand and from schedulers by "
        f"`torchrun --standalone --nproc-per-node N -m rlinf_core.train {given}`"
    )


def _list_commands() -> str:
    """All commands, one line each, with the distribution of a plugin's command, and the plugins that failed."""
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
