"""`rlinf rehearse`: a run's construction and two steps on as many ranks as it will have, without a GPU."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rlinf_core.commands.output import positive_count, print_json, print_table, size_in_words

if TYPE_CHECKING:
    from rlinf_core.rehearsal.collectives import Collective
    from rlinf_core.rehearsal.compare import Rehearsal

LISTED = 5
"""Most parameters that are listed."""
EPILOG = """\
The trainer's own code builds the policy, shards it, builds optimizer and moving average, and computes two steps: on
tensors that have shapes, dtypes and devices but no values, in a process group of N x M ranks of which only the first,
the middle and the last are there, one after the other. No GPU, weights or data are needed; if the data are on this
machine, sizes are those of the data. Blocks run eagerly, as without torch.compile.

--json prints one object. Exit codes: 0; 2 if the run fails in its rehearsal, or if ranks would wait for each other
because they call different collectives.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = EPILOG
    parser.add_argument("config", help="the run's TOML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that override the file: trainer.num_replicas=8"
    )
    parser.add_argument("--nodes", type=positive_count, default=1, metavar="N", help="machines; default: 1")
    parser.add_argument("--gpus", type=positive_count, required=True, metavar="M", help="GPUs of each machine")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> None:
    """Rehearse and print what was found."""
    from rlinf_core.config.load import load_config
    from rlinf_core.plugins.registry import get_plugins
    from rlinf_core.terminal import print_phase

    print_phase("loading plugins and the config")
    plugins = get_plugins()
    config = load_config(options.config, options.overrides, plugins)
    ranks = options.nodes * options.gpus
    print_phase(f"loading torch and rehearsing two steps of {ranks} ranks")
    from rlinf_core.plan.step import placed_on
    from rlinf_core.rehearsal.compare import check, rehearse

    found = rehearse(placed_on(config, ranks, options.nodes), plugins, ranks)
    if options.json:
        print_json(_object(found, options))
    else:
        _print(found, options)
    check(found)


def _object(found: Rehearsal, options: argparse.Namespace) -> dict[str, Any]:
    rank = found.measured
    return {
        "config": options.config,
        "nodes": options.nodes,
        "gpus": options.gpus,
        "ranks": [one.rank for one in found.ranks],
        "num_replicas": found.plan.sharding.num_replicas,
        "collectives_a_step": [len(step) for step in rank.steps],
        "difference": str(found.difference) if found.difference else None,
        "bytes_received_a_step": asdict(found.traffic),
        "bytes_planned_a_step": asdict(found.plan.traffic),
        "bytes_over_formula": found.bytes_over_formula,
        "other_bytes_a_step": dict(found.other_bytes),
        "peak_bytes": rank.peak_bytes,
        "planned_peak_bytes": found.predicted.total,
        "memory_over_plan": found.memory_over_plan,
        "persistent_bytes": rank.persistent_bytes,
        "planned_persistent_bytes": found.planned_persistent,
        "uneven": [asdict(one) | {"ranks_without": one.without} for one in found.uneven],
        "host_waits": dict(rank.waits),
        "data": list(found.plan.data),
        "notes": list(found.notes),
        "assumptions": list(found.plan.assumptions),
    }


def _print(found: Rehearsal, options: argparse.Namespace) -> None:
    print_table(["rehearsal", options.config], [[key, text] for key, text in _facts(found, options).items()])
    print()
    print_table(["a step exchanges", "of", "number", "message size", "received per rank", "plan"], _exchanges(found))
    print()
    print_table(["memory of rank 0", "rehearsed", "plan", "rehearsed / plan"], _memory(found))
    if found.uneven:
        shards = found.plan.sharding.shards
        print(f"\nparameters whose rows {shards} shards do not divide: {len(found.uneven)}")
        rows = [
            [one.name, str(one.rows), f"{one.padding:,}", f"{one.without} of {shards}"] for one in found.uneven[:LISTED]
        ]
        print_table(["most padding", "rows", "padding, numbers", "ranks without a row"], rows)
    for note in found.notes:
        print(f"rehearsed: {note}")
    for assumption in found.plan.assumptions:
        print(f"assumed: {assumption}")


def _facts(found: Rehearsal, options: argparse.Namespace) -> dict[str, str]:
    made, sharding = found.plan, found.plan.sharding
    numbers = ", ".join(str(one.rank) for one in found.ranks)
    copies = f"{sharding.num_replicas} copies, each over {sharding.shards}" if sharding.num_replicas > 1 else "one copy"
    waits = ", ".join(f"{line} ({count} x)" for line, count in sorted(found.measured.waits.items()))
    return {
        "ranks": f"{made.ranks}: {options.nodes} x {options.gpus}; rehearsed {numbers}; {copies}",
        "sizes from": "; ".join(made.data),
        "micro batches": f"{made.share // made.trainer.micro_batch_size} of {made.trainer.micro_batch_size} per step",
        "order": str(found.difference or f"the same {len(found.measured.collectives)} collectives on these ranks"),
        "host waits": waits or "nowhere in a step",
    }


PAYLOADS = {"all_gather": "weights", "reduce_scatter": "gradients", "all_reduce": "gradients of the copies"}


def _exchanges(found: Rehearsal) -> list[list[str]]:
    from rlinf_core.rehearsal.compare import field_of

    step = found.measured.steps[-1]
    planned, counted = asdict(found.plan.traffic), asdict(found.traffic)
    groups: dict[tuple[str, str], list[Collective]] = {}
    for one in step:
        name = field_of(one)
        groups.setdefault((one.kind, PAYLOADS[name] if name else one.where), []).append(one)
    rows: list[list[str]] = []
    for (kind, what), ones in groups.items():
        name = field_of(ones[0])
        received = counted[name] if name else sum(one.received for one in ones)
        plan = f"{received / planned[name]:.4f} of it" if name and planned[name] else "-"
        least, most = min(one.nbytes for one in ones), max(one.nbytes for one in ones)
        sizes = size_in_words(most) if least == most else f"{size_in_words(least)} to {size_in_words(most)}"
        rows.append([kind, what, str(len(ones)), sizes, size_in_words(received), plan])
    return rows


def _memory(found: Rehearsal) -> list[list[str]]:
    rank, planned = found.measured, found.planned_persistent
    return [
        [what, size_in_words(mine), size_in_words(its), f"{mine / its:.3f}" if its else "-"]
        for what, mine, its in (
            ("between steps", rank.persistent_bytes, planned),
            ("at the peak of a step", rank.peak_bytes, found.predicted.total),
        )
    ]
