"""`rlinf plan`: what a run will take, before it starts."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rlinf_core.commands.output import print_json, print_table

if TYPE_CHECKING:
    from rlinf_core.plan.advice import Change
    from rlinf_core.plan.step import Plan

CARDS = (24, 48, 80)
"""GB; those of the table."""
SHOWN = ("H100", "A100", "RTX 4090")
"""Cards whose speed is predicted; --json has all."""
EPILOG = """\
Nothing is computed: the policy's own code runs without numbers, on a CPU, and is counted. No weights are loaded and the
hub is not asked: where the data are not at hand, samples are taken to be as long as the policy allows, which is said.
Memory is that of eager training on CUDA with fused attention; GB are 10⁹ bytes. MFU is the share of a card's dense
bfloat16 peak that useful operations get: no padding, nothing that is computed again to save memory.

--json prints an object with the same and more, in bytes, operations and samples. Exit codes: 0, also where the run does
not fit; 2 for something to mend.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = EPILOG
    parser.add_argument("config", help="the run's TOML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings over the file: trainer.micro_batch_size=8"
    )
    parser.add_argument("--gpu-memory", type=_positive, default=80.0, metavar="GB", help="of each GPU; default: 80")
    parser.add_argument("--mfu", type=_share, default=0.4, help="to predict samples/s with; default: 0.4")
    parser.add_argument("--ranks", type=_count, help="processes of the run, where [cluster] does not say how many")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def _positive(text: str) -> float:
    try:
        if (number := float(text)) > 0:
            return number
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")


def _share(text: str) -> float:
    if (number := _positive(text)) <= 1:
        return number
    raise argparse.ArgumentTypeError(f"{text!r} is no share: above 0, at most 1")


def _count(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of processes")
    return int(text)


def run(options: argparse.Namespace) -> None:
    """Work it out and print it."""
    from rlinf_core.config.load import load_config
    from rlinf_core.plugins.registry import get_plugins

    plugins = get_plugins()
    config = load_config(options.config, options.overrides, plugins)
    from rlinf_core.plan.advice import advise  # Takes seconds, with torch: a mistake in the config is told first.
    from rlinf_core.plan.step import plan

    made = plan(config, plugins, options.ranks)
    changes = advise(made, plugins, options.gpu_memory)
    if options.json:
        print_json(_object(made, changes, options))
    else:
        _print(made, changes, options)


def _cards(options: argparse.Namespace) -> list[float]:
    return sorted({*map(float, CARDS), options.gpu_memory})


def _speeds(made: Plan, mfu: float) -> dict[str, float]:
    """Samples/s of all ranks together, by card."""
    from rlinf_core.costs.gpus import PEAKS

    return {card: made.ranks * mfu * peak * 1e12 / made.flops_per_sample for card, peak in PEAKS.items()}


def _object(made: Plan, changes: list[Change], options: argparse.Namespace) -> dict[str, Any]:
    peak = made.memory()
    return {
        "config": options.config,
        "ranks": made.ranks,
        "micro_batch_size": made.trainer.micro_batch_size,
        "micro_batches_a_step": made.share // made.trainer.micro_batch_size,
        "data": list(made.data),
        "assumptions": list(made.assumptions),
        "parameters": asdict(made.parameters),
        "states_bytes": asdict(made.states) | {"total": made.states.total},
        "peak_bytes": asdict(peak) | {"total": peak.total},
        "fits": {f"{card:g}": made.largest_micro_batch(card) for card in _cards(options)},
        "gpu_memory": options.gpu_memory,
        "changes": [asdict(change) for change in changes],
        "flops_per_sample": made.flops_per_sample,
        "flops_from": made.flops_from,
        "computed_flops_per_sample": made.computed_per_sample,
        "mfu": options.mfu,
        "samples_per_second": _speeds(made, options.mfu),
        "bytes_received_a_step": asdict(made.traffic) | {"total": made.traffic.total},
    }


def _print(made: Plan, changes: list[Change], options: argparse.Namespace) -> None:
    trainer = made.trainer
    size, together = trainer.micro_batch_size, made.share // trainer.micro_batch_size
    print_table(["plan", options.config], _facts(made, options))
    peak = made.memory()
    print(
        f"\nmemory of each rank with micro batch {size}, {_several(together, 'micro batch', 'micro batches')} a step:"
    )
    print_table(["", "kept", "at the peak of a step"], _memory_rows(made, peak))
    print()
    rows = []
    for card in _cards(options):
        fitting = made.largest_micro_batch(card)
        needs = made.memory(fitting or 1).total
        told = f"micro batch {fitting} of {made.share}" if fitting else "does not fit"
        rows.append([f"{card:g} GB", told, _size(needs)])
    print_table(["GPU of", "largest that fits", "takes"], rows)
    if changes:
        print(f"\nmicro batch {size} does not fit {options.gpu_memory:g} GB. What would:")
        print_table(
            ["change", "largest micro batch", "takes", "at the price of"],
            [[c.settings, str(c.micro_batch or "none"), _size(c.peak), c.costs] for c in changes],
        )
    for assumption in made.assumptions:
        print(f"assumed: {assumption}")


def _facts(made: Plan, options: argparse.Namespace) -> list[list[str]]:
    numbers, traffic = made.parameters, made.traffic
    speeds = _speeds(made, options.mfu)
    facts = {
        "parameters": f"{numbers.total:,}; {numbers.trainable:,} trained, {numbers.reached:,} reached by the loss",
        "ranks": str(made.ranks),
        "sizes from": "; ".join(made.data),
        "operations a sample": f"{_flops(made.flops_per_sample)} useful ({made.flops_from}); "
        f"{_flops(made.computed_per_sample)} computed for the longest",
        f"at {options.mfu:.0%} MFU": ", ".join(
            f"{speeds[card]:,.3g} samples/s on {card}"
            if speeds[card] < 1000
            else f"{speeds[card]:,.0f} samples/s on {card}"
            for card in SHOWN
        ),
        "received a step": f"{_size(traffic.total)} a rank: {_size(traffic.all_gather)} weights, "
        f"{_size(traffic.reduce_scatter)} gradients"
        + (f", {_size(traffic.all_reduce)} between replicas" if traffic.all_reduce else "")
        if traffic.total
        else "nothing: one rank",
    }
    return [[key, text] for key, text in facts.items()]


def _memory_rows(made: Plan, peak: Any) -> list[list[str]]:
    kept = asdict(made.states)
    rows = []
    for name in ("weights", "optimizer", "ema", "gradients", "gathered", "reducing", "activations"):
        text = {"ema": "EMA", "gathered": "weights gathered", "reducing": "gradients being reduced"}.get(name, name)
        rows.append([text, _size(kept[name]) if name in kept else "", _size(getattr(peak, name))])
    rows.append(["together", _size(made.states.total), _size(peak.total)])
    if peak.on_host:
        rows.append(["in the CPU's memory", "", _size(peak.on_host)])
    return rows


def _size(size: float) -> str:
    """Three digits that count: sizes are known no better."""
    unit, factor = ("GB", 1e9) if size >= 1e8 else ("MB", 1e6)
    return f"{size / factor:.3g} {unit}" if size else "-"


def _flops(number: float) -> str:
    unit, factor = ("TFLOP", 1e12) if number >= 1e11 else ("GFLOP", 1e9)
    return f"{number / factor:.4g} {unit}"


def _several(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
