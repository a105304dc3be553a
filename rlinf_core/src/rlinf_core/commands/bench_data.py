"""`rlinf bench-data`: how fast a run's data load, and how many GPUs they can feed."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from rlinf_core.commands.output import print_json, print_table
from rlinf_core.errors import UserError

if TYPE_CHECKING:
    from rlinf_core.contract.run import RunConfig
    from rlinf_core.data.speed import Speed
    from rlinf_core.plugins.registry import Plugins

MFU, GPU = 0.4, "H100"
MOST_PREDICTED = 10_000
"""Samples/s. Above this, latencies limit the policy and not the GPU's peak, so that nothing is predicted."""
EPILOG = f"""\
Reads the run's own train loader: its order, decoder, workers, transforms, tokeniser and collate. With --ranks N, N
loaders are read at the same time, as N ranks on this machine would. Other load on the machine slows the measurement.

The rate of one GPU is --samples-per-second-per-gpu, for example a run's own samples_per_second. By default it is what
`rlinf plan` predicts for an {GPU} at {MFU:.0%} of its peak. Nothing is predicted for runs on the CPU, or for policies
so small that the prediction would exceed {MOST_PREDICTED:,}.

--json prints an object: the measurement ("ranks", "workers", "micro_batch_size", "samples", "samples_per_second" of
all ranks, "first_batch_s", "decoder", "worker_mb" or null, "most_held_mb", "steady", "shares" of one process's time:
"read", which includes "pictures", "transform", "collate"), "samples_per_second_per_gpu" with "assumed" (true if
predicted) and "gpus_fed", both null if nothing is predicted.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = EPILOG
    parser.add_argument("config", help="the run's TOML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that override the file: data.num_workers=8"
    )
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="ranks on this machine; default: 1")
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S", help="how long to measure; default: 10")
    parser.add_argument(
        "--samples-per-second-per-gpu", type=float, metavar="X", help="the rate of one GPU; default: predicted"
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def run(options: argparse.Namespace) -> None:
    """Measure and print."""
    for name, value in (("ranks", options.ranks), ("seconds", options.seconds)):
        if value <= 0:
            raise UserError(f"--{name} must be greater than 0, not {value}")
    if options.samples_per_second_per_gpu is not None and options.samples_per_second_per_gpu <= 0:
        raise UserError("--samples-per-second-per-gpu must be greater than 0")
    from rlinf_core.config.load import load_config, with_begun
    from rlinf_core.plugins.registry import get_plugins
    from rlinf_core.terminal import print_phase

    print_phase("loading plugins and the config")
    plugins = get_plugins()
    config = with_begun(load_config(options.config, options.overrides, plugins))
    print_phase(f"loading torch and measuring for {options.seconds:g} seconds")
    from rlinf_core.data.speed import measure  # Loads torch, which takes seconds: report config mistakes first.

    speed = measure(config, plugins, ranks=options.ranks, seconds=options.seconds)
    given = options.samples_per_second_per_gpu
    taken = given or _predicted(config, plugins, options.ranks)
    if options.json:
        fed = {"samples_per_second_per_gpu": taken, "assumed": given is None}
        print_json(asdict(speed) | fed | {"gpus_fed": speed.samples_per_second / taken if taken else None})
        return
    on_cpu = config.trainer.device == "cpu"
    print_table(["data", options.config], [*_facts(speed), _feeds(speed, taken, assumed=given is None, on_cpu=on_cpu)])


def _predicted(config: RunConfig, plugins: Plugins, ranks: int) -> float | None:
    """The rate of one GPU that `rlinf plan` predicts, in samples/s; None if the prediction would mean nothing."""
    if config.trainer.device == "cpu":
        return None
    from rlinf_core.costs.gpus import PEAKS
    from rlinf_core.plan.step import plan

    predicted = MFU * PEAKS[GPU] * 1e12 / plan(config, plugins, ranks).flops_per_sample
    return predicted if predicted <= MOST_PREDICTED else None


def _facts(speed: Speed) -> list[list[str]]:
    each = "in this process" if not speed.workers else f"{speed.workers} worker{'s' * (speed.workers > 1)} each"
    ranks = f"{speed.ranks} rank{'s' * (speed.ranks > 1)}"
    shares = {name: f"{share:.0%}" for name, share in speed.shares.items()}
    facts = {
        "samples/s": f"{speed.samples_per_second:.4g} ({ranks}, {each}, micro batch {speed.micro_batch_size})",
        "first batch": f"after {speed.first_batch_s:.2f} s",
        "decoder": speed.decoder or "the data plugin's own",
        "time per process": f"reading {shares['read']} (images {shares['pictures']} of the total), transforms "
        f"{shares['transform']}, collate {shares['collate']}",
    }
    if not speed.shares["pictures"]:
        facts["decoder"] = "none: no images"
        images = f" (images {shares['pictures']} of the total)"
        facts["time per process"] = facts["time per process"].replace(images, "")
    if speed.worker_mb is not None:
        facts["worker memory"] = f"{speed.worker_mb:.0f} MB private memory in the largest worker"
    if speed.most_held_mb:
        full = "" if speed.steady else "; not full yet: the rate still rises, measure longer (--seconds)"
        facts["shuffle buffers"] = f"{speed.most_held_mb:.0f} MB over all ranks when full{full}"
    return [[name, text] for name, text in facts.items()]


def _feeds(speed: Speed, taken: float | None, *, assumed: bool, on_cpu: bool) -> list[str]:
    """How many GPUs the measured rate can feed."""
    if taken is None:
        why = 'trainer.device is "cpu"' if on_cpu else "the policy is too small to predict a GPU's rate"
        return ["feeds", f"unknown: {why}; give --samples-per-second-per-gpu, such as a run's samples_per_second"]
    why = "given"
    if assumed:
        why = f"predicted for an {GPU} at {MFU:.0%} MFU; override it with --samples-per-second-per-gpu"
    fed = speed.samples_per_second / taken
    return ["feeds", f"{fed:.3g} GPUs at {taken:.4g} samples/s each ({why})"]
