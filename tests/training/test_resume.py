"""Where a run starts, and what it refuses to mix or overwrite (contract 9)."""

import errno
import os
import threading
from contextlib import ExitStack
from dataclasses import replace

import pytest
from saved_run import checkpoint

from rlinf_core.config.load import dump_config, load_config, read_toml
from rlinf_core.errors import UserError
from rlinf_core.files import write_text
from rlinf_core.loggers.jsonl import read_rows
from rlinf_core.training.checkpoint.state import Position
from rlinf_core.training.resume import CheckpointDir, Flags, FolderState, decide_start, explain
from rlinf_core.training.run_folder import (
    RunFolder,
    begin,
    commit,
    is_restart,
    lock_folder,
    own_agent,
    prepare_folder,
    read_folder,
    roll_back,
    verify_start,
)


@pytest.fixture
def run(tmp_path):
    def make(*overrides):
        settings = [f"runner.output_dir={tmp_path}", "runner.name=r", "runner.max_steps=10", *overrides]
        return load_config("examples/quickstart.toml", settings)

    return make


@pytest.fixture(autouse=True)
def looks(monkeypatch):
    """No time passes until what is missing is looked for again; what happens meanwhile is a function in this list."""
    meanwhile = []
    monkeypatch.setattr("rlinf_core.training.run_folder.time.sleep", lambda _: meanwhile and meanwhile.pop(0)())
    return meanwhile


def decided(run, **flags):
    """Where the run would start, by what is in its folder."""
    return decide_start(run, read_folder(run), Flags(**flags))


def test_a_new_run_starts_at_zero_and_leaves_its_config(run):
    begun = prepare_folder(run(), overwrite=False)
    assert (begun.step, begun.checkpoint, begun.finished) == (0, None, False)
    assert load_config(run().folder / "config.toml") == run()


def test_a_key_of_a_later_version_is_no_change_as_long_as_it_has_its_default(run):
    prepare_folder(run(), overwrite=False)
    checkpoint(run(), 4)
    saved = run().folder / "config.toml"
    lines = saved.read_text().splitlines()
    saved.write_text("\n".join(line for line in lines if not line.startswith(("norm_floor", "spike_threshold"))))
    assert decided(run()).step == 4
    with pytest.raises(UserError, match=r"data\.norm_floor: None -> 0\.1 \(changes what a step computes\)"):
        decided(run("data.norm_floor=0.1"))


def test_an_unfinished_run_continues(run):
    prepare_folder(run(), overwrite=False)
    checkpoint(run(), 4)
    begun = prepare_folder(run(), overwrite=False)
    assert (begun.step, begun.checkpoint.name, begun.finished) == (4, "step_000000004", False)


def test_a_finished_run_is_finished_until_it_gets_more_steps(run):
    prepare_folder(run(), overwrite=False)
    checkpoint(run(), 10)
    assert prepare_folder(run(), overwrite=False).finished
    assert prepare_folder(run("data.num_workers=0"), overwrite=False).finished
    assert prepare_folder(run("runner.max_steps=12"), overwrite=False).step == 10


def test_a_run_that_was_stopped_before_its_last_validation_is_not_finished(run):
    prepare_folder(run(), overwrite=False)
    checkpoint(run(), 10, validated=0)
    assert not prepare_folder(run(), overwrite=False).finished
    assert prepare_folder(run("runner.val_check_interval=0"), overwrite=False).finished


@pytest.mark.parametrize("step", [4, 10], ids=["unfinished", "finished"])
def test_another_config_is_refused_with_the_difference(run, step):
    prepare_folder(run(), overwrite=False)
    checkpoint(run(), step)
    with pytest.raises(
        UserError, match=r"(?s)another config:\n  optim\.lr: .* -> 0\.5 \(changes what a step computes\)\n.*--overwrite"
    ):
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
    begun = prepare_folder(run("runner.resume=never"), overwrite=True)
    assert (begun.step, begun.checkpoint) == (0, None)
    assert not (run().folder / "checkpoints").exists()
    assert (begun.replaced / "checkpoints" / "step_000000004").exists()
    commit(run(), begun)
    assert [path.name for path in run().folder.parent.iterdir()] == ["r"]


