"""Open what is triaged: the policy of a run or an exported folder, its data, and the rows of the site."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from rlinf_core.config.load import load_saved_config
from rlinf_core.contract.datasets import SampleSource
from rlinf_core.contract.weights.origin import DESCRIPTION
from rlinf_core.data.splits import open_rows_of
from rlinf_core.errors import UserError
from rlinf_core.export import Choice, check_run, validated
from rlinf_core.inference import LoadedPolicy, load_policy, load_run
from rlinf_core.offline_eval import other_dataset
from rlinf_core.plugins.registry import Plugins
from rlinf_core.rollout.config import RolloutSettings
from rlinf_core.terminal import warn
from rlinf_core.triage.scene import MINUTES, Execution, Scene, Simulator, Subject
from rlinf_core.triage.served import Served
from rlinf_core.triage.simulated import record_site
from rlinf_core.untrusted.text import read_json

SEED = 42


def open_scene(
    folder: Path,
    *,
    plugins: Plugins,
    dataset: str = "",
    run: Path | None = None,
    choice: Choice | None = None,
    source: str = "",
    execution: Execution | None = None,
    simulator: RolloutSettings | None = None,
    closed_loop: bool = False,
    minutes: float = MINUTES,
    server: str = "",
    api_key: str = "",
    device: str = "cpu",
    dtype: Literal["fp32", "bf16"] = "fp32",
    progress: Callable[[int, int], object] = lambda done, all: None,
) -> Scene:
    """Open everything that the tests look at.

    Args:
        folder: A run's folder, or one that `rlinf export` wrote.
        plugins: Plugins that provide the classes.
        dataset: Rows from the place where the policy acts, in the format of the training data: a folder or a hub id.
        run: The run that an exported folder is from; default: `runs/<name>`, if it is there.
        choice: Of a run, which checkpoint and weights.
        source: For a mixture, the dataset whose observations the policy gets.
        execution: How the robot executes chunks.
        simulator: The simulator in which the policy acts, of which rows are recorded if there is no `dataset`.
        closed_loop: Whether the policy plays episodes in it.
        minutes: How long it may play.
        server: The address of a server that should act as the policy does.
        api_key: The server's key, if it has one.
        device: Where the policy computes.
        dtype: Dtype of its matrix products.
        progress: Called while actions are sampled.

    Raises:
        UserError: The policy cannot be loaded, has no actions, the rows of the site cannot be opened, or there is no
            such server.
    """
    if (folder / DESCRIPTION).is_file():
        if choice is not None and choice != Choice():
            raise UserError(f"{folder} is an exported policy, of one checkpoint: --step, --best and --ema are of a run")
        policy = load_policy(folder, device=device, dtype=dtype, plugins=plugins, source=source)
        subject = _exported(folder, run)
    else:
        check_run(folder)
        policy, checkpoint, notes = load_run(
            folder, choice or Choice(), device=device, dtype=dtype, plugins=plugins, source=source
        )
        subject = _of_run(folder, checkpoint, notes, plugins)
    if not policy.config.chunk_length():
        raise UserError(f"the policy {policy.config.type!r} has no actions: rlinf triage is for policies that act")
    training, held_out = _own_rows(policy, plugins)
    # Names of files and the order of cameras are those of the training data.
    site = open_rows_of(other_dataset(policy.data, dataset), policy.config, plugins, "train") if dataset else None
    rate_note = ""
    if simulator is not None and site is None:
        site, rate_note = record_site(simulator, policy, training)
    recorded = subject.description.get("validation", {})
    seed = recorded.get("seed", SEED) if isinstance(recorded, dict) else SEED
    return Scene(
        policy,
        subject,
        training,
        held_out,
        site,
        seed=seed if isinstance(seed, int) else SEED,
        execution=execution or _executed(simulator),
        simulator=Simulator(simulator, closed_loop, rate_note, minutes) if simulator else None,
        server=Served(server, policy.data, api_key) if server else None,
        plugins=plugins,
        progress=progress,
    )


def _executed(simulator: RolloutSettings | None) -> Execution:
    return Execution(simulator.env.replan or None if simulator else None)


def _of_run(folder: Path, checkpoint: Path, notes: Sequence[str], plugins: Plugins) -> Subject:
    config = load_saved_config(folder, plugins)
    step = int(checkpoint.name.removeprefix("step_"))
    averaged = any(note.startswith("weights: the moving average") for note in notes)
    facts = {"validation": validated(folder, config, step)}
    return Subject(folder, False, averaged, step, facts, None, (str(checkpoint), *notes))


def _exported(folder: Path, run: Path | None) -> Subject:
    description: dict[str, Any] = read_json(folder / DESCRIPTION)
    if run is not None:
        check_run(run)
    else:
        name = description.get("run")
        guess = Path("runs") / str(name)
        run = guess if name and (guess / "config.toml").is_file() else None
    step = description.get("step")
    return Subject(
        folder,
        True,
        description.get("weights") == "ema",
        step if isinstance(step, int) else None,
        description,
        run,
        (f"run: {run}" if run else "its run is not here (--run names it)",),
    )


def _own_rows(policy: LoadedPolicy, plugins: Plugins) -> tuple[SampleSource | None, SampleSource | None]:
    """Training and held-out rows; None, with a warning, if they are not on this machine."""
    try:
        training = open_rows_of(policy.data, policy.config, plugins, "train")
        held_out = None
        if policy.data.has_validation:
            held_out = open_rows_of(policy.data, policy.config, plugins, "validation")
    except UserError as error:
        warn(f"the training data cannot be opened, and tests that need them are skipped: {error}")
        return None, None
    return training, held_out
