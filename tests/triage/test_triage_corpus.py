"""The corpora: every mistake planted in a small policy's data or folder is named first, and sound sites have no cause.

`pytest -m slow tests/triage -s` prints the table of docs/triage.md. It trains the policy, which takes five minutes on
two cores; `RLINF_TRIAGE_RUN` names the folder of a run that is kept between calls.
"""

import os
from pathlib import Path
from time import process_time

import pytest
import small_arm
from distributions import entry_point, repository_entry_points

from rlinf_core.config.load import load_config
from rlinf_core.plugins.registry import DATASET_GROUP, PLUGIN_GROUP, Plugins
from rlinf_core.testing.triage import plant
from rlinf_core.testing.triage_corpus import HEAD, Lab, Named, plant_all
from rlinf_core.training.distributed.processes import processes
from rlinf_core.training.run_folder import prepare_folder
from rlinf_core.triage.chain import run_tests
from rlinf_core.triage.opening import open_scene

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


@pytest.fixture(scope="module")
def lab(run, plugins):
    return Lab(run, plugins)


def test_planted_mistakes_are_named_first(lab, tmp_path):
    rows, right = [], 0
    for _, found in plant_all(lab, tmp_path):
        assert isinstance(found, Named), found
        rows.append(found.row)
        right += found.right
        print(found.row, flush=True)
    print("", HEAD, *rows, f"{right} of {len(rows)} named first", sep="\n")
    assert right >= MUST * len(rows)


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
