"""Checkpoints: written atomically while training continues, the newest few kept, refused if they do not fit."""

import errno
import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace

import pytest
import torch

from rlinf_core.errors import UserError
from rlinf_core.training.checkpoint import shards
from rlinf_core.training.checkpoint import writer as saving
from rlinf_core.training.checkpoint.load import load
from rlinf_core.training.checkpoint.manager import Checkpoints
from rlinf_core.training.checkpoint.state import (
    Position,
    State,
    candidates,
    dump_state,
    find_damage,
    newest_whole,
    none_whole,
    read_position,
    read_state,
)
from rlinf_core.training.checkpoint.writer import CheckpointFolder, Retention
from rlinf_core.training.distributed.processes import processes
from rlinf_core.training.stopping import seconds_from_now


@pytest.fixture
def group(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with processes("cpu") as group:
        yield group


def position(step, layout="a", rows=10):
    return Position(step=step, epoch=0, sample=0, rows=rows, seed=0, layout=layout)


@pytest.fixture
def open_checkpoints(tmp_path, group):
    """Checkpoints of a run in `tmp_path`, and the one tensor that they hold."""

    def open_checkpoints(keep_last=2, keep_every=0, rename=True, **options):
        tensors = {"w": torch.zeros(3, 2)}
        where = CheckpointFolder(tmp_path, tmp_path / "checkpoints", Retention(keep_last, keep_every), rename)
        return Checkpoints(where, group, tensors, **options), tensors["w"]

    return open_checkpoints


def there(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def names(*steps):
    return [f"step_{step:09d}" for step in steps]


def newest(folder):
    found = newest_whole(candidates(folder, folder / "checkpoints"), {})
    return found and found[0]


def whole(path):
    return find_damage(path, ranks=1) == ""


@pytest.mark.parametrize("in_background", [True, False], ids=["background", "waiting"])
@pytest.mark.parametrize("rename", [True, False], ids=["rename", "in place"])
def test_save_and_load_are_bit_equal_and_keep_the_newest(tmp_path, open_checkpoints, in_background, rename):
    checkpoints, w = open_checkpoints(in_background=in_background, rename=rename)
    for step in (1, 2, 3):
        w.fill_(step / 3)
        checkpoints.save(position(step))
        w.fill_(-1.0)  # Training goes on.
    checkpoints.finish()
    assert there(tmp_path) == names(2, 3)
    assert [saved.step for saved in checkpoints.finished()] == [1, 2, 3]
    for step, path in zip((2, 3), sorted((tmp_path / "checkpoints").iterdir()), strict=True):
        assert whole(path)
        loaded = {"w": torch.zeros(3, 2)}
        assert load(path, loaded, position(step)).step == step
        assert torch.equal(loaded["w"], torch.full((3, 2), step / 3))


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, open_checkpoints, monkeypatch):
    go_on, complete = threading.Event(), saving._complete
    monkeypatch.setattr(saving, "_complete", lambda *arguments: go_on.wait(60) and complete(*arguments))
    checkpoints, w = open_checkpoints()
    checkpoints.save(position(1))
    assert checkpoints.finished() == []
    assert newest(tmp_path) is None
    assert not checkpoints.wait(lambda: 0.0)
    go_on.set()
    checkpoints.finish()
    (saved,) = checkpoints.finished()
    assert (saved.step, saved.failure, saved.path) == (1, "", newest(tmp_path))
    assert saved.bytes == sum(entry.bytes for entry in read_state(saved.path).files.values()) > w.nbytes


def test_another_layout_or_other_data_is_refused(tmp_path, open_checkpoints):
    checkpoints, w = open_checkpoints()
    checkpoints.save(position(1))
    checkpoints.finish()
    path = newest(tmp_path)
    for here, complaint in (
        (position(1, layout="b"), "another layout"),
        (position(1, rows=11), "10 rows, but the training split now has 11"),
        (replace(position(1), sample=4), r"trainer\.global_batch_size"),
    ):
        with pytest.raises(UserError, match=complaint):
            load(path, {"w": w}, here)
    with pytest.raises(
        UserError, match=r"does not hold ema\.w, which this config trains or averages: optim\.type, optim\.ema_decay"
    ):
        load(path, {"w": w, "ema.w": w.clone()}, position(1))


def test_saving_a_step_again_replaces_it(tmp_path, open_checkpoints):
    for rename in (True, False):
        checkpoints, w = open_checkpoints(rename=rename)
        for value in (1.0, 2.0):
            w.fill_(value)
            checkpoints.save(position(1))
        checkpoints.finish()
        loaded = {"w": torch.zeros(3, 2)}
        load(newest(tmp_path), loaded, position(1))
        assert loaded["w"].unique().tolist() == [2.0]


def test_every_so_many_steps_and_the_best_are_kept_for_good(tmp_path, open_checkpoints):
    checkpoints, _ = open_checkpoints(keep_last=1, keep_every=200)
    for step in (100, 200, 300, 400, 500):
        checkpoints.save(position(step), best="step_000000300" if step >= 300 else "")
    checkpoints.finish()
    assert there(tmp_path) == names(200, 300, 400, 500)
    assert (tmp_path / "best").read_text() == "step_000000300"
    assert (tmp_path / "latest").read_text() == "step_000000500"


def test_checkpoints_after_the_one_that_somebody_went_back_to_are_set_aside(tmp_path, open_checkpoints):
    """Else one of them could stand in for a damaged one, once the run has come past its step."""
    checkpoints, _ = open_checkpoints(keep_last=5)
    for step in (100, 200, 300, 400):
        checkpoints.save(position(step))
    checkpoints.finish()
    (tmp_path / "latest").write_text("step_000000200")
    checkpoints, _ = open_checkpoints(keep_last=5, last_good="step_000000200")
    assert there(tmp_path) == names(100, 200, 300, 400)
    checkpoints.save(position(350))
    checkpoints.finish()
    assert newest(tmp_path).name == "step_000000350"
    assert there(tmp_path) == [*names(100, 200), "step_000000300.aside", *names(350), "step_000000400.aside"]


@pytest.mark.parametrize("rename", [True, False], ids=["rename", "in place"])
def test_what_a_run_has_neither_written_nor_loaded_is_never_replaced(tmp_path, open_checkpoints, capsys, rename):
    """The storage was away when the second run started, so that it starts from scratch; then it is back."""
    checkpoints, w = open_checkpoints(rename=rename)
    w.fill_(1.0)
    for step in (2, 3):
        checkpoints.save(position(step))
    checkpoints.finish()
    (tmp_path / "checkpoints").rename(tmp_path / "away")
    (tmp_path / "checkpoints").mkdir()
    checkpoints, w = open_checkpoints(keep_last=1, rename=rename)
    checkpoints.save(position(1))
    checkpoints.wait()
    for step in (2, 3):
        (tmp_path / "away" / f"step_{step:09d}").rename(tmp_path / "checkpoints" / f"step_{step:09d}")
    checkpoints.save(position(2))
    checkpoints.finish()
    assert there(tmp_path) == ["step_000000002", "step_000000002.aside", "step_000000003.aside"]
    for name, value in (("step_000000002", 0.0), ("step_000000002.aside", 1.0), ("step_000000003.aside", 1.0)):
        path = tmp_path / "checkpoints" / name
        assert whole(path)
        load(path, {"w": w}, read_position(path))
        assert w.unique().tolist() == [value]
    assert capsys.readouterr().err.count(".aside: remove it if you do not need it") == 2


@pytest.mark.parametrize("rename", [True, False], ids=["rename", "in place"])
def test_an_old_checkpoint_that_cannot_be_removed_is_no_failed_save(
    tmp_path, open_checkpoints, monkeypatch, capsys, rename
):
    checkpoints, _ = open_checkpoints(keep_last=1, rename=rename)
    remove = saving.shutil.rmtree

    def refuse(path, **options):
        if path.name == "step_000000001":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
        remove(path, **options)

    monkeypatch.setattr(saving.shutil, "rmtree", refuse)
    for step in (1, 2):
        checkpoints.save(position(step))
    checkpoints.finish()
    assert [saved.failure for saved in checkpoints.finished()] == ["", ""]
    assert "step_000000001 cannot be removed: Device or resource busy" in capsys.readouterr().err
    assert newest(tmp_path).name == "step_000000002"
    assert whole(newest(tmp_path))


@pytest.mark.parametrize("rename", [True, False], ids=["rename", "in place"])
def test_a_validation_that_was_made_up_for_is_recorded(tmp_path, open_checkpoints, rename):
    checkpoints, _ = open_checkpoints(rename=rename)
    checkpoints.save(position(1))
    checkpoints.finish()
    checkpoints.restate(replace(position(1), validated=1), "step_000000001")
    assert read_position(newest(tmp_path)).validated == 1
    assert whole(newest(tmp_path))
    assert (tmp_path / "best").read_text() == "step_000000001"


def test_what_a_crash_left_of_a_save_is_removed_by_the_next(tmp_path, open_checkpoints):
    (tmp_path / "checkpoints" / ".step_000000001.tmp").mkdir(parents=True)
    checkpoints, _ = open_checkpoints()
    checkpoints.save(position(2))
    checkpoints.finish()
    assert there(tmp_path) == names(2)


def test_a_run_without_checkpoints_has_no_newest(tmp_path):
    assert newest(tmp_path) is None


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "flipped shard": (lambda path: flip(path / "__0_0.distcp"), "the content of __0_0.distcp has changed"),
    "short shard": (lambda path: os.truncate(path / "__0_0.distcp", 100), "__0_0.distcp has 100 bytes instead of"),
    "missing shard": (lambda path: (path / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "missing index": (lambda path: (path / ".metadata").unlink(), ".metadata is missing"),
    "no state": (lambda path: (path / "state.json").unlink(), "it was never completed"),
    "empty state": (lambda path: (path / "state.json").write_text(""), "state.json cannot be read"),
    "another step": (
        lambda path: (path / "state.json").write_text((path / "state.json").read_text().replace(": 2,", ": 3,", 1)),
        "the text of state.json does not match its hash",
    ),
    "a list": (lambda path: (path / "state.json").write_text("[]"), "state.json cannot be read"),
}


@pytest.mark.parametrize(("damage", "why"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_recognised_and_named(tmp_path, open_checkpoints, damage, why):
    checkpoints, _ = open_checkpoints()
    for step in (1, 2):
        checkpoints.save(position(step))
    checkpoints.finish()
    path = newest(tmp_path)
    assert whole(path)
    damage(path)
    assert why in find_damage(path, ranks=1)
    damaged = {path.name: why}
    assert newest_whole(candidates(tmp_path, tmp_path / "checkpoints"), damaged)[0].name == "step_000000001"


def test_ranks_share_the_files_that_they_check(tmp_path):
    files = {f"{index}": b"x" * index for index in range(5)}
    sums = {}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        file = shards.HashedFile((tmp_path / name).open("wb"))
        file.write(data)
        file.close()
        sums[name] = file.digest()
    (tmp_path / "state.json").write_text(dump_state(State(position(1), sums)))
    flip(tmp_path / "3")
    assert sorted(bool(find_damage(tmp_path, rank=rank, ranks=3)) for rank in range(3)) == [False, False, True]
    assert find_damage(tmp_path) == ""


def test_no_checkpoint_left_is_an_error_that_names_all(tmp_path, open_checkpoints):
    checkpoints, _ = open_checkpoints()
    for step in (1, 2):
        checkpoints.save(position(step))
    checkpoints.finish()
    for name in names(1, 2):
        (tmp_path / "checkpoints" / name / "state.json").unlink()
    damaged = {}
    assert newest_whole(candidates(tmp_path, tmp_path / "checkpoints"), damaged) is None
    error = str(none_whole(tmp_path / "checkpoints", damaged, "Restore one."))
    lines = r"(?s)continued from:\n  step_000000002: it has no state.*\n  step_000000001: it has no .*\nRestore one\."
    assert re.search(lines, error)


def test_a_missing_checkpoint_is_named(tmp_path):
    (tmp_path / "latest").write_text("step_000000007")
    damaged = {}
    assert newest_whole(candidates(tmp_path, tmp_path / "checkpoints"), damaged) is None
    assert damaged == {"step_000000007": "it does not exist"}


def test_another_format_is_no_damage(tmp_path, open_checkpoints):
    checkpoints, _ = open_checkpoints()
    checkpoints.save(position(1))
    checkpoints.finish()
    state = newest(tmp_path) / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"format": 3}))
    with pytest.raises(UserError, match="has checkpoint format 3; this version reads 4"):
        newest(tmp_path)


class Harm:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def test_an_index_that_would_run_code_is_refused(tmp_path, open_checkpoints, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints, w = open_checkpoints()
    checkpoints.save(position(1))
    checkpoints.finish()
    path = newest(tmp_path)
    (path / ".metadata").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(UserError, match=r"\.metadata cannot be read: it names \w+\.system"):
        load(path, {"w": w}, position(1))
    metadata = shards.ShardReader(path)
    assert not (tmp_path / "harmed").exists()
    del metadata


def test_an_index_does_not_lead_out_of_its_folder(tmp_path, open_checkpoints):
    checkpoints, w = open_checkpoints()
    checkpoints.save(position(1))
    checkpoints.finish()
    index = newest(tmp_path) / ".metadata"
    metadata = shards.ShardReader(index.parent).read_metadata()
    for entry in metadata.storage_data.values():
        entry.relative_path = "../step_000000001/__0_0.distcp"
    index.write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="outside of the checkpoint"):
        load(index.parent, {"w": w}, position(1))


def fill_disk(monkeypatch, full):
    """Writing shards fails as on a full disk, as long as `full` holds something."""
    write = shards.HashedFile.write

    def write_if_there_is_room(self, data):
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, data)

    monkeypatch.setattr(shards.HashedFile, "write", write_if_there_is_room)


