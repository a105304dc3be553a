"""`rlinf plan`: predict a run's memory, speed and communication before it starts."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rlinf_core.commands import scaling_table
from rlinf_core.commands.output import positive_count, print_json, print_table, size_in_words

if TYPE_CHECKING:
    from rlinf_core.plan.advice import Change
    from rlinf_core.plan.step import Plan

GPU_MEMORIES = (24, 48, 80)
"""GB; the GPU sizes of the table."""
SHOWN = ("H100", "A100", "RTX 4090")
"""GPUs whose speed is printed; --json has all."""
EPILOG = """\
Nothing is trained: the policy's own code runs on a CPU on tensors without values, and its operations are counted. No
weights are loaded and the hub is not contacted. If the data are not available, the samples are assumed to have the
maximum length, and a line says so. Memory is for training on CUDA with fused attention and, unless trainer.compile is
false, compiled blocks; GB are 10⁹ bytes. MFU is useful operations as a fraction of a GPU's dense bfloat16 peak; padding
and recomputation are not useful operations.

--json prints one object with these and more numbers, in bytes, operations and samples. Exit codes: 0, even if the run
does not fit; 2 for something the user can fix.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = EPILOG
    parser.add_argument("config", help="the run's TOML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that override the file: trainer.micro_batch_size=8"
    )
    parser.add_argument("--gpu-memory", type=_positive, default=80.0, metavar="GB", help="of each GPU; default: 80")
    parser.add_argument("--mfu", type=_fraction, default=0.4, help="MFU to predict samples/s with; default: 0.4")
    parser.add_argument("--ranks", type=positive_count, help="number of processes, if [cluster] does not set it")
    scaling_table.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _positive(text: str) -> float:
    try:
        if (number := float(text)) > 0:
            return number
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")


def _fraction(text: str) -> float:
    if (number := _positive(text)) <= 1:
        return number
    raise argparse.ArgumentTypeError(f"{text!r} is not a fraction: above 0, at most 1")


def run(options: argparse.Namespace) -> None:
    """Compute the plan and print it."""
    from rlinf_core.config.load import load_config
    from rlinf_core.plugins.registry import get_plugins
    from rlinf_core.terminal import print_phase

    ranks = scaling_table.ranks(options) or options.ranks
    print_phase("loading plugins and the config")
    plugins = get_plugins()
    config = load_config(options.config, options.overrides, plugins)
    print_phase("loading torch and counting a step's operations and memory")
    from rlinf_core.plan.advice import advise  # Loads torch, which takes seconds: report config mistakes first.
    from rlinf_core.plan.step import placed_on, plan

    made = plan(placed_on(config, ranks, options.nodes) if ranks and options.nodes else config, plugins, ranks)
    changes = advise(made, plugins, options.gpu_memory)
    if options.json:
        print_json(_object(made, changes, options))
    else:
        _print(made, changes, options)


def _gpu_memories(options: argparse.Namespace) -> list[float]:
    return sorted({*map(float, GPU_MEMORIES), options.gpu_memory})


def _speeds(made: Plan, mfu: float) -> dict[str, float]:
    """Samples/s of all ranks together, by GPU."""
    from rlinf_core.costs.gpus import PEAKS

    return {gpu: made.ranks * mfu * peak * 1e12 / made.flops_per_sample for gpu, peak in PEAKS.items()}


def _object(made: Plan, changes: list[Change], options: argparse.Namespace) -> dict[str, Any]:
    peak = made.memory()
    return {
        "config": options.config,
        "ranks": made.ranks,
        "compiled": made.compiled,
        "micro_batch_size": made.trainer.micro_batch_size,
        "micro_batches_a_step": made.share // made.trainer.micro_batch_size,
        "data": list(made.data),
        "assumptions": list(made.assumptions),
        "parameters": asdict(made.parameters),
        "states_bytes": asdict(made.states) | {"total": made.states.total},
        "peak_bytes": asdict(peak) | {"total": peak.total},
        "fits": {f"{gb:g}": made.largest_micro_batch(gb) for gb in _gpu_memories(options)},
        "gpu_memory": options.gpu_memory,
        "changes": [asdict(change) for change in changes],
        "flops_per_sample": made.flops_per_sample,
        "flops_from": made.flops_from,
        "computed_flops_per_sample": made.computed_per_sample,
        "mfu": options.mfu,
        "samples_per_second": _speeds(made, options.mfu),
        "bytes_received_a_step": asdict(made.traffic) | {"total": made.traffic.total},
        **({"scaling": scaling_table.as_object(made, options)} if scaling_table.ranks(options) else {}),
    }


