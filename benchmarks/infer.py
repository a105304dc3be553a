"""One call of π0 and π0.5 beside lerobot's, and what a server adds to a call.

    python benchmarks/infer.py --json                 # on a CPU; --compile: also with the denoising step compiled

`infer_vs_lerobot` is the smaller of the two policies' speedups. A small model (sizes in benchmarks/policy_step) takes
an observation of two cameras and a prompt, and draws a chunk in 10 denoising steps on one thread: in turns with
lerobot's, with the same weights, cameras and noise, after a check that the actions are equal.

`server_overhead_ms` is the median of round trips over loopback, two images of 224 x 224 pixels, less the time that the
server takes for the call. `server_processor_ms` is the processor time of both sides beyond the call's, on which other
processes have less effect.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from reporting.result_line import ResultLine

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["small", "minimal"], default="small")
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each side")
    parser.add_argument("--requests", type=int, default=300, help="timed round trips")
    parser.add_argument("--compile", action="store_true", help="also compile our denoising step: minutes")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    line = ResultLine("infer", wanted=options.json)
    from importlib.metadata import version

    from inference.calls import STEPS, DifferentActionsError, compare_calls
    from inference.overhead import measure_overhead
    from policy_step.on_cpu import has_peers

    if not has_peers():
        print("error: lerobot is not installed: uv sync --group test", file=sys.stderr)
        return 1
    overhead = measure_overhead(options.requests)
    try:
        calls = compare_calls(options.size, options.rounds, compiled=options.compile)
    except DifferentActionsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    ratios = {
        f"{policy}{suffix}": found["times_as_fast"][kind]["ratio"]
        for policy, found in calls.items()
        for kind, suffix in (("eager", ""), ("compiled", "_compiled"))
        if kind in found["times_as_fast"]
    }
    results = {"infer_vs_lerobot": min(ratios[policy] for policy in calls), **ratios}
    results["server_overhead_ms"] = round(overhead["p50"], 3)
    results["server_processor_ms"] = round(overhead["processor_ms"], 3)
    line.write(
        results,
        _text(calls, overhead),
        calls=calls,
        overhead={name: round(value, 3) for name, value in overhead.items()},
        settings={**vars(options), "threads": 1, "dtype": "float32", "denoising_steps": STEPS},
        versions={package: version(package) for package in ("torch", "lerobot", "transformers", "websockets")},
    )
    return 0


def _text(calls: dict[str, Any], overhead: dict[str, Any]) -> str:
    lines = []
    for policy, found in calls.items():
        middle = {side: sorted(taken)[len(taken) // 2] for side, taken in found["seconds"].items()}
        lines.append(f"{policy}: " + ", ".join(f"{side} {one * 1e3:.0f} ms" for side, one in middle.items()))
        for kind, against in found["times_as_fast"].items():
            least, most = against["least"], against["greatest"]
            lines.append(f"  {kind}: {against['ratio']} times as fast as lerobot ({least} to {most})")
    lines.append(f"server: {overhead['p50']:.2f} ms more than the call (median), {overhead['p90']:.2f} ms (p90)")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
