"""`rlinf inspect`: a page that shows what a run's model will see."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

from rlinf_core.errors import Exit, UserError

EPILOG = """\
The page shows findings, the run's facts, episodes and tasks, and of each dataset a few training rows as the model gets
them: images before and after cropping, resizing and random changes, prompts as tokens, masks, the actions that are
trained within their episode; then how states and actions are distributed, recorded and normalised. It is one HTML file
that needs no network; pictures/ and plots/ beside it hold the same as PNGs.

Exit codes: 0, or 2 if something would end the run or a row cannot be shown; the page says what.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = EPILOG
    parser.add_argument("config", help="the run's TOML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings over the file: policy.augment=true")
    parser.add_argument("--output", metavar="DIR", help="folder of the page; else inspect/<runner.name>")
    parser.add_argument(
        "--at",
        action="append",
        default=[],
        type=_place,
        metavar="[SOURCE:]EPISODE:FRAME",
        help="a training row to show instead of chosen ones; may be repeated",
    )


def _place(text: str) -> tuple[str, int, int]:
    match = re.fullmatch(r"(?:(.+):)?(\d+):(\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not EPISODE:FRAME (in a mixture SOURCE:EPISODE:FRAME)")
    return match[1] or "", int(match[2]), int(match[3])


def run(options: argparse.Namespace) -> int:
    """Look, write the page, and say where it is."""
    from rlinf_core.commands.output import print_error, print_text
    from rlinf_core.config.load import load_config
    from rlinf_core.inspect.page import check_folder, check_libraries, render, write
    from rlinf_core.plugins.registry import get_plugins

    check_libraries()
    plugins = get_plugins()
    config = load_config(options.config, options.overrides, plugins)
    folder = Path(options.output) if options.output else Path("inspect") / config.runner.name
    check_folder(folder)
    for name, _, _ in options.at:
        config.source(name)
    from rlinf_core.inspect.gather import gather

    view = gather(config, plugins, options.at)
    if not any(len(source.lengths) for source in view.sources):
        raise UserError(view.report.refusal(options.config))
    given = shlex.join([options.config, *options.overrides])
    page = write(folder, *render(view, given))
    for warning in view.warnings:
        print_text(f"warning: {warning}")
    for error in view.errors:
        print_error(error)
    print_text(f"{page}: written")
    return Exit.USER_ERROR if view.errors else Exit.OK