def _print(made: Plan, changes: list[Change], options: argparse.Namespace) -> None:
    trainer = made.trainer
    size, together = trainer.micro_batch_size, made.share // trainer.micro_batch_size
    print_table(["plan", options.config], _facts(made, options))
    peak = made.memory()
    print(f"\nmemory per rank, micro batch {size}, {_several(together, 'micro batch', 'micro batches')} per step:")
    print_table(["", "persistent", "at the peak of a step"], _memory_rows(made, peak))
    print()
    rows = []
    for gb in _gpu_memories(options):
        fitting = made.largest_micro_batch(gb)
        needs = made.memory(fitting or 1).total
        largest = f"micro batch {fitting} of {made.share}" if fitting else "does not fit"
        rows.append([f"{gb:g} GB", largest, size_in_words(needs)])
    print_table(["GPU memory", "largest that fits", "takes"], rows)
    if changes:
        print(f"\nmicro batch {size} does not fit {options.gpu_memory:g} GB. Options:")
        print_table(
            ["change", "largest micro batch", "takes", "cost"],
            [[c.settings, str(c.micro_batch or "none"), size_in_words(c.peak), c.costs] for c in changes],
        )
    if scaling_table.ranks(options):
        scaling_table.print_scaling(made, options)
    for assumption in made.assumptions:
        print(f"assumed: {assumption}")


def _facts(made: Plan, options: argparse.Namespace) -> list[list[str]]:
    numbers, traffic = made.parameters, made.traffic
    speeds = _speeds(made, options.mfu)
    facts = {
        "parameters": f"{numbers.total:,}; {numbers.trainable:,} trained, {numbers.reached:,} reached by the loss",
        "ranks": str(made.ranks),
        **_sharding(made),
        "compiled blocks": made.trainer.compile_fact if made.has_blocks else "no: the policy has none",
        "sizes from": "; ".join(made.data),
        "operations/sample": f"{_flops(made.flops_per_sample)} useful ({made.flops_from}); "
        f"{_flops(made.computed_per_sample)} executed for the longest",
        f"at {options.mfu:.0%} MFU": ", ".join(
            f"{speeds[gpu]:,.3g} samples/s on {gpu}" if speeds[gpu] < 1000 else f"{speeds[gpu]:,.0f} samples/s on {gpu}"
            for gpu in SHOWN
        ),
        "received per step": f"{size_in_words(traffic.total)} per rank: {size_in_words(traffic.all_gather)} weights, "
        f"{size_in_words(traffic.reduce_scatter)} gradients"
        + (f", {size_in_words(traffic.all_reduce)} between replicas" if traffic.all_reduce else "")
        if traffic.total
        else "nothing: one rank",
    }
    return [[key, text] for key, text in facts.items()]


def _sharding(made: Plan) -> dict[str, str]:
    """How the model is sharded over several machines, or over several copies."""
    machines = made.run.cluster.machines
    if machines == 1 and made.sharding.num_replicas == 1:
        return {}
    return {"sharding": made.trainer.describe_replicas(made.ranks, machines)}


def _memory_rows(made: Plan, peak: Any) -> list[list[str]]:
    persistent = asdict(made.states)
    rows = []
    for name in ("weights", "optimizer", "ema", "gradients", "gathered", "reducing", "activations"):
        text = {"ema": "EMA", "gathered": "gathered weights", "reducing": "gradients being reduced"}.get(name, name)
        kept = size_in_words(persistent[name]) if name in persistent else ""
        rows.append([text, kept, size_in_words(getattr(peak, name))])
    rows.append(["total", size_in_words(made.states.total), size_in_words(peak.total)])
    if peak.on_host:
        rows.append(["in CPU memory", "", size_in_words(peak.on_host)])
    return rows


def _flops(number: float) -> str:
    unit, factor = ("TFLOP", 1e12) if number >= 1e11 else ("GFLOP", 1e9)
    return f"{number / factor:.4g} {unit}"


def _several(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