def test_a_full_disk_leaves_the_last_good_one_and_the_run_alive(tmp_path, open_checkpoints, monkeypatch):
    full = []
    fill_disk(monkeypatch, full)
    checkpoints, w = open_checkpoints()
    w.fill_(1.0)
    checkpoints.save(position(1))
    checkpoints.wait()
    full.append(True)
    checkpoints.save(position(2))
    checkpoints.wait()
    assert [(saved.step, "No space left" in saved.failure) for saved in checkpoints.finished()] == [
        (1, False),
        (2, True),
    ]
    assert there(tmp_path) == names(1)
    full.clear()
    checkpoints.save(position(3))
    checkpoints.finish()
    assert there(tmp_path) == names(1, 3)
    assert all(whole(path) for path in (tmp_path / "checkpoints").iterdir())


def test_a_disk_that_stays_full_ends_the_run_with_the_last_good_one_named(tmp_path, open_checkpoints, monkeypatch):
    full = []
    fill_disk(monkeypatch, full)
    checkpoints, _ = open_checkpoints()
    checkpoints.save(position(1))
    checkpoints.wait()
    full.append(True)
    checkpoints.save(position(2))
    with pytest.raises(UserError, match=r"No space left.*step_000000001 is the last good one"):
        checkpoints.save(position(3))
    assert "NOT SAVED" in str(checkpoints.finished()[-1])


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(tmp_path, open_checkpoints, monkeypatch):
    fill_disk(monkeypatch, [True])
    checkpoints, _ = open_checkpoints(last_good="step_000000007")
    checkpoints.save(position(8))
    with pytest.raises(UserError, match="step_000000007 is the last good one"):
        checkpoints.finish()


