"""kill -9 at random moments: the same command goes on, and the end is that of a run that nobody killed."""

import random
import signal

import pytest
from faulty import assert_same, lines

KILLS, LONG = 20, 200
STEPS = 40
"""Of a run, which is killed ten times and then left to its end."""


def random_kill(runs, draw):
    """One kill of one rank or all: at a moment of a step, or while a checkpoint is being written."""
    to = draw.choice([[0], [1], [0, 1]])
    rank, delay = draw.randrange(2), draw.uniform(0.0, 0.08)
    if draw.random() < 0.4:
        return runs.when("save", rank, runs.step + 3, delay, to, seconds=0.05)
    return runs.when("step", rank, runs.step + draw.randint(1, 6), delay, to)


@pytest.mark.timeout(3600)  # Of processor time it takes a minute; of others' machines nobody knows.
def test_a_run_that_is_killed_at_random_moments_ends_as_if_nothing_had_happened(runs, left_alone, is_long):
    draw = random.Random(8)
    kills, steps = 0, 0
    while kills < (LONG if is_long else KILLS):
        if runs.step >= STEPS - 6:
            finish(runs, left_alone)
            runs = runs.next()
        before, start = lines(runs.folder), runs.step
        fault, kill = random_kill(runs, draw)
        ended = runs.start(STEPS, faults=[fault], signals=[kill])
        assert ended.returncode in (-signal.SIGKILL, 1), ended.stderr
        kills += 1
        assert runs.step >= start
        steps += runs.step - start
        assert lines(runs.folder)[:start] == before[:start]  # Byte for byte.
    finish(runs, left_alone)
    assert steps  # It went on, too: not all of it came from the last start.


def finish(runs, left_alone):
    before, start = lines(runs.folder), runs.step
    ended = runs.start(STEPS)
    assert ended.returncode == 0, ended.stderr
    assert lines(runs.folder)[:start] == before[:start]
    assert_same(runs.folder, left_alone(STEPS), STEPS)
