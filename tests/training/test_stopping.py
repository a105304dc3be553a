"""Signals: a run saves, exits, records that in `exit.json`, and continues as if nothing had happened (contract 10)."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from distributions import install

from rlinf_core.errors import Exit, Interrupted, UserError
from rlinf_core.process.ending import Ending
from rlinf_core.training.stopping import AGAIN, StopSignal, stop_signals

ROOT = Path(__file__).parents[2]
OBSERVER = """
import os, signal, subprocess, time
from rlinf_core import UserError, hookimpl

@hookimpl
def rlinf_train_started(trainer):
    if os.environ.get("FAIL_ON_RANK") == os.environ.get("RANK", "0"):
        raise UserError("the robot is not there")

@hookimpl
def rlinf_policy_built(policy):
    name, _, rank = os.environ.get("SIGNAL", "").partition(":")
    if rank == os.environ.get("RANK", "0"):
        policy.register_forward_pre_hook(lambda *_: step(policy, name))

def step(policy, name):
    policy.steps = getattr(policy, "steps", 0) + 1
    if policy.steps == 3:
        if name.startswith("GROUP"):
            # From another process, as signals come: workers obey their run.
            subprocess.run(["kill", "-TERM" if name == "GROUP_TERM" else "-INT", "--", f"-{os.getpgid(0)}"])
        else:
            os.kill(os.getpid(), signal.Signals[name])
