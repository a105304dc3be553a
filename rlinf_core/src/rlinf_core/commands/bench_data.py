"""`rlinf bench-data`: how fast a run's data come, and how many GPUs they feed."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from rlinf_core.commands.output import print_json, print_table
from rlinf_core.errors import UserError

if TYPE_CHECKING:
    from rlinf_core.contract.run import RunConfig
    from rlinf_core.data_speed import Speed
    from rlinf_core.plugins.registry import Plugins

MFU, CARD = 0.4, "H100"
MOST_PREDICTED = 10_000
"""Samples/s: what smaller policies take follows from latencies, and not from what a card computes."""
EPILOG = f"""\
The run's own train loader is read: its order, decoder, workers, transforms, tokeniser and collate. With --ranks N, so
many loaders are read at the same time, as that many ranks on this machine would. Other work on the machine slows it.

A GPU takes what --samples-per-second-per-gpu says, such as a run's own samples_per_second; without it, what
`rlinf plan` predicts for an {CARD} at {MFU:.0%} of its peak. Nothing is predicted of runs on the CPU, nor of policies
so small that it would be more than {MOST_PREDICTED:,}.

--json prints an object: what is measured ("ranks", "workers", "micro_batch_size", "samples", "samples_per_second" of
all ranks, "first_batch_s", "decoder", "worker_mb" or null, "most_held_mb", "steady", "shares" of one process's time:
"read", of which "pictures", "transform", "collate"), "samples_per_second_per_gpu" with "assumed" (true if predicted)
and "gpus_fed", both null where nothing is predicted.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = EPILOG
    parser.add_argument("config", help="the run's TOML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings over the file: data.num_workers=8")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="ranks on this machine; else 1")
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S", help="how long to count; else 10")
    parser.add_argument(
        "--samples-per-second-per-gpu", type=float, metavar="X", help="what one GPU takes; else as predicted"
    )
    parser.add_argument("--json", action="store_true", help="the result as one JSON object")


def run(options: argparse.Namespace) -> None:
    """Measure and print."""
    for name, value in (("ranks", options.ranks), ("seconds", options.seconds)):
        if value <= 0:
            raise UserError(f"--{name} must be more than 0, and is {value}")
    if options.samples_per_second_per_gpu is not None and options.samples_per_second_per_gpu <= 0:
        raise UserError("--samples-per-second-per-gpu must be more than 0")
    from rlinf_core.config.load import load_config
    from rlinf_core.plugins.registry import get_plugins

    plugins = get_plugins()
    config = load_config(options.config, options.overrides, plugins)
    from rlinf_core.data_speed import measure  # Takes seconds, with torch: a mistake in the config is told first.

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
    """What `rlinf plan` predicts that one GPU takes, in samples/s; None where that says nothing."""
    if config.trainer.device == "cpu":
        return None
    from rlinf_core.costs.gpus import PEAKS
    from rlinf_core.plan.step import plan

    predicted = MFU * PEAKS[CARD] * 1e12 / plan(config, plugins, ranks).flops_per_sample
    return predicted if predicted <= MOST_PREDICTED else None


def _facts(speed: Speed) -> list[list[str]]:
    each = "in this process" if not speed.workers else f"{speed.workers} worker{'s' * (speed.workers > 1)} each"
    ranks = f"{speed.ranks} rank{'s' * (speed.ranks > 1)}"
    shares = {name: f"{share:.0%}" for name, share in speed.shares.items()}
    facts = {
        "samples a second": f"{speed.samples_per_second:.4g} ({ranks}, {each}, micro batch {speed.micro_batch_size})",
        "first batch": f"after {speed.first_batch_s:.2f} s",
        "decoder": speed.decoder or "that of the plugin that reads the data",
        "time of a process": f"reading {shares['read']} (pictures {shares['pictures']} of all), transforms "
        f"{shares['transform']}, collate {shares['collate']}",
    }
    if not speed.shares["pictures"]:
        facts["decoder"] = "none: no pictures"
        facts["time of a process"] = facts["time of a process"].replace(f" (pictures {shares['pictures']} of all)", "")
    if speed.worker_mb is not None:
        facts["memory of a worker"] = f"{speed.worker_mb:.0f} MB of its own, the largest"
    if speed.most_held_mb:
        full = "" if speed.steady else "; not full yet: it gets faster, which more --seconds show"
        facts["shuffle buffers"] = f"{speed.most_held_mb:.0f} MB over all ranks when full{full}"
    return [[name, text] for name, text in facts.items()]


def _feeds(speed: Speed, taken: float | None, *, assumed: bool, on_cpu: bool) -> list[str]:
    """How many GPUs that is enough for."""
    if taken is None:
        why = 'trainer.device is "cpu"' if on_cpu else "the policy is too small to predict what a GPU takes"
        return ["feeds", f"not said: {why}; give --samples-per-second-per-gpu, such as a run's samples_per_second"]
    why = "given"
    if assumed:
        why = f"predicted for an {CARD} at {MFU:.0%} MFU; --samples-per-second-per-gpu says otherwise"
    fed = speed.samples_per_second / taken
    return ["feeds", f"{fed:.3g} GPUs that take {taken:.4g} samples a second each ({why})"]
