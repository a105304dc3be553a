"""Where a run starts, and what it refuses to mix or overwrite (contract 9)."""

import json
import os
from dataclasses import asdict

import pytest

from rlinf_core.config.load import load_config
from rlinf_core.errors import UserError
from rlinf_core.files import write_text
from rlinf_core.training.position import Position
from rlinf_core.training.resume import hold_folder, prepare_folder, put_back, remove_replaced


@pytest.fixture
def run(tmp_path):
    def make(*overrides):
        settings = [f"runner.output_dir={tmp_path}", "runner.name=r", "runner.max_steps=10", *overrides]
        return load_config("examples/quickstart.toml", settings)

    return make


def checkpoint(run, step):
    """What a checkpoint leaves as far as starting is concerned."""
    path = run.folder / "checkpoints" / f"step_{step:09d}"
    path.mkdir(parents=True)
    position = Position(step=step, epoch=0, sample=0, rows=1, seed=0, layout="", validated=step)
    write_text(path / "state.json", json.dumps(asdict(position)))
    write_text(run.folder / "latest", path.name)


def test_a_new_run_starts_at_zero_and_leaves_its_config(run):
    start = prepare_folder(run(), overwrite=False)
    assert (start.step, start.checkpoint, start.finished) == (0, None, False)
    assert load_config(run().folder / "config.toml") == run()


def test_an_unfinished_run_continues(run):
    prepare_folder(run(), overwrite=False)
    checkpoint(run(), 4)
    start = prepare_folder(run(), overwrite=False)
    assert (start.step, start.checkpoint.name, start.finished) == (4, "step_000000004", False)


def test_a_finished_run_is_finished_until_it_gets_more_steps(run):
    prepare_folder(run(), overwrite=False)
    checkpoint(run(), 10)
    assert prepare_folder(run(), overwrite=False).finished
    assert prepare_folder(run("data.num_workers=0"), overwrite=False).finished
    assert prepare_folder(run("runner.max_steps=12"), overwrite=False).step == 10


def test_a_run_that_was_stopped_before_its_last_validation_is_not_finished(run):
    prepare_folder(run(), overwrite=False)
    checkpoint(run(), 10)
    state = run().folder / "checkpoints" / "step_000000010" / "state.json"
    state.write_text(state.read_text().replace('"validated": 10', '"validated": 0'))
    assert not prepare_folder(run(), overwrite=False).finished
    assert prepare_folder(run("runner.val_check_interval=0"), overwrite=False).finished


@pytest.mark.parametrize("step", [4, 10], ids=["unfinished", "finished"])
def test_another_config_is_refused_with_the_difference(run, step):
    prepare_folder(run(), overwrite=False)
    checkpoint(run(), step)
    with pytest.raises(UserError, match=r"(?s)another config:\n  optim\.lr: .* -> 0\.5\n.*--overwrite"):
        prepare_folder(run("optim.lr=0.5"), overwrite=False)
    assert load_config(run().folder / "config.toml") == run()


def test_before_the_first_step_a_config_may_be_mended(run):
    prepare_folder(run(), overwrite=False)
    assert prepare_folder(run("optim.lr=0.5"), overwrite=False).step == 0
    assert load_config(run().folder / "config.toml") == run("optim.lr=0.5")


def test_steps_without_a_checkpoint_are_not_mixed_with_another_config(run):
    prepare_folder(run(), overwrite=False)
    write_text(run().folder / "metrics.jsonl", '{"step": 1, "loss": 1.0}\n')
    assert prepare_folder(run(), overwrite=False).step == 0
    with pytest.raises(UserError, match=r"optim\.lr"):
        prepare_folder(run("optim.lr=0.5"), overwrite=False)


def test_never_refuses_what_is_there(run):
    prepare_folder(run(), overwrite=False)
    with pytest.raises(UserError, match="--overwrite"):
        prepare_folder(run("runner.resume=never"), overwrite=False)


def test_overwrite_starts_afresh_and_the_old_run_goes_when_the_new_one_is_ready(run):
    prepare_folder(run(), overwrite=False)
    checkpoint(run(), 4)
    start = prepare_folder(run("runner.resume=never"), overwrite=True)
    assert (start.step, start.checkpoint) == (0, None)
    assert not (run().folder / "checkpoints").exists()
    assert (start.replaced / "checkpoints" / "step_000000004").exists()
    remove_replaced(start)
    assert [path.name for path in run().folder.parent.iterdir()] == ["r"]


def test_a_run_whose_successor_never_came_to_train_is_back_in_its_place(run):
    prepare_folder(run(), overwrite=False)
    checkpoint(run(), 4)
    put_back(run(), prepare_folder(run("optim.lr=0.5"), overwrite=True))
    assert prepare_folder(run(), overwrite=False).step == 4
    assert [path.name for path in run().folder.parent.iterdir()] == ["r"]


@pytest.mark.parametrize("killed", [1, 2])
def test_an_overwrite_that_was_killed_before_it_was_ready_has_lost_nothing(run, killed):
    prepare_folder(run(), overwrite=False)
    checkpoint(run(), 4)
    for _ in range(killed):
        start = prepare_folder(run(), overwrite=True)
    assert (start.replaced / "checkpoints" / "step_000000004").exists()


def test_two_processes_do_not_write_one_run(run):
    with hold_folder(run()):
        with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on "), hold_folder(run()):
            pass
        with hold_folder(run("runner.name=other")):
            pass
    with hold_folder(run()):
        pass


def test_an_output_folder_that_cannot_be_is_named(run, tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"runner\.output_dir = .*file"),
        hold_folder(run(f"runner.output_dir={tmp_path / 'file'}")),
    ):
        pass


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_restart_by_torchrun_neither_overwrites_nor_refuses_its_own_run(run, resume):
    mine = run(f"runner.resume={resume}")
    prepare_folder(mine, overwrite=True)
    checkpoint(mine, 4)
    assert prepare_folder(mine, overwrite=True, restarted=True).step == 4


def test_a_folder_that_holds_no_run_is_never_touched(run):
    run().folder.mkdir(parents=True)
    precious = run().folder / "thesis.tex"
    precious.write_text("x")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="holds no run"):
            prepare_folder(run(), overwrite=overwrite)
    assert precious.read_text() == "x"
