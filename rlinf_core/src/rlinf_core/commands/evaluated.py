"""The policy that a command evaluates: options that choose it, and loading it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlinf_core.errors import UserError

if TYPE_CHECKING:
    from rlinf_core.inference import LoadedPolicy
    from rlinf_core.plugins.registry import Plugins


def add_policy_arguments(parser: argparse.ArgumentParser, *, may_be_served: bool = False) -> None:
    """Add the options that choose a policy, and what it computes on."""
    parser.add_argument(
        "policy",
        nargs="?" if may_be_served else None,
        help="a run's folder, runs/<name>, or a folder that `rlinf export` wrote",
    )
    parser.add_argument("--source", default="", metavar="NAME", help="the dataset of a mixture")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="of a run: the checkpoint after this step; default: the newest")
    which.add_argument("--best", action="store_true", help="of a run: the checkpoint with the best validation result")
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="of a run: the moving average of the weights, or not; default: as `rlinf export`",
    )
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of matrix products; default: fp32")


def chosen_device(options: argparse.Namespace) -> str:
    """The device that `--device` names; of `auto`, a GPU if there is one."""
    import torch

    device: str = options.device
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def load_evaluated(options: argparse.Namespace, plugins: Plugins) -> tuple[LoadedPolicy, dict[str, Any]]:
    """Load the policy.

    Returns:
        The policy, and facts about it: `seed`, `step`, whether its weights are averaged (`ema`), the folder of its run
        (`run`, None for an exported one), what identifies its weights (`identity`, bytes), and `notes`.

    Raises:
        UserError: There is no such policy, or an option does not apply to it.
    """
    from rlinf_core.contract.weights.origin import DESCRIPTION
    from rlinf_core.export import Choice
    from rlinf_core.inference import load_policy, load_run
    from rlinf_core.training.checkpoint.state import STATE
    from rlinf_core.untrusted.text import read_json

    folder, device = Path(options.policy), chosen_device(options)
    steps: int | None = getattr(options, "num_steps", None)
    if (folder / DESCRIPTION).is_file():
        if options.step is not None or options.best or options.ema is not None:
            raise UserError(f"{folder} is an exported policy, of one checkpoint: --step, --best and --ema are of a run")
        policy = load_policy(
            folder, device=device, dtype=options.dtype, plugins=plugins, source=options.source, steps=steps
        )
        described = read_json(folder / DESCRIPTION)
        facts = {"step": described.get("step"), "ema": described.get("weights") == "ema", "notes": [], "run": None}
        facts["identity"] = (folder / DESCRIPTION).read_bytes()
        return policy, facts | {"seed": 42 if options.seed is None else options.seed}
    choice = Choice(options.step, options.best, options.ema)
    policy, checkpoint, notes = load_run(
        folder, choice, device=device, dtype=options.dtype, plugins=plugins, source=options.source, steps=steps
    )
    from rlinf_core.config.load import load_saved_config

    seed = load_saved_config(folder, plugins).seed if options.seed is None else options.seed
    ema = any(note.startswith("weights: the moving average") for note in notes)
    step = int(checkpoint.name.removeprefix("step_"))
    return policy, {
        "step": step,
        "ema": ema,
        "notes": [f"{checkpoint}", *notes],
        "run": folder,
        "seed": seed,
        "identity": (checkpoint / STATE).read_bytes(),
    }
