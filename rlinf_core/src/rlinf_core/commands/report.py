"""`rlinf report`: write a page that shows how one or several runs went."""

from __future__ import annotations

import argparse
from pathlib import Path

from rlinf_core.commands.output import print_text

EPILOG = """\
The page shows curves, throughput, where the time of a step goes, errors of sampled actions per dimension and step of
the chunk, predicted beside recorded actions, tables and videos of evaluators, anomalies, config and environment; of
several runs beside one another, with the settings that differ. It is one HTML file that needs no network and runs no
script. A run may still be training.
"""
FILE = "report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = EPILOG
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, runs/<name>")
    parser.add_argument(
        "--output", metavar="FILE", help=f"the page; default: {FILE} in the run's folder, of several runs ./{FILE}"
    )


def run(options: argparse.Namespace) -> None:
    """Read the runs, write the page, and print its path."""
    from rlinf_core.pages.one_file import check_libraries
    from rlinf_core.report.page import PAGE, render
    from rlinf_core.report.runs import read_run
    from rlinf_core.terminal import print_phase

    check_libraries("rlinf report", "matplotlib", "jinja2")
    folders = [Path(name) for name in dict.fromkeys(options.runs)]
    default = folders[0] / FILE if len(folders) == 1 else Path(FILE)
    path = Path(options.output) if options.output else default
    print_phase("reading the metrics")
    runs = [read_run(folder) for folder in folders]
    PAGE.check_output(path)
    print_phase("drawing the page")
    PAGE.write(path, render(runs))
    print_text(f"{path}: written")
