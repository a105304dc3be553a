"""`rlinf validate`: validate everything about a run that can be known without starting it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rlinf_core.commands.output import print_json, print_table, print_text
from rlinf_core.errors import Exit, UserError

if TYPE_CHECKING:
    from rlinf_core.preflight import Report

JSON_KEYS = """\
Validates the config, the dataset with its columns and one sample, the batch sizes, the policy's files, and the run's
folder. Not covered: anything that needs a device, and whether images can be decoded.

--json prints an object: "ok", "config" (the file), "facts" (numbers and texts; unknown facts are left out), "findings"
(a list of texts, empty if ok) and "warnings" (a list of texts: what may spoil the run). Exit codes: 0 if ok, otherwise
2.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = JSON_KEYS
    parser.add_argument("config", help="the run's TOML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that override the file: runner.max_steps=100"
    )
    parser.add_argument("--ranks", type=_positive, help="number of processes, if [cluster] does not set it")
    parser.add_argument(
        "--allow-change", action="store_true", help="allow resuming although the config changes what the run computes"
    )
    parser.add_argument("--json", action="store_true", help="print facts and findings as one JSON object")


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of processes")
    return int(text)


def run(options: argparse.Namespace) -> int:
    """Validate the run, and print facts or findings."""
    try:
        report = _check(options)
    except UserError as error:
        if not options.json:
            raise
        print_json({"ok": False, "config": options.config, "facts": {}, "findings": [str(error)], "warnings": []})
        return Exit.USER_ERROR
    ok = not report.findings
    if options.json:
        found = {"facts": report.facts, "findings": report.findings, "warnings": report.warnings}
        print_json({"ok": ok, "config": options.config} | found)
        return Exit.OK if ok else Exit.USER_ERROR
    if not ok:
        raise UserError(report.refusal(options.config))
    rows = [[_words(name), str(value)] for name, value in report.facts.items()]
    count = len(report.warnings)
    print_table(["ok" + (f", {count} warning{'s' * (count > 1)}" if count else ""), options.config], rows)
    for warning in report.warnings:
        print_text(f"warning: {warning}")
    return Exit.OK


def _words(fact: str) -> str:
    """A fact's key as words; the source name before it is kept verbatim."""
    source, colon, key = fact.rpartition(": ")
    return source + colon + key.replace("_", " ")


def _check(options: argparse.Namespace) -> Report:
    from rlinf_core.config.load import load_config
    from rlinf_core.plugins.registry import get_plugins
    from rlinf_core.preflight import check_run
    from rlinf_core.terminal import print_phase

    print_phase("loading plugins and the config")
    plugins = get_plugins()
    run = load_config(options.config, options.overrides, plugins)
    print_phase("checking data, statistics and files")
    return check_run(run, plugins, options.ranks, allow_change=options.allow_change)
