"""The corpora: every mistake planted in a small policy's data or folder is named first, and sound sites have no cause.

`pytest -m slow tests/triage -s` prints the table of docs/triage.md. It trains the policy, which takes five minutes on
two cores; `RLINF_TRIAGE_RUN` names the folder of a run that is kept between calls.
"""

import os
from dataclasses import replace
from pathlib import Path
from time import process_time

import pytest
import small_arm
from distributions import entry_point, repository_entry_points

from rlinf_core.config.load import load_config
from rlinf_core.plugins.registry import DATASET_GROUP, PLUGIN_GROUP, Plugins
from rlinf_core.testing.plants import PLANTS
from rlinf_core.testing.triage import plant
from rlinf_core.training.distributed.processes import processes
from rlinf_core.training.run_folder import prepare_folder
from rlinf_core.triage.chain import Triage, run_tests
from rlinf_core.triage.opening import open_scene
from rlinf_core.triage.scene import Execution

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

CONFIG = """\
[runner]
name = "arm"
output_dir = "{folder}/runs"
max_steps = 1100
save_interval = 1100
val_check_interval = 550
val_samples = 128
[data]
config_name = "small_arm"
repo_id = "{folder}/arm"
validation_fraction = 0.1
num_workers = 0
[optim]
decay_steps = 1100
min_lr = 2e-3
ema_decay = 0.99
[trainer]
device = "cpu"
global_batch_size = 64
micro_batch_size = 64
param_dtype = "fp32"
"""
MUST = 0.8
"""Share of the mistakes that must be named first."""
SOUND = 10
SECONDS = 300
"""CPU time that a triage may take."""


@pytest.fixture(scope="module")
def plugins():
    own = [entry_point(PLUGIN_GROUP, "arm", small_arm), entry_point(DATASET_GROUP, "small_arm", small_arm.SmallArm)]
    return Plugins([*repository_entry_points(), *own])


@pytest.fixture(scope="module")
def run(tmp_path_factory, plugins):
    """The folder of a trained run."""
    kept = os.environ.get("RLINF_TRIAGE_RUN")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("triage")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "arm").exists():
        small_arm.write(folder / "arm", episodes=150, seed=1)
    (folder / "config.toml").write_text(CONFIG.format(folder=folder))
    config = load_config(folder / "config.toml", [], plugins)
    start = prepare_folder(config, overwrite=False)
    if not start.finished:
        with processes("cpu") as group:
            config.trainer.build(config, start=start, group=group, plugins=plugins).train()
    return folder / "runs/arm"


class Lab:
    """The run, and what its tests found that do not look at a site: they find the same beside every site."""

    SHARED = ("pipeline", "names", "wide", "likeness", "stand_in", "baseline", "action_spread", "on_training")

    def __init__(self, run, plugins):
        self.run, self.plugins = run, plugins
        self.scene = open_scene(run, plugins=plugins)
        self.found = run_tests(self.scene, plugins)

    def at(self, dataset):
        """What `rlinf triage` finds at a site."""
        site = open_scene(self.run, plugins=self.plugins, dataset=str(dataset)).site
        scene = replace(self.scene, site=site)
        vars(scene).update({name: value for name, value in vars(self.scene).items() if name in self.SHARED})
        findings = [
            replace(one, outcome=one.test().run(scene)) if one.test.needs_site else one for one in self.found.findings
        ]
        return Triage(tuple(findings))

    def of(self, planted):
        """What is found for a planted mistake."""
        if planted.dataset:
            return self.at(planted.dataset)
        execution = Execution(int(planted.arguments[1])) if planted.arguments else None
        return run_tests(open_scene(planted.policy, plugins=self.plugins, execution=execution), self.plugins)


@pytest.fixture(scope="module")
def lab(run, plugins):
    return Lab(run, plugins)


def test_planted_mistakes_are_named_first(lab, tmp_path):
    lines, right = [], 0
    for one in PLANTS:
        found = lab.of(plant(one.name, lab.run, tmp_path / one.name, plugins=lab.plugins))
        name = found.cause.test.name if found.cause else ""
        right += name == one.test
        said = found.cause.outcome.sentence if found.cause else "no cause"
        lines.append(f"| {one.name} | {one.what} | {'yes' if name == one.test else name or 'no'} | {said} |")
        print(lines[-1], flush=True)
    print("\n| mistake | what is planted | named first | what triage says |\n|---|---|---|---|", *lines, sep="\n")
    print(f"{right} of {len(PLANTS)} named first")
    assert right >= MUST * len(PLANTS)


def test_sound_sites_have_no_cause_and_at_most_one_suspicion(lab, tmp_path):
    for seed in range(300, 300 + SOUND):
        found = lab.at(small_arm.write(tmp_path / str(seed), episodes=12 + seed % 7, seed=seed))
        suspicious = [one.test.name for one in found.findings if one.outcome.verdict == "suspicious"]
        assert found.cause is None, found.sentence
        assert len(suspicious) <= 1, suspicious


def test_a_triage_takes_minutes(run, plugins, tmp_path):
    """CPU time of this process, whose torch has one thread."""
    planted = plant("rotated", run, tmp_path / "site", plugins=plugins)
    started = process_time()
    found = run_tests(open_scene(run, plugins=plugins, dataset=str(planted.dataset)), plugins)
    assert found.cause.test.name == "cameras"
    assert process_time() - started < SECONDS
