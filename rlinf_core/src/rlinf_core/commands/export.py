"""`rlinf export`: write a run's policy to a folder for inference, further training, or another project."""

from __future__ import annotations

import argparse
from pathlib import Path

from rlinf_core.commands.output import print_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("run", help="the run's folder, runs/<name>")
    parser.add_argument("--output", required=True, help="the folder to write; it must not exist")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="the checkpoint after this step; default: the newest")
    which.add_argument("--best", action="store_true", help="the checkpoint with the best validation result")
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="the moving average of the weights (optim.ema_decay), or not; default: with --best the weights that won "
        "the validation, otherwise not",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--merge",
        dest="adapters",
        action="store_const",
        const="merge",
        default="",
        help="with the run's adapters in the weights; the default if it has any",
    )
    how.add_argument(
        "--adapters",
        dest="adapters",
        action="store_const",
        const="alone",
        help="only what a LoRA run has trained, in PEFT's layout, without the weights that it started from",
    )
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="dtype of the file; default: fp32")
    parser.add_argument("--format", default="rlinf", help="output format: rlinf, or one that the policy supports")
    parser.add_argument("--source", default="", metavar="NAME", help="export for this dataset of a mixture only")
    parser.add_argument(
        "--results",
        action="append",
        default=[],
        metavar="FILE",
        help="a file of `rlinf eval --output` for the model card, beside what the run's evaluators measured; may be "
        "repeated",
    )
    parser.add_argument(
        "--license",
        default="",
        metavar="ID",
        help="the licence of the exported policy, by the hub's id (apache-2.0, gemma, cc-by-nc-4.0, other), for the "
        "model card; default: unknown",
    )


def run(options: argparse.Namespace) -> None:
    """Export, and print what was written."""
    from rlinf_core.export import Choice, export_run
    from rlinf_core.plugins.registry import get_plugins
    from rlinf_core.terminal import print_phase

    choice = Choice(
        options.step,
        options.best,
        options.ema,
        options.dtype,
        options.format,
        adapters=options.adapters,
        source=options.source,
        results=tuple(map(Path, options.results)),
        licence=options.license,
    )
    print_phase(f"loading a checkpoint of {options.run} and writing it to {options.output}")
    checkpoint = export_run(Path(options.run), Path(options.output), choice, get_plugins())
    what = "adapters" if choice.adapters == "alone" else "weights"
    print_text(f"{options.output}: {what} of {checkpoint} in {options.dtype}")