def test_a_run_whose_successor_never_came_to_train_is_back_in_its_place(run):
    prepare_folder(run(), overwrite=False)
    checkpoint(run(), 4)
    roll_back(run(), prepare_folder(run("optim.lr=0.5"), overwrite=True))
    assert prepare_folder(run(), overwrite=False).step == 4
    assert [path.name for path in run().folder.parent.iterdir()] == ["r"]


@pytest.mark.parametrize("killed", [1, 2])
def test_an_overwrite_that_was_killed_before_it_was_ready_has_lost_nothing(run, killed):
    prepare_folder(run(), overwrite=False)
    checkpoint(run(), 4)
    for _ in range(killed):
        begun = prepare_folder(run(), overwrite=True)
    assert (begun.replaced / "checkpoints" / "step_000000004").exists()


def test_two_processes_do_not_write_one_run(run):
    with lock_folder(run()):
        with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on "), lock_folder(run()):
            pass
        with lock_folder(run("runner.name=other")):
            pass
    with lock_folder(run()):
        pass


def test_a_start_of_the_same_job_waits_for_a_process_that_is_about_to_leave(run):
    before = ExitStack()
    before.enter_context(lock_folder(run()))
    threading.Timer(0.3, before.close).start()
    with lock_folder(run(), patience=20.0):
        pass


def test_an_output_folder_that_cannot_be_is_named(run, tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"runner\.output_dir = .*file"),
        lock_folder(run(f"runner.output_dir={tmp_path / 'file'}")),
    ):
        pass


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_restart_by_torchrun_neither_overwrites_nor_refuses_its_own_run(run, resume):
    mine = run(f"runner.resume={resume}")
    prepare_folder(mine, overwrite=True)
    checkpoint(mine, 4)
    assert prepare_folder(mine, overwrite=True, restarted=True).step == 4


def test_a_job_is_known_by_any_of_its_agents_however_machines_come_and_go(run, monkeypatch):
    """torchrun says that it has started processes again only after failures."""

    def agent(name):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", f"/tmp/torchelastic_x/{name}/attempt_0/0/error.json")
        return own_agent()

    first, second, third, stranger = map(agent, ("first", "second", "third", "stranger"))
    folder = run().folder
    for agents, known in (({first}, False), ({first, second}, True), ({second, third}, True), ({third}, True)):
        assert is_restart(folder, agents) == known
        begun = decided(run(), overwrite=True, restarted=known)
        begin(run(), begun, agents)
        commit(run(), begun)
        assert begun.step == (4 if known else 0)
        checkpoint(run(), 4)
    assert not is_restart(folder, {stranger})
    begun = decided(run(), overwrite=True)
    begin(run(), begun, {stranger})
    assert not is_restart(folder, {first, second, third})
    roll_back(run(), begun)  # It has come to nothing: whoever starts next still replaces the run.
    assert not is_restart(folder, {stranger})


def test_processes_that_torchrun_did_not_start_have_no_agent(run, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    assert own_agent() == ""
    begin(run(), decided(run()), set())
    assert not is_restart(run().folder, set())
    assert not (run().folder / "agents").exists()


def test_a_folder_that_holds_no_run_is_never_touched(run):
    run().folder.mkdir(parents=True)
    precious = run().folder / "thesis.tex"
    precious.write_text("x")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="holds no run"):
            prepare_folder(run(), overwrite=overwrite)
    assert precious.read_text() == "x"


@pytest.mark.parametrize("theirs", ["[server]\nport = 80\n", "", "[runner", '[runner]\nname = "r"\n'])
def test_a_folder_whose_config_is_another_programs_is_never_touched(run, theirs):
    (run().folder / "chapters").mkdir(parents=True)
    (run().folder / "chapters" / "one.tex").write_text("x")
    config = run().folder / "config.toml"
    config.write_text(theirs)
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"holds no run: its config\.toml is not the config of one"):
            prepare_folder(run(), overwrite=overwrite)
    assert config.read_text() == theirs
    assert sorted(path.name for path in run().folder.rglob("*")) == ["chapters", "config.toml", "one.tex"]