"""


@pytest.fixture(scope="module")
def site(toy_site, tmp_path_factory):
    """Paths for Python: the toy policy, and an observer that fails and sends signals as the environment says."""
    site = tmp_path_factory.mktemp("observer")
    install(site, "observer", plugins={"observer": "observer"}, observer=OBSERVER)
    return toy_site, site


def train(site, folder, *overrides, restarts=0, **environment):
    """Train the toy policy in a session of its own; returns the finished process."""
    config = site[0] / "toy.toml"
    command = [sys.executable, "-m", "rlinf_core.train"]
    if restarts:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
        command = [*torchrun, f"--max-restarts={restarts}", *command[1:]]
    command += [str(config), f"runner.output_dir={folder}", "runner.max_steps=8", *overrides]
    paths = {"PYTHONPATH": os.pathsep.join(map(str, [*site, ROOT / "tests" / "support"])), "OMP_NUM_THREADS": "1"}
    inherited = {key: value for key, value in os.environ.items() if key != "RANK"}
    return subprocess.run(
        command, env=inherited | paths | environment, capture_output=True, text=True, start_new_session=True
    )


def ending(folder, name="run"):
    return json.loads((folder / name / "exit.json").read_text())


def losses(folder, name="run"):
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows]


def test_a_signal_to_one_rank_stops_all_after_saving_and_the_run_goes_on_exactly(site, tmp_path, start_ranks):
    settings = (site[0] / "toy.toml", f"runner.output_dir={tmp_path}", "runner.max_steps=8")
    stopped = start_ranks("rlinf_core.train:main", 2, *settings, paths=site, SIGNAL="SIGTERM:1")
    assert stopped.returncode == 0, stopped.stderr
    end = ending(tmp_path)
    assert (end["code"], end["reason"], end["step"]) == (Exit.OK, "preempted", 3)
    assert (tmp_path / "run" / "latest").read_text() == "step_000000003"
    assert "interrupted after step 3; the same command resumes from step_000000003" in stopped.stdout
    again = start_ranks("rlinf_core.train:main", 2, *settings, paths=site)
    assert again.returncode == 0, again.stderr
    assert (ending(tmp_path)["reason"], ending(tmp_path)["step"]) == ("finished", 8)
    whole = start_ranks("rlinf_core.train:main", 2, *settings, "runner.name=whole", paths=site)
    assert whole.returncode == 0, whole.stderr
    assert losses(tmp_path) == losses(tmp_path, "whole")


@pytest.mark.slow  # The next one's way, and that of test_launch.py's Ctrl-C.
def test_ctrl_c_reaches_workers_too_and_the_run_saves_all_the_same(site, tmp_path):
    stopped = train(site, tmp_path, "data.num_workers=1", SIGNAL="GROUP:0")
    assert stopped.returncode == Exit.INTERRUPTED, stopped.stderr
    assert (ending(tmp_path)["reason"], ending(tmp_path)["code"]) == ("interrupted", 130)
    step = ending(tmp_path)["step"]
    assert (tmp_path / "run" / "latest").read_text() == f"step_{step:09d}"
    assert "Traceback" not in stopped.stderr


@pytest.mark.slow
def test_a_schedulers_signal_to_every_process_leaves_the_workers_at_work(site, tmp_path):
    """SIGTERM to the group in the third of ten micro batches, which workers have yet to bring."""
    micro = ("trainer.micro_batch_size=2", "data.num_workers=1")
    stopped = train(site, tmp_path, *micro, SIGNAL="GROUP_TERM:0")
    assert stopped.returncode == 0, stopped.stderr
    assert (ending(tmp_path)["reason"], ending(tmp_path)["step"]) == ("preempted", 1)
    assert (tmp_path / "run" / "latest").read_text() == "step_000000001"


def test_a_mistake_ends_restarts_and_is_said_once(site, tmp_path):
    failed = train(site, tmp_path, restarts=3, FAIL_ON_RANK="0")
    assert failed.returncode != 0
    ours, _, torchruns = failed.stderr.partition("Traceback")
    assert ours.count("the robot is not there") == 1
    # torchrun's own report would scroll it away: it ends with it.
    assert torchruns.count("the robot is not there") == 1
    *above, last, border = torchruns.rstrip().splitlines()
    assert last.strip().startswith("error: the robot is not there [rlinf_train_started of observer")
    assert set(border) == {"="}
    assert "`rlinf launch CONFIG` starts the same run without this report" in above[-1]
    assert (ending(tmp_path)["code"], ending(tmp_path)["reason"]) == (Exit.USER_ERROR, "mistake")
    assert "the robot is not there" in ending(tmp_path)["message"]


def test_a_mistake_that_only_one_rank_meets_is_said_too(site, tmp_path, start_ranks):
    settings = (site[0] / "toy.toml", f"runner.output_dir={tmp_path}", "runner.max_steps=8")
    failed = start_ranks("rlinf_core.train:main", 2, *settings, paths=site, FAIL_ON_RANK="1")
    assert failed.returncode == Exit.USER_ERROR
    assert "error on rank 1: the robot is not there" in failed.stderr


def test_the_first_signal_is_remembered_and_one_much_later_means_now():
    stop = StopSignal()
    stop.handle(signal.SIGTERM, None)
    stop.handle(signal.SIGINT, None)
    assert stop.received == signal.SIGTERM
    stop._at -= AGAIN + 1
    with pytest.raises(KeyboardInterrupt):
        stop.handle(signal.SIGINT, None)


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        while stop.received is None:
            time.sleep(0.001)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.fixture
def follow(tmp_path, monkeypatch, capsys, own_signals):
    """Follow a process that ends with an error; returns its exit code, `exit.json`, and what it said."""
    monkeypatch.delenv("RANK", raising=False)

    def follow(error):
        def main(ending):
            ending.belongs_to(tmp_path, start_step=5)
            if error:
                raise error

        code = Ending().follow(main)
        return code, json.loads((tmp_path / "exit.json").read_text()), capsys.readouterr().err

    return follow


@pytest.mark.parametrize(
    ("error", "code", "reason", "message"),
    [
        (None, 0, "finished", ""),
        (UserError("no such file"), 2, "mistake", "no such file"),
        (KeyboardInterrupt(), 130, "interrupted", "interrupted after step 5"),
        (Interrupted(signal.SIGINT, 7), 130, "interrupted", "stopped by SIGINT after step 7"),
        (Interrupted(signal.SIGTERM, 7), 0, "preempted", "stopped by SIGTERM after step 7"),
    ],
)
def test_every_end_has_its_code_and_reason(follow, error, code, reason, message):
    got, end, said = follow(error)
    assert got == code
    assert (end["code"], end["reason"], end["message"], end["step"]) == (code, reason, message, 5)
    assert said == ("error: no such file\n" if code == 2 else f"{message}\n" if message else "")


def test_a_defect_keeps_its_traceback_and_is_recorded(follow, tmp_path):
    with pytest.raises(ZeroDivisionError):
        follow(ZeroDivisionError("by zero"))
    end = json.loads((tmp_path / "exit.json").read_text())
    assert (end["code"], end["reason"], end["message"]) == (1, "defect", "ZeroDivisionError: by zero")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is always full")
def test_a_message_that_fits_nowhere_leaves_the_exit_code_as_it_is(tmp_path, monkeypatch):
    def main(ending):
        ending.belongs_to(tmp_path, start_step=0)
        raise UserError("no room")

    monkeypatch.delenv("RANK", raising=False)
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert Ending().follow(main) == Exit.USER_ERROR
    assert ending(tmp_path.parent, tmp_path.name)["message"] == "no room"


def test_what_follows_from_another_ranks_mistake_does_not_hide_it(follow, tmp_path, monkeypatch):
    def main(ending):
        ending.belongs_to(tmp_path, start_step=0)
        (tmp_path / "exit.json").write_text('{"code": 2, "reason": "mistake"}')
        raise Interrupted(signal.SIGTERM, 0)

    assert Ending().follow(main) == 0
    assert json.loads((tmp_path / "exit.json").read_text())["reason"] == "mistake"


def test_a_connection_that_breaks_because_all_are_leaving_is_no_defect(tmp_path, monkeypatch, own_signals):
    monkeypatch.delenv("RANK", raising=False)

    def main(ending):
        ending.belongs_to(tmp_path, start_step=0)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        raise RuntimeError("Connection closed by peer")

    assert Ending().follow(main) == 0
    assert json.loads((tmp_path / "exit.json").read_text())["reason"] == "preempted"


def test_another_ranks_defect_is_not_taken_for_a_preemption(follow, tmp_path, monkeypatch):
    def rank(number, error):
        def main(ending):
            ending.folder, ending.rank = tmp_path, number
            raise error

        return main

    with pytest.raises(ZeroDivisionError):
        Ending().follow(rank(1, ZeroDivisionError("by zero")))
    Ending().follow(rank(0, Interrupted(signal.SIGTERM, 3)))
    end = json.loads((tmp_path / "exit.json").read_text())
    assert (end["code"], end["reason"]) == (1, "defect")


def test_a_start_of_a_finished_run_records_that_it_is_finished(toy_site, tmp_path, start_ranks):
    settings = (toy_site / "toy.toml", f"runner.output_dir={tmp_path}", "runner.max_steps=1")
    for begun in (True, False):
        ended = start_ranks("rlinf_core.train:main", 1, *settings, paths=(toy_site,))
        assert ended.returncode == 0, ended.stderr
        assert ("run is finished: its 1 steps are in" in ended.stdout) != begun
        end = tmp_path / "run" / "exit.json"
        assert (ending(tmp_path)["reason"], ending(tmp_path)["step"]) == ("finished", 1)
        end.unlink()  # As `rlinf launch` does before it starts the processes.
