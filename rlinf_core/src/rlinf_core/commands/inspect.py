"""`rlinf inspect`: write a page that shows what a run's model will see."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

from rlinf_core.errors import Exit, UserError

EPILOG = """\
The page shows findings, facts about the run, episodes and tasks, and for each dataset a few training rows as the model
gets them: images before and after cropping, resizing and augmentation, prompts as tokens, masks, and the trained
actions within their episode; then the distributions of states and actions, recorded and normalised. It is one HTML file
that needs no network; pictures/ and plots/ beside it hold the same images and plots as PNGs.

Exit codes: 0, or 2 if something would end the run or a row cannot be shown; the page gives the reason.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = EPILOG
    parser.add_argument("config", help="the run's TOML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that override the file: policy.augment=true"
    )
    parser.add_argument("--output", metavar="DIR", help="folder of the page; default: inspect/<runner.name>")
    parser.add_argument(
        "--at",
        action="append",
        default=[],
        type=_row,
        metavar="[SOURCE:]EPISODE:FRAME",
        help="a training row to show instead of the default selection; may be repeated",
    )


def _row(text: str) -> tuple[str, int, int]:
    match = re.fullmatch(r"(?:(.+):)?(\d+):(\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not EPISODE:FRAME (in a mixture SOURCE:EPISODE:FRAME)")
    return match[1] or "", int(match[2]), int(match[3])


def run(options: argparse.Namespace) -> int:
    """Inspect the run, write the page, and print its path."""
    from rlinf_core.commands.output import print_error, print_text
    from rlinf_core.config.load import load_config
    from rlinf_core.inspect.page import check_folder, render, write
    from rlinf_core.pages.one_file import check_libraries
    from rlinf_core.plugins.registry import get_plugins
    from rlinf_core.terminal import print_phase

    check_libraries("rlinf inspect", "matplotlib", "jinja2")
    print_phase("loading plugins and the config")
    plugins = get_plugins()
    config = load_config(options.config, options.overrides, plugins)
    folder = Path(options.output) if options.output else Path("inspect") / config.runner.name
    check_folder(folder)
    for name, _, _ in options.at:
        config.source(name)
    from rlinf_core.inspect.views import inspect_run

    view = inspect_run(config, plugins, options.at)
    if not any(len(source.lengths) for source in view.sources):
        raise UserError(view.report.refusal(options.config))
    given = shlex.join([options.config, *options.overrides])
    print_phase("drawing the page")
    page = write(folder, *render(view, given))
    for warning in view.warnings:
        print_text(f"warning: {warning}")
    for error in view.errors:
        print_error(error)
    print_text(f"{page}: written")
    return Exit.USER_ERROR if view.errors else Exit.OK
