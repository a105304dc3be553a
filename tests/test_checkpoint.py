"""Checkpoints: whole or not at all, the newest few kept, refused where they do not fit."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from rlinf_core.errors import UserError
from rlinf_core.training import checkpoint
from rlinf_core.training.distributed import processes
from rlinf_core.training.position import FORMAT, Position, latest, read_position


@pytest.fixture
def group(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with processes() as group:
        yield group


def position(step, layout="a", rows=10):
    return Position(step=step, epoch=0, sample=0, rows=rows, seed=0, layout=layout)


def test_save_and_load_are_bit_equal_and_keep_the_newest(tmp_path, group):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, position(step), {"w": torch.full((3, 2), step / 3)}, group, keep_last=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_000000002", "step_000000003"]
    newest = latest(tmp_path)
    loaded = {"w": torch.zeros(3, 2)}
    assert checkpoint.load(newest, loaded, layout="a", rows=10).step == 3
    assert torch.equal(loaded["w"], torch.full((3, 2), 3 / 3))


def test_another_layout_or_other_data_is_refused(tmp_path, group):
    path = checkpoint.save(tmp_path, position(1), {"w": torch.ones(2)}, group, keep_last=2)
    with pytest.raises(UserError, match="another layout"):
        checkpoint.load(path, {"w": torch.ones(2)}, layout="b", rows=10)
    with pytest.raises(UserError, match="10 rows, but the training split now has 11"):
        checkpoint.load(path, {"w": torch.ones(2)}, layout="a", rows=11)


def test_saving_a_step_again_replaces_it(tmp_path, group):
    for value in (1.0, 2.0):
        path = checkpoint.save(tmp_path, position(1), {"w": torch.full((2,), value)}, group, keep_last=2)
    loaded = {"w": torch.zeros(2)}
    checkpoint.load(path, loaded, layout="a", rows=10)
    assert loaded["w"].tolist() == [2.0, 2.0]


def test_checkpoints_after_the_one_that_somebody_went_back_to_are_kept(tmp_path, group):
    for step in (100, 200, 300):
        checkpoint.save(tmp_path, position(step), {"w": torch.ones(2)}, group, keep_last=2)
    (tmp_path / "latest").write_text("step_000000200")
    checkpoint.save(tmp_path, position(250), {"w": torch.ones(2)}, group, keep_last=1)
    assert latest(tmp_path).name == "step_000000250"
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_000000250", "step_000000300"]


def test_what_a_crash_left_of_a_save_is_removed_by_the_next(tmp_path, group):
    (tmp_path / "checkpoints" / ".step_000000001.tmp").mkdir(parents=True)
    checkpoint.save(tmp_path, position(2), {"w": torch.ones(2)}, group, keep_last=1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_000000002"]


def test_a_damaged_state_is_named_with_the_way_out(tmp_path, group):
    path = checkpoint.save(tmp_path, position(1), {"w": torch.ones(2)}, group, keep_last=1)
    for text in ("{", "[]", f'{{"format": {FORMAT}}}'):
        (path / "state.json").write_text(text)
        with pytest.raises(UserError, match=r"state\.json is damaged"):
            read_position(path)


def test_a_run_without_checkpoints_has_no_latest(tmp_path):
    assert latest(tmp_path) is None


def test_a_missing_checkpoint_is_named(tmp_path):
    (tmp_path / "latest").write_text("step_000000007")
    with pytest.raises(UserError, match="step_000000007"):
        latest(tmp_path)


def test_a_kill_while_saving_leaves_the_checkpoint_before(tmp_path):
    """The process kills itself when the shards of step 2 are written but nothing is renamed yet."""
    script = textwrap.dedent(
        f"""
        import os, signal, torch
        from pathlib import Path
        from rlinf_core.training import checkpoint
        from rlinf_core.training.distributed import processes
        from rlinf_core.training.position import Position
        folder = Path({str(tmp_path)!r})
        def position(step):
            return Position(step=step, epoch=0, sample=0, rows=1, seed=0, layout="a")
        with processes() as group:
            checkpoint.save(folder, position(1), {{"w": torch.ones(2)}}, group, keep_last=1)
            checkpoint.write_text = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            checkpoint.save(folder, position(2), {{"w": torch.zeros(2)}}, group, keep_last=1)
        """
    )
    environment = {key: value for key, value in os.environ.items() if key != "RANK"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    newest = latest(tmp_path)
    assert newest.name == "step_000000001"
    assert read_position(newest).step == 1
