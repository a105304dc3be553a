"""The part of `rlinf plan` about several machines: step time and efficiency from one GPU to all of them."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rlinf_core.commands.output import positive_count, print_table
from rlinf_core.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from rlinf_core.plan.scaling import Machines, ScaledStep
    from rlinf_core.plan.step import Plan

NETWORK = "ndr-8x400"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    group = parser.add_argument_group("several machines", "predict the step from one GPU to all of them")
    group.add_argument("--nodes", type=positive_count, metavar="N", help="machines; takes the place of --ranks")
    group.add_argument("--gpus", type=positive_count, metavar="M", help="GPUs of each machine; default: 8")
    group.add_argument(
        "--interconnect",
        metavar="NAME|GB/s",
        help=f"network of a machine, by name or in 10⁹ bytes per second in one direction; default: {NETWORK}",
    )
    group.add_argument("--gpu", metavar="NAME", help="such as H100, the default, or A100")
    group.add_argument(
        "--data-rate",
        type=float,
        metavar="SAMPLES/s",
        help="what a machine can load (`rlinf bench-data`); default: enough",
    )


def ranks(options: argparse.Namespace) -> int | None:
    """Number of processes; None: the options are not used.

    Raises:
        UserError: Options that contradict or need each other.
    """
    given = [name for name in ("gpus", "interconnect", "gpu", "data_rate") if getattr(options, name) is not None]
    if options.nodes is None:
        if given:
            raise UserError(f"--{given[0].replace('_', '-')} predicts the step on several machines: give --nodes, too")
        return None
    if options.ranks is not None:
        raise UserError("--ranks and --nodes both set the number of processes: leave out --ranks")
    machines = machines_of(options)
    return int(options.nodes * machines.gpus)


def machines_of(options: argparse.Namespace) -> Machines:
    """What the options describe.

    Raises:
        UserError: A GPU or a network that is not known, or a rate that is not above 0.
    """
    from rlinf_core.costs.gpus import PEAKS
    from rlinf_core.plan.scaling import Machines, interconnect

    gpu = options.gpu or "H100"
    if gpu not in PEAKS:
        raise UserError(f"--gpu: {gpu!r} is not one of {', '.join(PEAKS)}{did_you_mean(gpu, PEAKS)}")
    if options.data_rate is not None and not options.data_rate > 0:
        raise UserError(f"--data-rate: {options.data_rate:g} is not a number above 0")
    network = interconnect(options.interconnect or NETWORK)
    return Machines(gpu, options.gpus or 8, network, options.mfu, options.data_rate)


def predict(made: Plan, options: argparse.Namespace) -> tuple[Machines, list[ScaledStep]]:
    """The machines, and the step on 1, 2, 4, ... of their GPUs."""
    from rlinf_core.plan.scaling import Load, scale

    machines = machines_of(options)
    load = Load(
        made.units,
        made.sharding,
        made.share,
        made.share // made.trainer.micro_batch_size,
        made.flops_per_sample,
        made.run.runner.save_interval,
    )
    return machines, scale(load, machines, made.ranks)


def as_object(made: Plan, options: argparse.Namespace) -> dict[str, Any]:
    """For --json; times in seconds."""
    machines, steps = predict(made, options)
    rows = [
        asdict(one)
        | {
            "total": one.total,
            "samples_per_second": one.samples_per_second,
            "efficiency": _efficiency(one, steps[0]),
        }
        for one in steps
    ]
    return {"machines": asdict(machines), "steps": rows}


def print_scaling(made: Plan, options: argparse.Namespace) -> None:
    """Print the table."""
    machines, steps = predict(made, options)
    print(
        f"\npredicted, not measured (docs/scaling.md): {machines.gpus} x {machines.gpu} in a machine, "
        f"{machines.network:g} GB/s between machines, {machines.mfu:.0%} MFU on one GPU, "
        f"{made.share} samples per GPU and step; times in ms:"
    )
    rows = [
        [
            str(one.gpus),
            *(_ms(seconds) for seconds in (one.compute, one.all_gather, one.reduce_scatter, one.all_reduce)),
            *(_ms(seconds) for seconds in (one.exposed, one.data, one.checkpoint, one.total)),
            f"{one.samples_per_second:,.0f}",
            f"{_efficiency(one, steps[0]):.0%}",
        ]
        for one in steps
    ]
    columns = ["GPUs", "compute", "all-gather", "reduce-scatter", "all-reduce", "not hidden", "data", "checkpoint"]
    print_table([*columns, "step", "samples/s", "efficiency"], rows)


def _efficiency(one: ScaledStep, first: ScaledStep) -> float:
    return one.samples_per_second / one.gpus / (first.samples_per_second / first.gpus)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.3g}" if seconds else "-"
