"""`rlinf eval`: measure the error of a policy's actions on recorded episodes, or its success in a simulator."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlinf_core.commands.eval_sampling import compare_sampling
from rlinf_core.commands.eval_served import add_server_arguments, check_policy_given, served
from rlinf_core.commands.eval_simulator import add_simulator_arguments, check_no_simulator, play_episodes
from rlinf_core.commands.evaluated import add_policy_arguments, load_evaluated
from rlinf_core.commands.output import print_json, print_table, print_text
from rlinf_core.errors import UserError

if TYPE_CHECKING:
    from rlinf_core.contract.datasets import SampleSource, Split
    from rlinf_core.inference import LoadedPolicy
    from rlinf_core.offline_eval import Judged, Served
    from rlinf_core.plugins.registry import Plugins

EPILOG = """\
The policy samples a chunk of actions for each row. The error is that of the decoded actions, in the data's units, over
the steps within the episode, beside two baselines that ignore the observation: always the mean action, and repeating
the last action. Intervals are 95 %, from resampling whole episodes. With the same rows and seed, the mean squared error
is the run's val_action_mse.

With --env, the policy acts in a simulator instead, and the result is how often it succeeds, with 95 % Wilson intervals,
beside the idle action, random actions and, if there is a dataset, demonstrations that are replayed blindly. Finished
episodes are kept: the same command continues after an interruption.

