"""`rlinf eval --sampling`: what other dtypes and fewer denoising steps change, on recorded rows."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlinf_core.commands.evaluated import load_evaluated
from rlinf_core.commands.output import print_json, print_table, print_text
from rlinf_core.errors import UserError

if TYPE_CHECKING:
    from rlinf_core.contract.datasets import SampleSource
    from rlinf_core.inference import LoadedPolicy
    from rlinf_core.plugins.registry import Plugins

NOT_HERE = {"dtype": "fp32", "num_steps": None, "server": None, "batch_size": 16}
"""Options that this comparison has no use for, and their defaults."""
Opener = Callable[["LoadedPolicy"], "SampleSource"]


def compare_sampling(options: argparse.Namespace, plugins: Plugins, open_rows: Opener) -> None:
    """Load the policy once for each dtype, compute each way, and print the table.

    Args:
        options: Of the command.
        plugins: All.
        open_rows: The rows that the options choose, for a policy.
    """
    from rlinf_core.offline_eval import choose_rows
    from rlinf_core.results import cell_text
    from rlinf_core.sampling import Sampler
    from rlinf_core.sampling_costs import Computed, compute_way, costs_table, parse_ways
    from rlinf_core.terminal import print_phase, print_progress

    ways = parse_ways(options.sampling)
    for name, default in NOT_HERE.items():
        if getattr(options, name) != default:
            raise UserError(f"--{name.replace('_', '-')}: leave it out with --sampling, which names dtypes and steps")
    computed: dict[str, Computed] = {}
    for dtype in dict.fromkeys(way.dtype for way in ways):
        print_phase(f"loading {options.policy} in {dtype}")
        policy, facts = load_evaluated(argparse.Namespace(**{**vars(options), "dtype": dtype}), plugins)
        rows = open_rows(policy)
        chosen = choose_rows(rows.episodes, options.samples, options.episodes).tolist()
        for way in (one for one in ways if one.dtype == dtype):
            policy.sample = Sampler(policy.config, policy.module, steps=way.steps)
            with print_progress(way.name, "rows") as progress:
                computed[way.name] = compute_way(way, policy, rows, chosen, facts["seed"], progress)
    table = costs_table([computed[way.name] for way in ways])
    result: dict[str, Any] = {"policy": options.policy, "seed": facts["seed"], "table": json.loads(table.to_json())}
    if options.output:
        from rlinf_core.files import write_text

        write_text(Path(options.output), json.dumps(result) + "\n")
    if options.json:
        print_json(result)
        return
    print_table(table.columns, [[cell_text(cell) for cell in row] for row in table.rows])
    print_text(table.note)