class OneRank:
    """A process group of this process alone."""

    rank, size = 0, 1

    def gather(self, value):
        return [value]

    def decide(self, decision):
        return decision()


def settle(run, **options):
    """Where the run starts once all ranks have looked at the bytes of the checkpoint."""
    begun = verify_start(run, OneRank(), decided(run, **options))
    begin(run, begun)
    commit(run, begun)
    return begun


def test_a_damaged_checkpoint_is_passed_over_for_the_newest_whole_one(run):
    prepare_folder(run(), overwrite=False)
    for step in (2, 4, 6, 8):
        checkpoint(run(), step)
    folder = run().folder
    (folder / "checkpoints" / "step_000000008" / "state.json").unlink()
    (folder / "checkpoints" / "step_000000006" / "shard").write_bytes(b"abd")  # The size is right.
    begun = settle(run())
    assert (begun.step, begun.checkpoint.name) == (4, "step_000000004")
    assert [note.removeprefix("warning: ") for note in begun.notes] == [
        "the checkpoint step_000000008 is damaged: it has no state.json: it was never completed",
        "the checkpoint step_000000006 is damaged: the content of shard has changed since it was written (sha256)",
        f"continues from {folder / 'checkpoints' / 'step_000000004'}, the newest undamaged one",
        f"continues from {folder / 'checkpoints' / 'step_000000004'}; later checkpoints are set aside when the next "
        "one is complete: step_000000006, step_000000008",
    ]
    assert (folder / "latest").read_text() == "step_000000004"
    assert len(settle(run()).notes) == 1


def test_a_new_run_does_not_take_anothers_checkpoints_for_its_own(run, tmp_path):
    settings = ("runner.checkpoint_dir=" + str(tmp_path / "large"),)
    (tmp_path / "large" / "r" / "step_000000008").mkdir(parents=True)
    with pytest.raises(UserError, match=r"large/r holds checkpoints of a run that is not in .*: give another runner"):
        prepare_folder(run(*settings), overwrite=False)
    (tmp_path / "large" / "r" / "step_000000008").rmdir()
    assert prepare_folder(run(*settings), overwrite=False).checkpoint is None


