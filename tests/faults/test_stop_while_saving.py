"""Signals while a checkpoint is being written: the run saves its current step; a second Ctrl-C exits at once."""

import signal

import pytest
from faulty import assert_same

from rlinf_core.training.stopping import AGAIN


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "reason"), [(signal.SIGTERM, 0, "preempted"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_signal_during_a_save_loses_nothing(runs, left_alone, number, code, reason):
    fault, stop = runs.when("save", rank=1, step=3, delay=0.1, to=[0, 1], number=number, seconds=0.5)
    ended = runs.start(18, faults=[fault], signals=[stop])
    assert ended.returncode == code, ended.stderr
    end = runs.end()
    assert (end["code"], end["reason"]) == (code, reason)
    assert "Traceback" not in ended.stderr
    assert 3 <= end["step"] < 18
    assert runs.step == end["step"]
    again = runs.start(18)
    assert again.returncode == 0, again.stderr
    assert_same(runs.folder, left_alone(18), 18)


@pytest.mark.slow
def test_a_second_ctrl_c_leaves_at_once_and_the_checkpoint_before_counts(runs, left_alone):
    fault, first = runs.when("save", rank=0, step=6, delay=0.1, to=[0, 1], number=signal.SIGINT, seconds=15.0)
    second = first | {"delay": AGAIN + 1.0}
    ended = runs.start(18, faults=[fault], signals=[first, second])
    assert ended.returncode == 130, ended.stderr
    assert runs.end()["reason"] == "interrupted"
    assert runs.step == 3
    again = runs.start(18)
    assert again.returncode == 0, again.stderr
    assert_same(runs.folder, left_alone(18), 18)
