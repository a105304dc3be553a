"""Plant a mistake for `rlinf triage`: `python -m rlinf_core.testing.triage --plant flipped RUN --output DIR`.

The mistake is planted in a copy of episodes (given to `rlinf triage --dataset`), of an exported folder, or in the
arguments; the run itself is left alone. The last line printed is the command that should name it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlinf_core.commands.output import print_error, print_table, print_text
from rlinf_core.contract.datasets import LeRobotDatasetConfig, SampleSource
from rlinf_core.contract.weights.origin import DESCRIPTION, STATISTICS
from rlinf_core.data.normalize import save_norm_stats
from rlinf_core.data.splits import open_rows_of
from rlinf_core.data.statistics.compute import outputs
from rlinf_core.errors import Exit, UserError
from rlinf_core.export import Choice, choose_weights, export_run, find_checkpoint
from rlinf_core.inference import LoadedPolicy, load_run
from rlinf_core.offline_eval import other_dataset
from rlinf_core.plugins.registry import Plugins, get_plugins
from rlinf_core.testing.planted_data import read_episodes, write_episodes
from rlinf_core.testing.plants import PLANTS, Plant, Settings, find_plant

EPISODES = 24
"""Episodes of a planted dataset."""


@dataclass(frozen=True)
class Planted:
    """Where a mistake was planted."""

    plant: Plant
    policy: Path
    """The run or the exported folder."""
    dataset: Path | None = None
    """Rows of the site."""
    arguments: tuple[str, ...] = ()
    """Further arguments of `rlinf triage`."""

    @property
    def command(self) -> str:
        """The command that should name the mistake."""
        site = ["--dataset", str(self.dataset)] if self.dataset else []
        return shlex.join(["rlinf", "triage", str(self.policy), *site, *self.arguments])


def plant(
    name: str,
    run: Path,
    output: Path,
    *,
    plugins: Plugins,
    dataset: str = "",
    settings: Settings | None = None,
    episodes: int = EPISODES,
) -> Planted:
    """Plant a mistake.

    Args:
        name: Its name, of `PLANTS`; `none` copies without a mistake.
        run: The run's folder.
        output: The folder to write.
        plugins: Plugins that provide the run's classes.
        dataset: Episodes of the site; default: those that the run held out, or its own.
        settings: Which cameras, numbers and factor.
        episodes: Episodes to copy, at most.

    Raises:
        UserError: There is no such mistake, or the data or the run cannot have it.
    """
    settings = settings or Settings()
    chosen = Plant("none", "no mistake", "", site=lambda s, e: lambda one: one) if name == "none" else find_plant(name)
    if chosen.site is not None:
        policy, _, _ = load_run(run, Choice(), device="cpu", dtype="fp32", plugins=plugins)
        return _plant_site(chosen, run, output, policy, _episodes_of(policy, dataset, plugins), settings, episodes)
    if chosen.arguments is not None:
        policy, _, _ = load_run(run, Choice(), device="cpu", dtype="fp32", plugins=plugins)
        return Planted(chosen, run, arguments=tuple(chosen.arguments(policy.config.chunk_length())))
    averaged = _has_ema(run, plugins)
    if chosen.live and not averaged:
        raise UserError(f"{name} needs a run that averages its weights (optim.ema_decay)")
    export_run(run, output, Choice(ema=averaged and not chosen.live), plugins, lambda text: None)
    if chosen.folder is not None:
        chosen.folder(output, settings)
    elif chosen.name == "min-max":
        policy, _, _ = load_run(run, Choice(), device="cpu", dtype="fp32", plugins=plugins)
        _use_extremes(output, policy, plugins)
    _sign(output)
    return Planted(chosen, output)


def _plant_site(
    chosen: Plant, run: Path, output: Path, policy: LoadedPolicy, source: SampleSource, settings: Settings, most: int
) -> Planted:
    data = policy.data
    assert chosen.site is not None
    if not isinstance(data, LeRobotDatasetConfig):
        raise UserError(f"{data.config_name} is not a dataset in LeRobot's layout: nothing can be planted in it")
    whole, layout = read_episodes(data, source, most)
    mistake = chosen.site(settings, whole)
    return Planted(chosen, run, write_episodes(output, [mistake(one) for one in whole], layout))


def _episodes_of(policy: LoadedPolicy, dataset: str, plugins: Plugins) -> SampleSource:
    if dataset:
        return open_rows_of(other_dataset(policy.data, dataset), policy.config, plugins, "train")
    split: Any = "validation" if policy.data.has_validation else "train"
    return open_rows_of(policy.data, policy.config, plugins, split)


def _has_ema(run: Path, plugins: Plugins) -> bool:
    from rlinf_core.config.load import load_saved_config

    config = load_saved_config(run, plugins)
    checkpoint = find_checkpoint(run, config.runner.checkpoints_of(run), Choice(), lambda text: None)
    try:
        choose_weights(checkpoint, Choice(ema=True))
    except UserError:
        return False
    return True


def _use_extremes(folder: Path, policy: LoadedPolicy, plugins: Plugins) -> None:
    """Replace quantiles by minimum and maximum, and mean and deviation by the middle and half of the range."""
    from rlinf_core.data.normalize import NormStats

    source = open_rows_of(policy.data, policy.config, plugins, "train")
    transforms = [policy.data.repack(), *policy.data.transforms()]
    stats = {}
    for key, values in outputs(source, transforms, range(len(source))).items():
        flat = values.reshape(-1, values.shape[-1])
        low, high = flat.min(0), flat.max(0)
        stats[key] = NormStats((low + high) / 2, (high - low) / 2, low, high)
    save_norm_stats(folder / STATISTICS, stats)


def _sign(folder: Path) -> None:
    """Record the hashes of the changed files, as if the folder had been exported so."""
    path = folder / DESCRIPTION
    description = json.loads(path.read_text())
    for name in description["sha256"]:
        with (folder / name).open("rb") as file:
            description["sha256"][name] = hashlib.file_digest(file, "sha256").hexdigest()
    path.write_text(json.dumps(description, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m rlinf_core.testing.triage", description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, help="a run's folder, runs/<name>")
    parser.add_argument("--plant", metavar="NAME", help="the mistake; without it, all are listed")
    parser.add_argument("--output", type=Path, metavar="DIR", help="the folder to write")
    parser.add_argument("--dataset", default="", help="episodes of the site; default: those that the run held out")
    parser.add_argument("--episodes", type=int, default=EPISODES, help=f"most episodes to copy; default: {EPISODES}")
    parser.add_argument("--cameras", nargs="+", default=(), metavar="COLUMN", help="image columns")
    parser.add_argument("--numbers", nargs="+", type=int, default=(), metavar="N", help="numbers of state or action")
    parser.add_argument("--factor", type=float, help="of units, sizes, rates")
    options = parser.parse_args(arguments)
    if not options.plant:
        print_table(("mistake", "what it does", "test"), [(one.name, one.what, one.test) for one in PLANTS])
        return Exit.OK
    if options.run is None or options.output is None:
        parser.error("--plant needs the run and --output")
    settings = Settings(tuple(options.cameras), tuple(options.numbers), options.factor)
    try:
        planted = plant(
            options.plant,
            options.run,
            options.output,
            plugins=get_plugins(),
            dataset=options.dataset,
            settings=settings,
            episodes=options.episodes,
        )
    except UserError as error:
        print_error(str(error))
        return Exit.USER_ERROR
    print_text(planted.command)
    return Exit.OK


if __name__ == "__main__":
    sys.exit(main())