def test_a_folder_that_is_full_is_named(run, monkeypatch):
    def fail(path, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("rlinf_core.training.run_folder.write_text", fail)
    with pytest.raises(UserError, match=r"/r cannot be written: No space left on device.* Make room there"):
        prepare_folder(run(), overwrite=False)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_afresh(run):
    prepare_folder(run(), overwrite=False)
    (checkpoint(run(), 4) / "shard").write_bytes(b"abd")
    with pytest.raises(UserError, match=r"(?s)no checkpoint .*step_000000004: the content of shard.*--overwrite"):
        settle(run())


LOST = {
    "missing": lambda latest: latest.unlink(),
    "a dangling link": lambda latest: (latest.unlink(), latest.symlink_to("nowhere")),
    "empty": lambda latest: latest.write_text(""),
    "binary": lambda latest: latest.write_bytes(bytes(range(256))),
    "a path": lambda latest: latest.write_text("../../step_000000002"),
    "removed": lambda latest: latest.write_text("step_000000003"),
}


@pytest.mark.parametrize("lose", LOST.values(), ids=LOST)
def test_without_a_pointer_the_newest_whole_checkpoint_is_found_by_looking(run, lose):
    prepare_folder(run())
    for step in (2, 4, 6):
        checkpoint(run(), step)
    (run().checkpoints / "step_000000006" / "shard").unlink()
    write_text(run().folder / "metrics.jsonl", '{"step": 1, "loss": 1.0}\n')
    lose(run().folder / "latest")
    begun = settle(run())
    assert begun.checkpoint.name == "step_000000004"
    assert any("latest is missing or names no checkpoint" in note or "does not exist" in note for note in begun.notes)
    assert (run().folder / "latest").read_text() == "step_000000004"
    assert len(list(run().checkpoints.iterdir())) == 3


def test_checkpoints_left_elsewhere_are_found_without_a_pointer_too(run, tmp_path):
    prepare_folder(run())
    path = checkpoint(run(), 4)
    (run().folder / "latest").unlink()
    with pytest.raises(UserError, match=rf"are still in {path.parent}"):
        prepare_folder(run(f"runner.checkpoint_dir={tmp_path / 'large'}"))


@pytest.mark.parametrize("hide", ["shard", "state.json", "."])
def test_what_cannot_be_seen_for_a_moment_is_no_damage(run, looks, hide):
    prepare_folder(run())
    checkpoint(run(), 4)
    there = checkpoint(run(), 8) / hide
    away = run().folder.parent / "away"
    there.rename(away)
    looks += [lambda: None, lambda: away.rename(there)]
    assert settle(run()).step == 8


def test_bytes_that_are_right_when_read_again_are_no_damage(run, looks):
    prepare_folder(run())
    path = checkpoint(run(), 8) / "shard"
    path.write_bytes(b"abd")
    looks.append(lambda: path.write_bytes(b"abc"))
    assert settle(run()).step == 8


def test_an_overwrite_that_was_killed_does_not_cost_what_its_successor_has_trained(run):
    prepare_folder(run())
    begun = prepare_folder(run(), overwrite=True)
    assert begun.replaced.exists()
    checkpoint(run(), 4)
    (run().folder / "latest").unlink()
    assert (prepare_folder(run(), overwrite=True).replaced / "checkpoints" / "step_000000004").exists()


def test_a_change_that_is_allowed_is_shown_and_recorded(run):
    prepare_folder(run(), overwrite=False)
    checkpoint(run(), 4)
    before = run().folder / "config.toml"
    old = before.read_text()
    begun = settle(run("optim.lr=0.5", "runner.max_steps=12"), allow_change=True)
    assert begun.changed
    (told,) = begun.notes
    assert told.splitlines()[0] == "goes on with another config:"
    assert sorted(line.strip() for line in told.splitlines()[1:]) == [
        "optim.lr: 0.0015 -> 0.5 (changes what a step computes)",
        "runner.max_steps: 10 -> 12",
    ]
    assert load_config(before) == run("optim.lr=0.5", "runner.max_steps=12")
    assert before.with_name("config.step_000000004.toml").read_text() == old
    assert settle(run("optim.lr=0.5", "runner.max_steps=12")).notes == ()


def test_an_order_that_changes_within_an_epoch_is_a_warning(run):
    prepare_folder(run(), overwrite=False)
    for sample, warned in ((32, True), (0, False)):
        checkpoint(run(), 4, sample=sample)
        notes = decide_start(
            run("seed=1", "optim.lr=0.5"), read_folder(run("seed=1", "optim.lr=0.5")), Flags(allow_change=True)
        ).notes
        assert [note for note in notes if note.startswith("warning: seed: the order of samples")] == list(notes[1:])
        assert len(notes[1:]) == warned


def test_a_finished_run_does_not_go_on_with_another_config(run):
    prepare_folder(run(), overwrite=False)
    checkpoint(run(), 10)
    begun = decided(run("optim.lr=0.5"), allow_change=True)
    assert (begun.finished, begun.notes, begun.changed) == (True, (), False)


def test_a_run_that_cannot_begin_names_what_has_changed_as_the_cause(run):
    prepare_folder(run(), overwrite=False)
    checkpoint(run(), 4)
    begun = decide_start(
        run("data.validation_fraction=0.3"), read_folder(run("data.validation_fraction=0.3")), Flags(allow_change=True)
    )
    assert str(explain(UserError("other rows"), begun)).splitlines() == [
        "other rows",
        "The cause may be a change to the run's config that --allow-change permits:",
        "  data.validation_fraction: 0.15 -> 0.3 (changes what a step computes)",
        "Without the change the run can continue; to train with it, give another runner.name.",
    ]
    assert str(explain(UserError("other rows"), decided(run()))) == "other rows"


def test_a_change_that_turns_out_to_be_impossible_is_not_recorded(run):
    prepare_folder(run(), overwrite=False)
    checkpoint(run(), 4)
    changed = run("trainer.global_batch_size=2")
    begin(changed, decided(changed, allow_change=True))  # Then the trainer refuses.
    assert load_config(run().folder / "config.toml") == run()
    assert settle(run()).notes == ()


def test_a_change_that_computes_the_same_is_shown_and_needs_no_permission(run):
    prepare_folder(run(), overwrite=False)
    checkpoint(run(), 4)
    begun = settle(run("runner.keep_last=5"))
    assert begun.notes == ("goes on with another config:\n  runner.keep_last: 2 -> 5",)
    assert not list(run().folder.glob("config.step_*"))


def test_checkpoints_may_lie_elsewhere(run, tmp_path):
    elsewhere = run(f"runner.checkpoint_dir={tmp_path / 'large'}")
    prepare_folder(elsewhere, overwrite=False)
    path = checkpoint(elsewhere, 4)
    there = tmp_path / "large" / "r"
    path.rename(there / path.name)
    assert settle(elsewhere).checkpoint == there / path.name
    roll_back(elsewhere, prepare_folder(elsewhere, overwrite=True))
    assert settle(elsewhere).checkpoint == there / path.name
    begun = prepare_folder(elsewhere, overwrite=True)
    assert begun.checkpoint is None
    commit(elsewhere, begun)
    assert not list(there.glob("step_*"))
    assert settle(elsewhere).step == 0


def test_two_runs_of_one_name_do_not_share_a_folder_for_checkpoints(run, tmp_path):
    """Not even before either has saved, nor when one of them begins anew, nor when one of them is moved."""
    settings = [f"runner.checkpoint_dir={tmp_path / 'large'}"]
    prepare_folder(run(*settings), overwrite=False)
    other = [*settings, f"runner.output_dir={tmp_path / 'other'}"]
    refused = rf"large/r is for the checkpoints of another run, which began in {tmp_path}/r: give another"
    with pytest.raises(UserError, match=refused):
        prepare_folder(run(*other), overwrite=False)
    prepare_folder(run(other[1]), overwrite=False)
    (checkpoint(run(), 4)).rename(tmp_path / "large" / "r" / "step_000000004")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=refused):
            prepare_folder(run(*other), overwrite=overwrite)
    assert prepare_folder(run(*settings), overwrite=False).step == 4
    (tmp_path / "r").rename(tmp_path / "moved")
    (tmp_path / "new").mkdir()
    (tmp_path / "moved").rename(tmp_path / "new" / "r")
    assert prepare_folder(run(*settings, f"runner.output_dir={tmp_path / 'new'}"), overwrite=False).step == 4


