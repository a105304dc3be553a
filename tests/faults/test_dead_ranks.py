"""A rank that dies: the others end with one message instead of waiting, and the run continues from its checkpoint."""

import signal
import time

import pytest
from faulty import assert_same

SOON = 60
"""Seconds within which the others end, even on a busy machine; without detection they would wait ten minutes."""


@pytest.mark.parametrize("kind", [pytest.param("step", marks=pytest.mark.slow), "save"])
def test_the_others_end_with_one_message(runs, left_alone, kind):
    """While the checkpoint of step 6 is being written, or in step 5, after that of step 3 was saved."""
    waiting = ["runner.async_save=false"] if kind == "step" else []
    fault, kill = runs.when(kind, rank=1, step=6 if kind == "save" else 5, delay=0.0, to=[1])
    if kind == "save":
        fault["seconds"] = 1.0
    began = time.monotonic()
    ended = runs.start(12, *waiting, faults=[fault], signals=[kill])
    assert time.monotonic() - began < SOON
    assert ended.returncode == -signal.SIGKILL
    assert ended.stderr.count("error: rank 0 lost the connection to another rank in step ") == 1
    assert "Traceback" not in ended.stderr
    assert (runs.end()["code"], runs.end()["reason"]) == (1, "defect")
    assert runs.step == 3
    again = runs.start(12)
    assert again.returncode == 0, again.stderr
    assert_same(runs.folder, left_alone(12), 12)
