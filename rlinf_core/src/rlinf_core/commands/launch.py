"""`rlinf launch`: validate the config, then start the run's processes as `[cluster]` says."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlinf_core.errors import UserError

if TYPE_CHECKING:
    from rlinf_core.contract.run import RunConfig
    from rlinf_core.plugins.registry import Plugins


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options, the same as those of `rlinf_core.train`."""
    parser.add_argument("config", help="the run's TOML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that override the file: runner.max_steps=100"
    )
    parser.add_argument("--overwrite", action="store_true", help="remove the run of the same name and start over")
    parser.add_argument(
        "--allow-change", action="store_true", help="resume a run although its config or its images have changed"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="start nothing: print torchrun's command for this machine, or the launcher's batch file",
    )
    parser.add_argument(
        "--debug", action="store_true", help="also show the traceback of user errors, in the run's processes"
    )


def run(options: argparse.Namespace) -> int:
    """Launch the run. Returns its exit code."""
    from rlinf_core.config.load import load_config
    from rlinf_core.plugins.registry import get_plugins
    from rlinf_core.preflight import nobody_launches
    from rlinf_core.process.start import quiet_torch
    from rlinf_core.terminal import print_phase
    from rlinf_core.training.resume import Flags, decide_start, say_finished
    from rlinf_core.training.run_folder import read_folder

    print_phase("loading plugins and the config")
    with quiet_torch("FATAL"):  # A plugin may import it.
        plugins = get_plugins()
        config = load_config(options.config, options.overrides, plugins)
    arguments = [options.config, *options.overrides, *["--overwrite"] * options.overwrite]
    arguments += ["--allow-change"] * options.allow_change + ["--debug"] * options.debug
    if options.dry_run:
        return _describe(config, arguments, plugins)
    plugins.hook.rlinf_configure(run=config)
    if not options.overwrite:
        start = decide_start(config, read_folder(config), Flags(allow_change=options.allow_change))
        if start.finished:
            print(say_finished(config, start))
            return 0
    print_phase(f"starting processes with {config.cluster.launcher}")
    code: int | None = plugins.hook.rlinf_launch(run=config, arguments=arguments)
    if code is None:
        raise nobody_launches(config, plugins)
    return code


def _describe(config: RunConfig, arguments: Sequence[str], plugins: Plugins) -> int:
    from rlinf_core.preflight import check_launcher

    check_launcher(config, plugins)
    text: str | None = plugins.hook.rlinf_describe_launch(run=config, arguments=arguments)
    if text is None:
        raise UserError(
            f"the launcher {config.cluster.launcher!r} does not describe what it starts (hook rlinf_describe_launch): "
            'launch without --dry-run, or set cluster.launcher = "torchrun"'
        )
    print(text)
    return 0