def test_the_second_of_two_runs_that_begin_at_once_is_refused(run, tmp_path):
    settings = [f"runner.checkpoint_dir={tmp_path / 'large'}"]
    mine, other = run(*settings), run(*settings, f"runner.output_dir={tmp_path / 'other'}")
    starts = [decided(one) for one in (mine, other)]
    begin(mine, starts[0])
    with pytest.raises(UserError, match="another run"):
        begin(other, starts[1])


def test_checkpoints_that_were_left_elsewhere_are_named_with_the_way_out(run, tmp_path):
    prepare_folder(run(), overwrite=False)
    path = checkpoint(run(), 4)
    elsewhere = run(f"runner.checkpoint_dir={tmp_path / 'large'}")
    with pytest.raises(UserError, match=rf"still in {path.parent}: move them to {tmp_path}/large/r, or set"):
        prepare_folder(elsewhere, overwrite=False)
    assert load_config(run().folder / "config.toml") == run()
    path.parent.rename(tmp_path / "moved")
    (tmp_path / "large").mkdir()
    (tmp_path / "moved").rename(tmp_path / "large" / "r")
    assert settle(elsewhere).step == 4


@pytest.mark.parametrize("folder", ["file", "/proc/x"])
def test_a_folder_for_checkpoints_that_cannot_be_is_named_before_the_start(run, tmp_path, folder):
    (tmp_path / "file").touch()
    unusable = run(f"runner.checkpoint_dir={tmp_path / folder}")
    with pytest.raises(UserError, match=r"runner\.checkpoint_dir = .* cannot hold the checkpoints of 'r'"):
        prepare_folder(unusable, overwrite=False)
    assert not unusable.folder.exists()


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("runner.keep_every=1500", r"keep_every \(1500\) must be a multiple of save_interval"),
        ("runner.checkpoint_dir=s3://bucket", "must be a folder: mount the storage"),
    ],
)
def test_settings_that_cannot_be_kept_are_refused(run, setting, complaint):
    with pytest.raises(UserError, match=complaint):
        run(setting)


