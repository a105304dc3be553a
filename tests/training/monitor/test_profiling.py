"""`runner.profile` writes a trace of some steps; the split of a step's time adds up."""

import json
import time

import pytest
import torch

from rlinf_core.errors import UserError
from rlinf_core.loggers.jsonl import read_rows
from rlinf_core.training.monitor.metrics import PHASES, StepClock


def phases_in(path):
    events = json.loads(path.read_text())["traceEvents"]
    return [event["name"] for event in events if event.get("name") in PHASES and event.get("ph") == "X"]


def test_the_trace_has_the_phases_of_its_steps(train_toy, capsys):
    trainer = train_toy("runner.max_steps=4", "runner.profile=[2,3]", "runner.name=profiled")
    (path,) = (trainer.run.folder / "profile").iterdir()
    assert path.name == "steps_000000002_000000003.json"
    names = phases_in(path)
    # Two micro batches a step, one update.
    assert [names.count(phase) for phase in PHASES] == [4, 4, 4, 2]
    assert f"the trace of steps 2 to 3 is {path}" in capsys.readouterr().out
    plain = train_toy("runner.max_steps=4", "runner.name=plain")
    losses = [[row["loss"] for row in read_rows(one.run.folder / "metrics.jsonl")] for one in (trainer, plain)]
    assert losses[0] == losses[1]
    assert not (plain.run.folder / "profile").exists()


@pytest.mark.parametrize(
    ("steps", "complaint"),
    [
        ("[3]", "must be \\[start, stop\\]"),
        ("[3,2]", "must be \\[start, stop\\]"),
        ("[0,2]", "two steps from 1"),
        ("[10,60]", "has 51 steps: a trace holds at most 20"),
        ("[95,101]", "ends after max_steps = 100"),
    ],
)
def test_ranges_that_make_no_sense_are_refused(configure_toy, steps, complaint):
    with pytest.raises(UserError, match=complaint):
        configure_toy("runner.max_steps=100", f"runner.profile={steps}")


def test_the_parts_of_a_step_sum_to_no_more_than_the_step():
    clock = StepClock(torch.device("cpu"))
    for phase in PHASES:
        with clock.time(phase):
            time.sleep(0.01)
    clock.stop()
    row = clock.read(samples=4)
    shares = [row[f"{phase}_share"] for phase in PHASES]
    assert all(share > 0 for share in shares)
    assert 0.5 < sum(shares) <= 1.0
    assert row["samples_per_second"] == pytest.approx(4 / row["step_seconds"])
    assert clock.cpu_seconds < row["step_seconds"]  # It slept.


def test_a_step_begins_where_the_one_before_ended():
    first = StepClock(torch.device("cpu"))
    first.stop()
    time.sleep(0.02)
    second = StepClock(torch.device("cpu"), first)
    second.stop()
    assert second.read(1)["step_seconds"] >= 0.02
