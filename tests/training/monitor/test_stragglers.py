"""Ranks that hold up the others are named, with what they are slow at."""

import distributions
import pytest

from rlinf_core.training.monitor.stragglers import find_slow, name_rank

BUSY = """
import os, time
import rlinf_core.training.monitor.stragglers as stragglers
from rlinf_core import hookimpl

stragglers.INTERVAL = 4

@hookimpl
def rlinf_policy_built(policy):
    if os.environ["RANK"] == "1":
        policy.register_forward_pre_hook(lambda *_: compute())

def compute():
    until = time.thread_time() + 0.2
    while time.thread_time() < until:
        pass
"""


@pytest.mark.slow
def test_a_rank_that_computes_longer_is_named_once_an_interval(toy_site, tmp_path, start_ranks):
    distributions.install(tmp_path / "site", "busy", plugins={"busy": "busy"}, busy=BUSY)
    settings = (toy_site / "toy.toml", f"runner.output_dir={tmp_path}", "runner.max_steps=9")
    ended = start_ranks("rlinf_core.train:main", 2, *settings, paths=(toy_site, tmp_path / "site"))
    assert ended.returncode == 0, ended.stderr
    said = [line for line in ended.stdout.splitlines() if "slower than the other ranks" in line]
    assert [line.partition(":")[0] for line in said] == ["step 4", "step 8"]
    assert all("rank 1, computing: takes" in line for line in said)
    assert not any("rank 0" in line for line in said)


def test_a_rank_that_waits_for_data_is_slow_at_data():
    ((rank, words),) = find_slow([0.01, 0.02, 0.6, 0.01], [0.1] * 4, 1.0)
    assert rank == 2
    assert words == "data: waits 0.6 s per step, the median rank 0.01 s"


def test_ranks_that_all_wait_alike_are_not_slower_than_one_another():
    assert find_slow([0.6, 0.6, 0.61, 0.6], [0.1, 0.11, 0.1, 0.12], 1.0) == []


def test_a_time_that_was_not_measured_says_nothing():
    assert find_slow([0.0, 0.0], [0.0, 3.0], 1.0) == []


@pytest.mark.parametrize(("world", "words"), [("8", "rank 5"), ("16", "rank 13 (process 5 of machine 1)")])
def test_a_rank_is_named_with_its_machine(monkeypatch, world, words):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("WORLD_SIZE", world)
    assert name_rank(int(words.split()[1])) == words