@pytest.mark.slow  # tests/faults/test_torn_checkpoints.py shows it with a policy that takes less time.
def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_before_as_if_nothing_had_happened(
    toy_site, tmp_path, start_ranks
):
    """Two ranks: the shard of the second is damaged, and its owner is not the rank that finds out."""

    def train(name, *settings):
        given = (
            toy_site / "toy.toml",
            f"runner.output_dir={tmp_path}",
            f"runner.name={name}",
            "runner.save_interval=2",
        )
        ended = start_ranks("rlinf_core.train:main", 2, *given, *settings, paths=[toy_site])
        assert ended.returncode == 0, ended.stderr
        return ended.stdout, [
            (row["step"], row["loss"]) for row in read_rows(tmp_path / name / "metrics.jsonl") if "loss" in row
        ]

    train("run", "runner.max_steps=6")
    shard = tmp_path / "run" / "checkpoints" / "step_000000006" / "__1_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    said, losses = train("run", "runner.max_steps=8")
    assert "the checkpoint step_000000006 is damaged: the content of __1_0.distcp has changed" in said
    assert "continues at step 4" in said
    assert losses == train("whole", "runner.max_steps=8")[1]
    assert [step for step, _ in losses] == list(range(1, 9))


AT_4 = Position(step=4, epoch=0, sample=8, rows=10, seed=0, layout="", validated=4)


def state_with(run, **changes):
    """A folder with a checkpoint at step 4, as it is read from disk."""
    table = {"is_empty": False, "has_config": True, "config": read_toml(dump_config(run)), "has_metrics": True}
    table |= {"checkpoint": run.checkpoints / "step_000000004", "position": AT_4}
    return FolderState(**table | changes)


@pytest.mark.parametrize(
    ("changes", "flags", "expected"),
    [
        ({}, {}, (4, False, None)),
        ({"position": replace(AT_4, step=10, validated=10)}, {}, (10, True, None)),
        ({}, {"overwrite": True}, (0, False, ".r.replaced")),
        ({}, {"overwrite": True, "restarted": True}, (4, False, None)),
        ({"checkpoint": None, "position": None}, {}, (0, False, None)),
        ({"error": UserError("config.toml is no TOML")}, {"overwrite": True}, (0, False, ".r.replaced")),
    ],
)
def test_a_start_is_decided_without_a_disk(run, changes, flags, expected):
    start = decide_start(run(), state_with(run(), **changes), Flags(**flags))
    assert (start.step, start.finished, start.replaced and start.replaced.name) == expected
    assert not run().folder.parent.joinpath("r").exists()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"obstacle": "/x is not a folder"}, r"runner\.output_dir = .* cannot hold the run 'r': /x is not a folder"),
        ({"has_config": False}, "is not empty and holds no run"),
        ({"error": UserError("config.toml is no TOML")}, "is no TOML"),
        ({"config": {"seed": 1}}, "holds a run with another config"),
        (
            {"checkpoint": None, "damaged": {"step_000000004": "shard is missing"}},
            "(?s)no checkpoint .*shard is missing",
        ),
        (
            {"checkpoint": None, "position": None, "checkpoint_dir": CheckpointDir(holds_checkpoints=True)},
            "would start from scratch beside them",
        ),
        ({"checkpoint_dir": CheckpointDir(obstacle="it is full")}, r"cannot hold the checkpoints of 'r': it is full"),
    ],
)
def test_a_start_is_refused_without_a_disk(run, changes, complaint):
    with pytest.raises(UserError, match=complaint):
        decide_start(run(), state_with(run(), **changes))


