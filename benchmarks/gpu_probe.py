"""What to ask a new GPU first: are the kernels right, how fast are they, and where does a step's time go?

    PYTHONPATH=rlinf_core/src:rlinf_plugins_openpi/src python benchmarks/gpu_probe.py attention products step
    PROBE_TINY=1 PROBE_DEVICE=cpu python benchmarks/gpu_probe.py          # tries it without a GPU

It needs torch and NumPy, and the two source folders. `benchmarks/README.md` says in which order to ask.
"""

from __future__ import annotations

import argparse
import os
import traceback

import torch
from gpu_questions.kernels import attention, products
from gpu_questions.measuring import Probe
from gpu_questions.steps import step
from reporting.result_line import ResultLine

QUESTIONS = {"attention": attention, "products": products, "step": step}


def main() -> int:
    """Ask; returns 1 if a question ended with an error, which does not keep the others from being asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("questions", nargs="*", metavar="question", help=f"{', '.join(QUESTIONS)}; default: all")
    parser.add_argument("--device", default=os.environ.get("PROBE_DEVICE", "cuda"), help="or $PROBE_DEVICE; cuda")
    parser.add_argument(
        "--tiny", action="store_true", default=bool(os.environ.get("PROBE_TINY")), help="or $PROBE_TINY: small shapes"
    )
    parser.add_argument("--micro-batches", default="32 16", help='of the step; "8e" is 8, not compiled')
    parser.add_argument("--samples", type=int, default=32, help="of the step")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if unknown := sorted({*options.questions} - {*QUESTIONS}):
        parser.error(f"unknown question {unknown[0]!r}: choose from {', '.join(QUESTIONS)}")
    line = ResultLine("gpu_probe", wanted=options.json)
    probe = Probe(torch.device(options.device), tiny=options.tiny)
    failed = []
    for name in options.questions or QUESTIONS:
        print(f"== {name}", flush=True)
        try:
            QUESTIONS[name](probe, options)
        except Exception:  # The other questions still have to be asked.
            traceback.print_exc()
            failed.append(name)
    results = probe.results | {"failed": len(failed)}
    line.write(results, f"{len(failed)} questions failed: {', '.join(failed)}" if failed else "all questions answered")
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
