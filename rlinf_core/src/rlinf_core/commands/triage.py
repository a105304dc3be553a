"""`rlinf triage`: find out why a policy with a low loss does not act well."""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from rlinf_core.commands.eval_simulator import add_simulator_arguments, check_no_simulator, read_settings
from rlinf_core.commands.evaluated import add_policy_arguments, chosen_device
from rlinf_core.commands.output import print_json, print_text
from rlinf_core.commands.serve import KEY
from rlinf_core.errors import UserError

if TYPE_CHECKING:
    from rlinf_core.triage.chain import Finding
    from rlinf_core.triage.scene import Execution

EPILOG = """\
A chain of tests goes from the data over statistics and weights to the place where the policy acts, and ends with one
sentence that names the most likely cause. With the run or the exported folder alone, it compares what is stored, and
the policy's actions with its own data. --dataset names rows that were recorded where the policy acts, in the format of
the training data: their images, states, actions, timing and prompts are compared with training under every known
mistake (flips, channel order, swapped cameras, units, signs, orders of numbers, rotations, grippers, rates, lags).

Exit codes: 0 with or without a cause; 2 for something the user can fix. docs/triage.md explains the tests.
"""
FILE = "triage.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = EPILOG
    add_policy_arguments(parser)
    parser.add_argument(
        "--dataset", default="", metavar="DATASET", help="rows from where the policy acts: a folder or a hub id"
    )
    parser.add_argument(
        "--run", metavar="RUN", help="of an exported folder: the run it is from; default: runs/<name>, if it is there"
    )
    parser.add_argument(
        "--execute-steps",
        type=_positive,
        metavar="N",
        help="actions of a chunk that the robot executes before replanning",
    )
    parser.add_argument("--rate", type=_rate, metavar="HZ", help="actions per second of the robot")
    parser.add_argument(
        "--episodes",
        type=_positive,
        metavar="N",
        help="with --env: episodes per task that the policy plays; default: none",
    )
    parser.add_argument(
        "--minutes", type=_positive, metavar="N", help="with --episodes: how long the policy plays at most; default: 10"
    )
    parser.add_argument(
        "--server",
        default="",
        metavar="ADDRESS",
        help=f"ws://host:port of `rlinf serve` or openpi: does it act as the policy does? Its key, if any: ${KEY}",
    )
    parser.set_defaults(seed=None)
    add_simulator_arguments(parser)
    parser.add_argument("--output", metavar="FILE", help=f"write the page; default: {FILE} in the policy's folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object, and write no page without --output")


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of actions per second above 0")
    return rate


def run(options: argparse.Namespace) -> None:
    """Run the tests, print a line for each, write the page, and end with the sentence."""
    from rlinf_core.pages.one_file import check_libraries
    from rlinf_core.plugins.registry import get_plugins
    from rlinf_core.terminal import print_phase
    from rlinf_core.triage.page import PAGE, page_of

    path = _page(options)
    options.episodes = (options.episodes,) if options.episodes else ()  # As `rlinf eval` has them.
    if not options.env:
        check_no_simulator(options)
        if options.episodes:
            raise UserError("--episodes is for a simulator: add --env NAME")
    if options.minutes and not options.episodes:
        raise UserError("--minutes is for episodes that the policy plays: add --episodes N")
    if path is not None:
        check_libraries("the page of rlinf triage, which --json leaves out,", "jinja2")
        PAGE.check_output(path)
    plugins = get_plugins()
    print_phase(f"loading {options.policy}")
    from rlinf_core.export import Choice  # Loads torch, which takes seconds.
    from rlinf_core.triage.chain import run_tests
    from rlinf_core.triage.opening import open_scene
    from rlinf_core.triage.scene import MINUTES

    simulator = None
    if options.env:
        plugins.environment(options.env)
        simulator, _ = read_settings(options, plugins)
        simulator.chosen_tasks()
    scene = open_scene(
        Path(options.policy),
        plugins=plugins,
        dataset=options.dataset,
        run=Path(options.run) if options.run else None,
        choice=Choice(options.step, options.best, options.ema),
        source=options.source,
        execution=_execution(options),
        simulator=simulator,
        closed_loop=bool(options.episodes),
        minutes=options.minutes or MINUTES,
        server=options.server,
        api_key=os.environ.get(KEY, "") if options.server else "",
        device=chosen_device(options),
        dtype=options.dtype,
    )
    if not options.json:
        for note in scene.subject.notes:
            print_text(note)
    with scene.server or nullcontext():
        triage = run_tests(scene, plugins, report=(lambda one: None) if options.json else _print)
    if path is not None:
        PAGE.write(path, page_of(scene.subject.folder, options.dataset, triage))
    if options.json:
        print_json({"policy": options.policy, "dataset": options.dataset, **triage.to_json()})
        return
    if path is not None:
        print_text(f"{path}: written")
    print_text(f"\n{triage.sentence}")


def _execution(options: argparse.Namespace) -> Execution | None:
    from rlinf_core.triage.scene import Execution

    return Execution(options.execute_steps, options.rate) if options.execute_steps or options.rate else None


def _page(options: argparse.Namespace) -> Path | None:
    if options.output:
        return Path(options.output)
    folder = Path(options.policy)
    if options.json:
        return None
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: name a run's folder, runs/<name>, or an exported one")
    return folder / FILE


def _print(finding: Finding) -> None:
    outcome = finding.outcome
    print_text(f"{finding.test.name:<11} {outcome.verdict:<10} {outcome.sentence}")