def fail_beside(replaced):
    assert replaced.exists()
    raise UserError("out of memory")


def test_an_error_before_the_first_step_undoes_everything(run):
    prepare_folder(run())
    checkpoint(run(), 4)
    with RunFolder(run("optim.lr=0.5"), OneRank()) as folder:
        start = folder.start(overwrite=True)
        with pytest.raises(UserError, match="out of memory"), folder.transaction(start):
            fail_beside(start.replaced)
    assert decided(run()).step == 4
    with RunFolder(run("optim.lr=0.5"), OneRank()) as folder:
        start = folder.start(overwrite=True)
        with folder.transaction(start):
            pass
    assert not start.replaced.exists()
    assert load_config(run().folder / "config.toml") == run("optim.lr=0.5")


def test_a_replaced_run_that_cannot_be_moved_aside_stays(run, monkeypatch):
    """What an earlier --overwrite left aside cannot be removed: nothing of the run may be touched."""
    prepare_folder(run())
    checkpoint(run(), 4)
    begun = decided(run(), overwrite=True)
    begun.replaced.mkdir()

    def fail(path, **_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("rlinf_core.training.run_folder.shutil.rmtree", fail)
    with pytest.raises(UserError, match="cannot be written"):
        begin(run(), begun)
    monkeypatch.undo()
    assert decided(run()).step == 4


def test_a_run_whose_config_is_damaged_can_only_be_overwritten(run):
    prepare_folder(run())
    checkpoint(run(), 4)
    (run().folder / "config.toml").write_text("[runner")
    with pytest.raises(UserError, match=r"config\.toml"):
        decided(run())
    assert decided(run(), overwrite=True).replaced


@pytest.mark.parametrize("damage", ["latest is a folder", "runner is a number", "checkpoint_dir is a number"])
def test_a_run_whose_files_make_no_sense_can_be_overwritten(run, damage):
    prepare_folder(run())
    checkpoint(run(), 4)
    folder, config = run().folder, run().folder / "config.toml"
    if damage == "latest is a folder":
        (folder / "latest").unlink()
        (folder / "latest").mkdir()
        with pytest.raises(UserError, match=r"/r cannot be read: .*overwrite it"):
            decided(run())
    else:
        config.write_text("runner = 3" if damage.startswith("runner") else "[runner]\ncheckpoint_dir = 3")
        with pytest.raises(UserError, match="another config"):
            decided(run())
    assert decided(run(), overwrite=True).replaced


def test_a_rank_that_dies_while_the_folder_is_prepared_costs_nothing(run):
    """Rank 0 has moved the run aside, and then cannot tell the others."""

    class Broken(OneRank):
        broken = False

        def decide(self, decision):
            decided = decision()
            if self.broken:
                raise RuntimeError("connection reset by peer")
            return decided

    prepare_folder(run())
    checkpoint(run(), 4)
    group = Broken()
    with RunFolder(run("optim.lr=0.5"), group) as folder:
        start = folder.start(overwrite=True)
        group.broken = True
        with pytest.raises(RuntimeError, match="reset by peer"):
            folder.transaction(start).__enter__()
    assert decided(run()).step == 4
    assert not start.replaced.exists()


def test_a_folder_of_checkpoints_that_may_not_be_entered_is_named(run, monkeypatch, tmp_path):
    closed = tmp_path / "closed"
    monkeypatch.setattr(
        "rlinf_core.training.run_folder.find_obstacle",
        lambda folder: "you may not enter it" if closed in folder.parents else "",
    )
    with pytest.raises(UserError, match="cannot hold the checkpoints of 'r': you may not enter it"):
        decided(run(f"runner.checkpoint_dir={closed}"))


def test_steps_without_a_config_are_not_mixed_with_others(run):
    prepare_folder(run())
    checkpoint(run(), 4)
    (run().folder / "config.toml").unlink()
    with pytest.raises(UserError, match=r"has steps but no config\.toml"):
        decided(run(), restarted=True)
