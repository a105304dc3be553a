"""A launcher that is killed or gets a signal that ends it: its ranks save and leave, and the next start continues."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import distributions
import pytest

SUPPORT = Path(__file__).parents[1] / "support"
STEPS = 400
LAUNCH = "import sys; from rlinf_core.cli import main; sys.exit(main())"
SLOWED = """
import time
from rlinf_core import hookimpl

@hookimpl
def rlinf_step_finished(trainer, step):
    time.sleep(0.05)
"""


def launch(toy_site, site, folder, log):
    """Start `rlinf launch` with two ranks."""
    settings = (f"runner.output_dir={folder}", f"runner.max_steps={STEPS}", "trainer.micro_batch_size=10")
    placement = 'cluster.component_placement.actor="0-1"'
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH, "launch", toy_site / "toy.toml", *settings, placement],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (toy_site, site, SUPPORT))), "OMP_NUM_THREADS": "1"},
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def step_of(folder):
    metrics = folder / "run" / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


@pytest.mark.slow  # torchrun with two ranks, twice.
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT])
def test_the_ranks_save_and_leave_and_the_next_start_waits_for_them(toy_site, tmp_path, number):
    distributions.install(tmp_path / "site", "slowed", plugins={"slowed": "slowed"}, slowed=SLOWED)
    log = tmp_path / "log"
    with log.open("w") as file:
        first = launch(toy_site, tmp_path / "site", tmp_path, file)
        until = time.monotonic() + 120
        while step_of(tmp_path) < 5 and time.monotonic() < until:
            time.sleep(0.05)
        first.send_signal(number)
        if number == signal.SIGKILL:
            first.wait()
        else:
            assert first.wait(60) == 0, log.read_text()
            end = json.loads((tmp_path / "run" / "exit.json").read_text())
            assert (end["code"], end["reason"]) == (0, "preempted")
        second = launch(toy_site, tmp_path / "site", tmp_path, file)
        assert second.wait(180) == 0, log.read_text()
    saved = int((tmp_path / "run" / "latest").read_text().removeprefix("step_"))
    rows = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(1, STEPS + 1))
    assert saved == STEPS
    said = log.read_text()
    assert "Traceback" not in said
    if number == signal.SIGKILL:
        assert "the process that started this one is gone, so the run saves and ends" in said
