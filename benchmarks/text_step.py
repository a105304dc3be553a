"""Tokens a second of text SFT on a CPU, beside trl's SFTTrainer and transformers' Trainer.

    python benchmarks/text_step.py --json

Each side runs in a process of its own, on one thread, and trains the same weights on the same batches, which rlinf's
loader makes: float32, AdamW, texts of up to 256 tokens, one per sample or packed. The sides take turns over several
rounds, and medians are compared. Warm-up steps do not count; what happens between steps does. Time is processor time,
user and system, because other processes disturb it least; speeds by the clock are in `cases`. Unless the losses of the
first step agree within 1e-4, nothing is reported. A profile after the timed steps shows where the time goes.

`trl_trained_only` is trl with one name patched, so that it computes logits of trained tokens only, as it does on CUDA.
Needs the dependency group `benchmarks`; a peer that is not installed is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from reporting.result_line import ResultLine

CASES = {"unpacked": False, "packed": True}
PEERS = {
    "trl": ("trl", "accelerate"),
    "trl_trained_only": ("trl", "accelerate"),
    "transformers": ("transformers", "accelerate", "datasets"),
}
"""Side -> what has to be installed."""
COUNTS = ("tokens_per_second", "logit_rows_per_step", "gflops_per_step")
"""What is reported of every side; a row of logits has the vocabulary's size, computed again counts again."""
TOLERANCE = 1e-4
"""Relative, between the sides' losses of the first step in float32."""


def main() -> int:
    """Measure, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object, on the last line")
    parser.add_argument("--steps", type=int, default=6, help="timed steps per side and round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; every side trains once in each")
    parser.add_argument("--batch", type=int, default=8, help="texts (or packs) per step")
    parser.add_argument("--vocabulary", type=int, default=32_000, help="size of the model's vocabulary")
    parser.add_argument("--sides", default=",".join(PEERS), help="peers, separated by commas")
    parser.add_argument("--job", help=argparse.SUPPRESS)  # One side's training, in its own process.
    options = parser.parse_args()
    if options.job:
        return _work(json.loads(options.job))
    line = ResultLine("text_step", wanted=options.json)
    peers = _installed(options.sides.split(","))
    given = {key: getattr(options, key) for key in ("batch", "steps", "vocabulary")}
    with tempfile.TemporaryDirectory() as folder:
        found = {
            case: _measure(given | {"packed": packed, "folder": folder}, peers, options.rounds)
            for case, packed in CASES.items()
        }
    if different := [name for name, case in found.items() if case["loss_difference"] > TOLERANCE]:
        print(f"error: {different[0]}: the sides' first losses differ: {found[different[0]]}", file=sys.stderr)
        return 1
    packages = ("torch", "transformers", *(name for name in ("trl", "accelerate") if peers))
    details = {
        "cases": found,
        "settings": given | {"rounds": options.rounds, "threads": 1, "dtype": "float32"},
        "versions": {name: version(name) for name in packages},
    }
    line.write(_results(found, peers), _table(found), **details)
    return 0


def _work(job: dict[str, Any]) -> int:
    from text_sft.job import Job
    from text_sft.running import run_job

    folder = Path(job.pop("folder"))
    (folder / "found.json").write_text(json.dumps(run_job(Job(folder=folder, **job))))
    return 0


def _installed(wanted: list[str]) -> list[str]:
    missing = {side: [name for name in PEERS[side] if find_spec(name) is None] for side in wanted}
    for side, names in missing.items():
        if names:
            print(f"{side} is left out: {names[0]} is not installed", file=sys.stderr)
    return [side for side, names in missing.items() if not names]


def _measure(job: dict[str, Any], peers: list[str], rounds: int) -> dict[str, Any]:
    """All sides of a case, in turn."""
    batches = _process(job | {"side": "record"})
    turns: dict[str, list[dict[str, Any]]] = {side: [] for side in ("rlinf", *peers)}
    for number in range(rounds):
        for side in list(turns)[:: 1 if number % 2 == 0 else -1]:  # Nobody always follows the same neighbour.
            turns[side].append(_process(job | {"side": side}))
            speed = batches["tokens"] / turns[side][-1]["processor_seconds"]
            print(f"round {number + 1}, packed: {job['packed']}, {side}: {speed:.0f} tokens/s", file=sys.stderr)
    losses = [turn["first_loss"] for side in turns.values() for turn in side]
    return {
        "loss_difference": (max(losses) - min(losses)) / min(losses),
        "timed_batches": batches,
        "sides": {side: _median(found, batches["tokens"]) for side, found in turns.items()},
    }


def _process(job: dict[str, Any]) -> dict[str, Any]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout + done.stderr, file=sys.stderr)
        raise SystemExit(f"error: the process of {job['side']} ended with code {done.returncode}; its output is above")
    found: dict[str, Any] = json.loads((Path(job["folder"]) / "found.json").read_text())
    return found


def _median(turns: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """A side's speeds over the rounds, and the profile of the last."""
    speeds = {
        name: [tokens / turn[f"{clock}_seconds"] for turn in turns]
        for name, clock in (("tokens_per_second", "processor"), ("tokens_per_second_by_the_clock", "wall"))
    }
    medians = {name: round(statistics.median(values)) for name, values in speeds.items()}
    rounds = {f"{name}_rounds": [round(one) for one in values] for name, values in speeds.items()}
    profile = {key: value for key, value in turns[-1].items() if not key.endswith("_seconds")}
    return medians | rounds | profile


def _results(found: dict[str, Any], peers: list[str]) -> dict[str, float]:
    """How many times as fast rlinf is as each peer, then every side's speed and what it computes."""
    results: dict[str, float] = {}
    for case, measured in found.items():
        sides = measured["sides"]
        for peer in peers:
            name = f"packed_vs_{peer}_packed" if case == "packed" else f"tokens_per_second_vs_{peer}"
            results[name] = round(sides["rlinf"]["tokens_per_second"] / sides[peer]["tokens_per_second"], 3)
        for side, numbers in sides.items():
            for count in COUNTS:
                results[f"{case}_{side}_{count}"] = round(numbers[count], 3)
    return results


def _table(found: dict[str, Any]) -> str:
    lines = []
    for case, measured in found.items():
        own = measured["sides"]["rlinf"]
        for side, numbers in measured["sides"].items():
            ratio = own["tokens_per_second"] / numbers["tokens_per_second"]
            shares = ", ".join(f"{part} {share:.0%}" for part, share in list(numbers["shares"].items())[:3])
            lines.append(
                f"{case}, {side}: {numbers['tokens_per_second']} tokens/s (rlinf: {ratio:.2f} times); {shares}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
