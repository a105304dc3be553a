"""Whatever a rank waits for, the run ends in time, with one message that names the rank and the place."""

import json
import re
import signal
import time

import distributions
import pytest

PLUGIN = """
import multiprocessing, os, signal, time
from pathlib import Path
from rlinf_core import hookimpl
from rlinf_core.process import watchdog
from rlinf_core.training import stopping
from rlinf_core.training.checkpoint import shards

PLACE, RANK, HOW = os.environ.get("HANG", "::").split(":")

def hang():
    if HOW == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(600)

def at(place):
    if place == PLACE and RANK == os.environ.get("RANK", "0"):
        hang()

@hookimpl
def rlinf_configure(run):
    watchdog.SAVING, watchdog.IDLE = 1.0, 1.2
    watchdog.GRACE = stopping.GRACE = float(os.environ.get("GRACE", "25"))
    at("start")

@hookimpl
def rlinf_policy_built(policy, run):
    at("build")

@hookimpl
def rlinf_train_started(trainer):
    if PLACE == "save":
        shards.HashedFile.write = lambda *_: at("save")

@hookimpl
def rlinf_step_finished(trainer, step):
    if PLACE == "worker" and step == 2:
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGSTOP)
        Path(os.environ.get("STOPPED", os.devnull)).touch()

@hookimpl
def rlinf_train_finished(trainer):
    at("end")
"""
LIMIT = 3
SOON = 60
"""Seconds in which all ends on a busy machine; what is tested would take hours otherwise."""


@pytest.fixture
def hanging(tmp_path):
    distributions.install(tmp_path / "site", "hanging", plugins={"hanging": "hanging"}, hanging=PLUGIN)
    return tmp_path / "site"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "rank", "how", "said"),
    [
        ("build", 1, "stop", "rank 1 has given no sign of life for"),
        ("build", 0, "sleep", "rank 0 hangs (building the policy with its initial values): nothing happened for"),
        ("save", 1, "sleep", "rank 1 hangs (saving "),
        ("end", 1, "sleep", "rank 1 hangs (closing evaluators, loggers and plugins): nothing happened for"),
    ],
)
def test_a_rank_that_hangs_anywhere_ends_the_run(toy_site, hanging, tmp_path, start_ranks, place, rank, how, said):
    settings = (toy_site / "toy.toml", f"runner.output_dir={tmp_path}", "runner.max_steps=4")
    settings += (f"trainer.timeout_seconds={LIMIT}", "trainer.micro_batch_size=10")
    began = time.monotonic()
    ended = start_ranks("rlinf_core.train:main", 2, *settings, paths=(toy_site, hanging), HANG=f"{place}:{rank}:{how}")
    assert time.monotonic() - began < SOON
    assert ended.returncode == 1, ended.stderr
    assert ended.stderr.count(f"error: {said}") == 1, ended.stderr
    assert "Traceback" not in ended.stderr
    if place != "build":  # Before that the folder is not this run's.
        assert (tmp_path / "run" / "flight" / f"rank_{rank:05d}.txt").exists()
    if place == "build":
        return
    again = start_ranks("rlinf_core.train:main", 2, *settings, paths=(toy_site, hanging), HANG="::")
    assert again.returncode == 0, again.stderr


def start_with_a_stopped_worker(toy_site, hanging, folder, start_ranks, *settings, **options):
    """A run of one process whose only loader worker is stopped after step 2."""
    config = (toy_site / "toy.toml", f"runner.output_dir={folder}", "runner.max_steps=100", "data.num_workers=1")
    return start_ranks(
        "rlinf_core.train:main", 1, *config, *settings, paths=(toy_site, hanging), HANG="worker:0:stop", **options
    )


def test_a_loader_worker_that_is_stopped_ends_a_run_of_one_process(toy_site, hanging, tmp_path, start_ranks):
    limit = f"trainer.timeout_seconds={LIMIT}"
    ended = start_with_a_stopped_worker(toy_site, hanging, tmp_path, start_ranks, limit)
    assert ended.returncode == 1, ended.stderr
    assert re.findall(r"error: rank 0 hangs \(step \d+, data_wait\): nothing happened for", ended.stderr), ended.stderr
    assert re.search(r"the child process \d+ is stopped; its stack is in", ended.stderr)
    assert "Traceback" not in ended.stderr


def test_sigterm_ends_a_run_whose_loader_is_stopped_within_the_grace_period(toy_site, hanging, tmp_path, start_ranks):
    stop = {"file": tmp_path / "stopped", "delay": 0.5, "ranks": [0], "signal": int(signal.SIGTERM)}
    ended = start_with_a_stopped_worker(
        toy_site, hanging, tmp_path, start_ranks, signals=[stop], GRACE="3", STOPPED=str(stop["file"])
    )
    seconds = time.time() - stop["file"].stat().st_mtime
    assert 3.5 <= seconds < 3.5 + 5
    assert ended.returncode == 0, ended.stderr
    assert "stopped by SIGTERM after step" in ended.stderr
    end = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert (end["code"], end["reason"]) == (0, "preempted")
