"""Checkpoints that are torn or flipped after they were written: the one before is used, and the run says so."""

import os
import shutil

import pytest
from distributions import entry_point, repository_entry_points
from faulty import FaultyData, assert_same

from rlinf_core.config.load import load_config
from rlinf_core.plugins.registry import DATASET_GROUP, PLUGIN_GROUP, Plugins
from rlinf_core.training.resume import decide_start
from rlinf_core.training.run_folder import read_folder, verify_start

FILES = ("__0_0.distcp", "__1_0.distcp", ".metadata", "image_files.json", "norm_stats.json", "state.json")


def tear(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


class OneRank:
    """A process group with this process as its only member."""

    rank, size = 0, 1

    def gather(self, value):
        return [value]

    def decide(self, decision):
        return decision()


def checkpoint(folder, step):
    return folder / "checkpoints" / f"step_{step:09d}"


@pytest.mark.parametrize("damage", [tear, flip])
def test_damage_of_any_file_is_found_and_the_checkpoint_before_is_used(faulty_site, left_alone, tmp_path, damage):
    import faulty

    plugins = Plugins(
        [
            *repository_entry_points(),
            entry_point(PLUGIN_GROUP, "faulty", faulty, "faulty"),
            entry_point(DATASET_GROUP, "faulty", FaultyData, "faulty"),
        ]
    )
    run = load_config(faulty_site / "faulty.toml", [f"runner.output_dir={tmp_path}", "runner.max_steps=18"], plugins)
    whole = left_alone(12)
    assert {path.name for path in checkpoint(whole, 12).iterdir()} == set(FILES)
    for name in FILES:
        shutil.copytree(whole, run.folder)
        damage(checkpoint(run.folder, 12) / name)
        start = verify_start(run, OneRank(), decide_start(run, read_folder(run)))
        assert start.step == 9, name
        notes = [note for note in start.notes if note.startswith("warning: the checkpoint step_000000012 is damaged")]
        assert name in notes[0]
        shutil.rmtree(run.folder)


@pytest.mark.slow
def test_a_run_whose_newest_two_are_damaged_ends_as_if_nothing_had_happened(runs, left_alone):
    shutil.copytree(left_alone(12), runs.folder)
    flip(checkpoint(runs.folder, 12) / "__1_0.distcp")
    tear(checkpoint(runs.folder, 9) / "__0_0.distcp")
    ended = runs.start(18)
    assert ended.returncode == 0, ended.stderr
    assert "the checkpoint step_000000012 is damaged: the content of __1_0.distcp has changed" in ended.stdout
    assert "the checkpoint step_000000009 is damaged: __0_0.distcp has" in ended.stdout
    assert "continues at step 6" in ended.stdout
    assert_same(runs.folder, left_alone(18), 18)
