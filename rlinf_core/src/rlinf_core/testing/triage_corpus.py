"""All mistakes planted for one run, and what `rlinf triage` names: `python -m rlinf_core.testing.triage_corpus RUN`.

It prints the table of docs/triage.md, a row as soon as a mistake was triaged.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rlinf_core.commands.output import print_error, print_text
from rlinf_core.errors import Exit, UserError
from rlinf_core.plugins.registry import Plugins, get_plugins
from rlinf_core.testing.plants import PLANTS, Plant, find_plant
from rlinf_core.testing.triage import EPISODES, Planted, plant
from rlinf_core.triage.chain import Triage, run_tests
from rlinf_core.triage.opening import open_scene
from rlinf_core.triage.scene import Execution

SHARED = ("pipeline", "names", "wide", "likeness", "stand_in", "baseline", "action_spread", "on_training")
"""What a scene reads of the training data: the same beside every site."""


class Lab:
    """A run, and what those tests find that do not look at a site: they find the same beside every site.

    Args:
        run: The run's folder.
        plugins: Plugins that provide its classes.
    """

    def __init__(self, run: Path, plugins: Plugins) -> None:
        self.run, self.plugins = run, plugins
        self.scene = open_scene(run, plugins=plugins)
        self.found = run_tests(self.scene, plugins)

    def at(self, dataset: Path) -> Triage:
        """What `rlinf triage` finds at a site."""
        scene = replace(self.scene, site=open_scene(self.run, plugins=self.plugins, dataset=str(dataset)).site)
        vars(scene).update({name: value for name, value in vars(self.scene).items() if name in SHARED})
        findings = [
            replace(one, outcome=one.test().run(scene)) if one.test.needs_site else one for one in self.found.findings
        ]
        return Triage(tuple(findings))

    def of(self, planted: Planted) -> Triage:
        """What is found for a planted mistake."""
        if planted.dataset:
            return self.at(planted.dataset)
        execution = Execution(int(planted.arguments[1])) if planted.arguments else None
        origin = None if planted.policy == self.run else self.run
        scene = open_scene(planted.policy, plugins=self.plugins, run=origin, execution=execution)
        return run_tests(scene, self.plugins)


@dataclass(frozen=True)
class Named:
    """A mistake that was planted, and what was named."""

    plant: Plant
    test: str
    """The test that named a cause; empty: none did."""
    sentence: str

    @property
    def right(self) -> bool:
        """Whether the mistake was named first."""
        return self.test == self.plant.test

    @property
    def row(self) -> str:
        """A row of the table, as Markdown."""
        named = f"yes (`{self.test}`)" if self.right else self.test or "no"
        return f"| {self.plant.name} | {self.plant.what} | {named} | {self.sentence.replace('|', '/')} |"


HEAD = "| mistake | what is planted | named first | what `rlinf triage` says |\n|---|---|---|---|"
"""The head of the table."""


def plant_all(
    lab: Lab, folder: Path, names: Sequence[str] = (), episodes: int = EPISODES
) -> Iterator[tuple[Plant, Named | str]]:
    """Plant mistakes one after another.

    Args:
        lab: The run.
        folder: Where planted datasets and folders are written.
        names: Which mistakes; default: all.
        episodes: Episodes of a planted dataset, at most.

    Yields:
        The mistake, and what was named, or why the run cannot have it.
    """
    for one in PLANTS:
        if names and one.name not in names:
            continue
        try:
            planted = plant(one.name, lab.run, folder / one.name, plugins=lab.plugins, episodes=episodes)
        except UserError as error:
            yield one, str(error)
            continue
        cause = lab.of(planted).cause
        yield one, Named(one, cause.test.name if cause else "", cause.outcome.sentence if cause else "no cause")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m rlinf_core.testing.triage_corpus", description=__doc__)
    parser.add_argument("run", type=Path, help="a run's folder, runs/<name>")
    parser.add_argument("--plant", nargs="+", default=(), metavar="NAME", help="only these mistakes; default: all")
    parser.add_argument("--episodes", type=int, default=EPISODES, help=f"most episodes to copy; default: {EPISODES}")
    options = parser.parse_args(arguments)
    right, tried = 0, 0
    try:
        for name in options.plant:
            find_plant(name)
        lab = Lab(options.run, get_plugins())
        print_text(f"without a mistake: {lab.found.sentence}\n\n{HEAD}")
        with tempfile.TemporaryDirectory(prefix="triage-") as folder:
            for one, found in plant_all(lab, Path(folder), options.plant, options.episodes):
                if isinstance(found, str):
                    print_text(f"| {one.name} | {one.what} | not planted | {found} |")
                    continue
                right, tried = right + found.right, tried + 1
                print_text(found.row)
    except UserError as error:
        print_error(str(error))
        return Exit.USER_ERROR
    print_text(f"\n{right} of {tried} named first")
    return Exit.OK


if __name__ == "__main__":
    sys.exit(main())