A run's results are also written to <run>/evaluations/offline, where `rlinf report` finds them. Exit codes: 0; 2 for
something the user can fix.
"""
OFFLINE = "offline"
"""Name of the evaluator in a run's folder."""
MOST_LISTED = 12
"""Tasks, episodes and steps of the chunk that are printed; --json and the files have all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = EPILOG
    parser.add_argument("--dataset", metavar="DATASET", help="another dataset of the same format: a folder or a hub id")
    parser.add_argument(
        "--split", choices=["validation", "train"], help="episodes of the run's own dataset; default: validation"
    )
    parser.add_argument(
        "--episodes",
        type=_episodes,
        default=(),
        metavar="0,3-5",
        help="use these episodes only; with --env: how many per task, default: 20",
    )
    parser.add_argument("--samples", type=_count, default=512, help="rows to use, evenly spread; 0: all; default: 512")
    add_policy_arguments(parser, may_be_served=True)
    add_server_arguments(parser)
    parser.add_argument(
        "--sampling", metavar="fp32:10,bf16:5", help="compare dtypes and numbers of denoising steps: errors and times"
    )
    parser.add_argument("--num-steps", type=_positive, metavar="N", help="denoising steps; default: as in training")
    parser.add_argument("--batch-size", type=_positive, default=16, metavar="N", help="rows per batch; default: 16")
    parser.add_argument("--seed", type=_count, help="of the noise; default: the run's, 42 for an exported folder")
    parser.add_argument("--output", metavar="FILE", help="write the results to this file, as JSON")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_simulator_arguments(parser)


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def _positive(text: str) -> int:
    if not (number := _count(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def _episodes(text: str) -> tuple[int, ...]:
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise argparse.ArgumentTypeError(f"{part!r} is not an episode or a range of episodes such as 3-5")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(dict.fromkeys(found))


def run(options: argparse.Namespace) -> None:
    """Evaluate, print the tables, and write the files."""
    check_policy_given(options)
    if options.env:
        play_episodes(options)
        return
    check_no_simulator(options)
    from rlinf_core.files import check_writable
    from rlinf_core.plugins.registry import get_plugins
    from rlinf_core.terminal import print_phase, print_progress

    if options.dataset and options.split:
        raise UserError("--split is of the run's own dataset: leave it out with --dataset, of which all episodes count")
    if options.output:
        check_writable(Path(options.output), "Name another file with --output", file=True)
    plugins = get_plugins()
    if options.sampling:
        compare_sampling(options, plugins, lambda policy: _open(options, policy, plugins)[0])
        return
    print_phase(f"connecting to {options.server}" if options.server else f"loading {options.policy}")
    from rlinf_core.offline_eval import judge  # Loads torch, which takes seconds.

    with ExitStack() as ending:
        policy, facts = _open_policy(options, plugins, ending)
        print_phase("opening the data")
        rows, mean_from = _open(options, policy, plugins)
        progress = ending.enter_context(print_progress("evaluating", "rows"))
        judged = judge(
            policy,
            rows,
            mean_from,
            samples=options.samples,
            batch_size=options.batch_size,
            seed=facts["seed"],
            episodes=options.episodes,
            progress=progress,
        )
    result = _result(options, facts, judged)
    written = list(_write(options, facts, judged, result))
    if options.json:
        print_json(result)
        return
    for note in facts["notes"]:
        print_text(note)
    _print(options, judged)
    for path in written:
        print_text(f"{path}: written")


def _open_policy(
    options: argparse.Namespace, plugins: Plugins, ending: ExitStack
) -> tuple[LoadedPolicy | Served, dict[str, Any]]:
    """The policy, here or on a server until `ending`, and facts about it."""
    if not options.server:
        return load_evaluated(options, plugins)
    from rlinf_core.offline_eval import Served

    remote, opened, facts = ending.enter_context(served(options, plugins))
    assert opened is not None  # `check_policy_given`
    return Served(remote, opened.config, opened.data, opened.pipeline), facts


def _open(
    options: argparse.Namespace, policy: LoadedPolicy | Served, plugins: Plugins
) -> tuple[SampleSource, SampleSource]:
    """The rows to evaluate, and those whose mean action is a baseline."""
    from rlinf_core.data.splits import open_rows_of
    from rlinf_core.offline_eval import other_dataset

    if options.dataset:
        rows = open_rows_of(other_dataset(policy.data, options.dataset), policy.config, plugins, "train")
        return rows, rows
    split: Split = options.split or "validation"
    if split == "validation" and not policy.data.has_validation:
        raise UserError(
            f"the run held out no episodes of {policy.data.repo_id or policy.data.config_name}: name a dataset that it "
            "was not trained on with --dataset, or evaluate training episodes with --split train"
        )
    rows = open_rows_of(policy.data, policy.config, plugins, split)
    return rows, rows if split == "train" else open_rows_of(policy.data, policy.config, plugins, "train")


def _result(options: argparse.Namespace, facts: Mapping[str, Any], judged: Judged) -> dict[str, Any]:
    """What --json prints."""
    tables = {name: json.loads(table.to_json()) for name, table in judged.tables.items()}
    return {
        "policy": options.policy,
        "step": facts["step"],
        "weights": "ema" if facts["ema"] else "live",
        "dataset": options.dataset,
        "split": None if options.dataset else options.split or "validation",
        "source": options.source,
        "rows": judged.errors.rows,
        "episodes": len(judged.episodes),
        "seed": facts["seed"],
        "errors": json.loads(judged.errors.to_json()),
        "tables": tables,
    }


def _write(
    options: argparse.Namespace, facts: Mapping[str, Any], judged: Judged, result: Mapping[str, Any]
) -> Iterator[Path]:
    """Write --output, and the files in the run's folder; yields what was written."""
    from rlinf_core.files import write_bytes, write_text, writing
    from rlinf_core.results import ACTIONS, EMA, FOLDER, TABLE

    if options.output:
        path = Path(options.output)
        with writing(path, "Name another file with --output"):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(result) + "\n")
        yield path
    if facts["run"] is None:
        return
    step = f"{EMA * facts['ema']}step_{facts['step']:09d}"
    folder = facts["run"] / FOLDER / OFFLINE / step / _slug(options)
    files = {f"{name}{TABLE}": table.to_json() for name, table in judged.tables.items()}
    files |= {f"actions{ACTIONS}": judged.errors.to_json(), "result.json": json.dumps(result).encode() + b"\n"}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_bytes(folder / name, content)
    except OSError as error:  # The run may be somebody else's.
        print_text(f"warning: {folder} cannot be written: {error}")
        return
    yield folder


def _slug(options: argparse.Namespace) -> str:
    """A folder's name for what was evaluated."""
    of = options.dataset or options.split or "validation"
    return re.sub(r"[^\w.-]+", "_", f"{options.source}_{of}".strip("_/")).strip(".") or "data"


def _print(options: argparse.Namespace, judged: Judged) -> None:
    from rlinf_core.results import cell_text

    print_text(f"{judged.errors.rows} rows of {len(judged.episodes)} episodes")
    for table in judged.tables.values():
        shown = table.rows[:MOST_LISTED]
        print_text(f"\n{table.title}")
        print_table(table.columns, [[cell_text(cell) for cell in row] for row in shown])
        if len(table.rows) > len(shown):
            print_text(f"and {len(table.rows) - len(shown)} more")
    notes: Sequence[str] = list(dict.fromkeys(table.note for table in judged.tables.values() if table.note))
    for note in notes:
        print_text(note)
