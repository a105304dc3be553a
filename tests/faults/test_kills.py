"""kill -9 at random moments: the same command continues, and the result is that of an undisturbed run."""

import logging
import random
import signal
from collections import Counter

from faulty import assert_same, lines

KILLS, KILLS_LONG = 3, 20
"""Kills a seed, and with `--long`."""
STEPS = 60
FURTHEST = 15
"""Most steps between two kills; saves are due after every third, and each waits for the one before."""


def random_kill(runs, draw):
    """One kill of one rank or all, at a moment of a step or of writing a checkpoint, and how far it is then."""
    to = draw.choice([[0], [1], [0, 1]])
    rank, delay = draw.randrange(2), draw.uniform(0.0, 0.08)
    if draw.random() < 0.4:
        ahead = draw.randrange(3, FURTHEST, 3)
        return ahead - 3, runs.when("save", rank, runs.step + ahead, delay, to, seconds=0.05)
    ahead = draw.randint(1, FURTHEST)
    return max((ahead - 1) // 3 * 3 - 3, 0), runs.when("step", rank, runs.step + ahead, delay, to)


def test_a_run_that_is_killed_at_random_moments_ends_as_if_nothing_had_happened(runs, left_alone, seed, request):
    draw, done, kills = random.Random(seed), 0, Counter()
    wanted = KILLS_LONG if request.config.getoption("--long", default=False) else KILLS
    for _ in range(wanted):
        if runs.step > STEPS - FURTHEST - 1:
            finish(runs, left_alone)
            runs = runs.next()
        before, start = lines(runs.folder), runs.step
        saved, (fault, kill) = random_kill(runs, draw)
        ended = runs.start(STEPS, faults=[fault], signals=[kill], wait=0.2)
        assert ended.returncode in (-signal.SIGKILL, 1), ended.stderr
        assert runs.step >= start + saved
        assert lines(runs.folder)[:start] == before[:start]  # Byte for byte.
        done += runs.step - start
        kills[f"in a {fault['kind']}"] += 1
        kills["of all ranks" if len(kill["ranks"]) > 1 else "of one rank"] += 1
    logging.info("seed %d: %s; %d steps", seed, ", ".join(f"{n} {of}" for of, n in sorted(kills.items())), done)
    finish(runs, left_alone)
    assert done >= 2 * wanted  # It went on: little of it comes from the starts that nobody killed.


def finish(runs, left_alone):
    before, start = lines(runs.folder), runs.step
    ended = runs.start(STEPS)
    assert ended.returncode == 0, ended.stderr
    assert lines(runs.folder)[:start] == before[:start]
    assert_same(runs.folder, left_alone(STEPS), STEPS)
