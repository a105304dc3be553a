"""The training step of π0 and π0.5 beside lerobot's and openpi's: same batches, and the same weights where possible.

    python benchmarks/training_step.py --json                     # on a CPU: a small model beside lerobot's
    python benchmarks/training_step.py --output results \
        --peer-python openpi=peers/openpi/bin/python              # on a CUDA card: the published size

Without a CUDA device, a small model takes steps on one thread. Ours and lerobot's take turns in one process, with the
same weights and batches, after a check that their losses agree. The results are how many times as fast ours is (ratio
of medians, AdamW included) and `flops_over_useful`: operations counted over useful ones (openpi's `model.flops`).

With one, the model has its published size and random weights and takes 32 samples per optimizer step. Each side runs in
a process of its own, in the environment that `--peer-python` names. Plain files, torch and NumPy are enough for ours.
benchmarks/README.md has the commands that create the peers' environments.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reporting.result_line import ResultLine

ROOT = Path(__file__).parents[1]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Run from plain files, take what is not installed from the source folders; peers need no more than the sizes in it.
for name in ("rlinf_core", "rlinf_plugins_openpi"):
    if importlib.util.find_spec(name) is None or importlib.util.find_spec(name).origin is None:
        sys.path.insert(0, str(ROOT / name / "src"))


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is a CUDA device")
    parser.add_argument("--size", choices=["small", "base", "minimal"], help="default: small on a CPU, base on a GPU")
    parser.add_argument("--json", action="store_true", help="print one JSON object, on the last line")
    compare = parser.add_argument_group("beside lerobot on a CPU")
    compare.add_argument("--batch", type=int, default=8, help="samples per step")
    compare.add_argument("--rounds", type=int, default=4, help="timed steps of each side")
    compare.add_argument("--vocabulary", type=int, help="embedding rows; default: the size's own, 4096 for small")
    compare.add_argument("--compile", action="store_true", help="also compare both sides compiled")
    compare.add_argument("--without-peers", action="store_true", help="time only ours")
    card = parser.add_argument_group("the table of a GPU")
    card.add_argument("--table", action="store_true", help="make it without a GPU, to try the command")
    card.add_argument("--output", type=Path, help="folder of training_step.json and .md; default: $OUT, else here")
    card.add_argument("--samples", type=int, default=32, help="samples per optimizer step")
    card.add_argument("--micro-batch", type=int, default=16, help="ours; the peers' is the largest that fits")
    card.add_argument("--steps", type=int, default=10, help="timed steps per row")
    card.add_argument("--minutes", type=float, default=9.5, help="end after so many minutes")
    card.add_argument("--rows", help="only rows whose name contains this text")
    card.add_argument("--eager", action="store_true", help="ours: compile nothing")
    card.add_argument("--keep-gathered", action="store_true", help="ours: reshard_after_forward = false")
    card.add_argument("--reduce-every-micro-batch", action="store_true", help="ours")
    card.add_argument("--checkpointing", action="store_true", help='ours: activation_checkpointing = "full"')
    card.add_argument("--peer-python", action="append", default=[], metavar="PEER=PYTHON", help="lerobot or openpi")
    card.add_argument("--job", help=argparse.SUPPRESS)  # One row, in the row's own process.
    return parser.parse_args(given)


def main() -> int:
    options = arguments()
    if options.job:
        from policy_step.worker import Job, run_job

        run_job(Job(**json.loads(options.job)), options.output)
        return 0
    import torch

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return _table(options, device) if options.table or device == "cuda" else _compare(options)


def _compare(options: argparse.Namespace) -> int:
    from policy_step.on_cpu import DifferentLossesError, compare, has_peers

    line = ResultLine("training_step", wanted=options.json)
    peers = has_peers() and not options.without_peers
    if not peers and not options.without_peers:
        print("lerobot is not installed: only ours is timed", file=sys.stderr)
    try:
        found = compare(
            size=options.size or "small",
            batch=options.batch,
            rounds=options.rounds,
            vocabulary=options.vocabulary,
            compiled=options.compile,
            peers=peers,
        )
    except DifferentLossesError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    results = {name: value for name, value in found.items() if isinstance(value, int | float)}
    line.write(results, _comparison(found), **{name: value for name, value in found.items() if name not in results})
    return 0


def _comparison(found: Mapping[str, Any]) -> str:
    """The CPU's comparison for people."""
    lines = []
    for name, case in found["cases"].items():
        seconds = ", ".join(f"{side} {sorted(all_)[len(all_) // 2]} s" for side, all_ in case["seconds"].items())
        lines.append(f"{name}: {seconds}")
        for way, against in case["times_as_fast"].items():
            lines.append(f"  {way}: {against['ratio']} times as fast ({against['least']} to {against['greatest']})")
    return "\n".join([*lines, f"operations counted over useful: {found['flops_over_useful']}"])


def _table(options: argparse.Namespace, device: str) -> int:
    from policy_step.on_card import measure, rows
    from policy_step.table import markdown, ratios

    line = ResultLine("training_step", wanted=options.json)
    pythons = {"ours": sys.executable, **dict(pair.split("=", 1) for pair in options.peer_python)}
    if unknown := sorted(pythons.keys() - {"ours", "lerobot", "openpi"}):
        print(f"error: --peer-python {unknown[0]}=...: the peers are lerobot and openpi", file=sys.stderr)
        return 2
    wanted = rows(options.size or "base", device, options.samples, options.micro_batch, steps=options.steps)
    found = measure(
        [row for row in wanted if options.rows is None or options.rows in row.name],
        pythons,
        options.output or Path(os.environ.get("OUT", ".")),
        minutes=options.minutes,
        changes=({"compiled": False} if options.eager else {})
        | {
            "reshard_after_forward": not options.keep_gathered,
            "reduce_every_micro_batch": options.reduce_every_micro_batch,
            "checkpointing": options.checkpointing,
        },
    )
    speeds = {name: row["samples_per_second"] for name, row in found["rows"].items()}
    line.write(speeds | ratios(found["rows"]), markdown(found), **found)
    return 0 if found["rows"] else 1


if __name__ == "__main__":
    sys.exit(main())