def test_a_disk_that_really_is_full_is_an_oserror(tmp_path, open_checkpoints):
    """torch.save turns errors of the file into one of its own; a limit on the size of files is like a full disk."""
    import resource

    checkpoints, _ = open_checkpoints()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, before[1]))
    try:
        checkpoints.save(position(1))
        checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (saved,) = checkpoints.finished()
    assert "File too large" in saved.failure
    assert there(tmp_path) == []


def test_a_defect_while_writing_is_raised_where_training_waits(open_checkpoints, monkeypatch):
    monkeypatch.setattr(saving, "_complete", lambda *_: 1 / 0)
    checkpoints, _ = open_checkpoints()
    checkpoints.save(position(1))
    with pytest.raises(ZeroDivisionError):
        checkpoints.finish()


def test_a_kill_while_saving_leaves_the_checkpoint_before(tmp_path):
    """The process kills itself when the shards of step 2 are written but nothing is renamed yet."""
    script = textwrap.dedent(
        f"""
        import os, signal, torch
        from pathlib import Path
        from rlinf_core.training.checkpoint import writer as saving
        from rlinf_core.training.checkpoint.manager import Checkpoints
        from rlinf_core.training.distributed.processes import processes
        from rlinf_core.training.checkpoint.state import Position
        folder = Path({str(tmp_path)!r})
        def position(step):
            return Position(step=step, epoch=0, sample=0, rows=1, seed=0, layout="a")
        with processes() as group:
            where = saving.CheckpointFolder(folder, folder / "checkpoints", saving.Retention(1))
            checkpoints = Checkpoints(where, group, {{"w": torch.ones(2)}})
            checkpoints.save(position(1))
            checkpoints.wait()
            saving.write_text = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            checkpoints.save(position(2))
            checkpoints.wait()
        """
    )
    environment = {key: value for key, value in os.environ.items() if key != "RANK"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    path = newest(tmp_path)
    assert path.name == "step_000000001"
    assert read_position(path).step == 1
    assert whole(path)


def test_ranks_agree_on_what_was_saved_what_failed_and_what_is_damaged(tmp_path, start_ranks):
    (tmp_path / "saved").mkdir()
    result = start_ranks("checkpoint_ranks:main", 2, tmp_path)
    assert result.returncode == 0, result.stderr
    first, second = json.loads((tmp_path / "seen.json").read_text())
    assert first == second
    assert [step for step, failure in first["told"] if not failure] == [1, 2]
    assert first["told"][2] == [3, "rank 1: No space left on device"]
    assert "rank 1: No space left on device. step_000000002 is the last good one." in first["end"]
    assert first["there"] == names(1, 2)
    assert first["loaded"]
    assert len(first["damage"]) == 1
    assert "__1_0.distcp" in first["damage"][0]
    [apart] = first["apart"]
    assert (
        f"rank 1 on {socket.gethostname()} has written in {tmp_path}/own_0/checkpoints/.step_000000005.tmp: " in apart
    )
    assert "__1_0.distcp: there is no such file. Check that both machines have the shared folder mounted" in apart
    assert first["named"] == []


def test_a_save_that_takes_too_long_is_left_behind(tmp_path, open_checkpoints, monkeypatch):
    go_on, complete = threading.Event(), saving._complete
    checkpoints, _ = open_checkpoints()
    checkpoints.save(position(1))
    checkpoints.wait()
    monkeypatch.setattr(saving, "_complete", lambda *arguments: go_on.wait(60) and complete(*arguments))
    checkpoints.save(position(2), left=seconds_from_now(0.1))
    assert not checkpoints.finish(seconds_from_now(0.1), cut_short=True)
    assert not checkpoints.finish()  # Nobody waits a second time.
    told = [str(saved) for saved in checkpoints.finished()]
    assert "saved" in told[0]
    assert "the run had to exit before it was written. step_000000001 is the last good one" in told[1]
    assert newest(tmp_path).name == "step_000000001"
    go_on.set()
    assert checkpoints.wait()


def test_export_takes_the_newest_whole_one_but_no_other_than_asked_for(tmp_path, open_checkpoints):
    from rlinf_core.export import Choice, find_checkpoint

    checkpoints, _ = open_checkpoints(keep_last=3)
    for step in (1, 2, 3):
        checkpoints.save(position(step))
    checkpoints.finish()
    flip(tmp_path / "checkpoints" / "step_000000003" / "__0_0.distcp")
    said = []
    found = find_checkpoint(tmp_path, tmp_path / "checkpoints", Choice(), said.append)
    assert found.name == "step_000000002"
    assert ["step_000000003 is damaged" in text and "exporting step_000000002 instead" in text for text in said] == [
        True
    ]
    with pytest.raises(UserError, match=r"step_000000003 is damaged: .*--step"):
        find_checkpoint(tmp_path, tmp_path / "checkpoints", Choice(step=3), said.append)
    assert find_checkpoint(tmp_path, tmp_path / "checkpoints", Choice(step=1), said.append).name == "step_000000001"
