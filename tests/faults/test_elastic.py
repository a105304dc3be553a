"""Elasticity through torchrun itself: workers that are killed, and machines that leave and return.

pytest tests/faults/test_elastic.py -m slow
"""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faulty import assert_same, lines, numbers

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1] / "support"
LONG = 300
"""Seconds that anything may take on a busy machine."""
FAST = "fast"
"""The file that ends the slow steps."""


class Agent:
    """A torchrun in its own session, which represents one machine of a run."""

    def __init__(self, faulty_site, folder, steps, *options, own_store="0"):
        self.log = (folder / f"agent_{random.getrandbits(32):08x}.txt").open("w+")
        command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "rlinf_core.train"]
        command += [faulty_site / "faulty.toml", f"runner.output_dir={folder}", f"runner.max_steps={steps}"]
        paths = {"PYTHONPATH": os.pathsep.join(map(str, (faulty_site, TESTS))), "OMP_NUM_THREADS": "1"}
        slow = {"kind": "slow", "rank": 0, "step": 1, "seconds": 0.1, "until": str(folder / FAST)}
        paths |= {
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": own_store,
            "FAULTS": json.dumps([slow]),
            "OTHER_RANKS_WAIT": "3",
            "RLINF_DISABLE_PLUGINS": "rlinf-plugins-text",
        }
        environment = {key: value for key, value in os.environ.items() if key != "RANK"} | paths
        self.process = subprocess.Popen(
            [*map(str, command), "--overwrite"], env=environment, stdout=self.log, stderr=self.log
        )

    def workers(self):
        """Processes of the run that this agent has started."""
        return children(self.process.pid)

    def lose(self):
        """End everything at once, as a power failure of the machine would."""
        workers = self.workers()
        self.process.kill()
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        self.process.wait()

    def said(self):
        self.log.seek(0)
        return self.log.read()


def children(pid):
    threads = Path(f"/proc/{pid}/task")
    try:
        return [int(child) for thread in threads.iterdir() for child in (thread / "children").read_text().split()]
    except FileNotFoundError:
        return []


@pytest.fixture
def start_agent(faulty_site, tmp_path):
    """Start agents; all are ended after the test."""
    agents = []

    def start(*arguments, **options):
        agents.append(Agent(faulty_site, tmp_path, *arguments, **options))
        return agents[-1]

    yield start
    for agent in agents:
        if agent.process.poll() is None:
            agent.lose()
        agent.log.close()


def wait_for(condition, agents):
    """Wait until a condition holds, while some agent is alive."""
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end, agents[0].said()
        assert all(agent.process.poll() is None for agent in agents), "\n".join(agent.said() for agent in agents)
        time.sleep(0.05)


def last_step(folder):
    rows = lines(folder)
    return int(rows[-1].split(b",")[0].split(b":")[1]) if rows else 0


@pytest.mark.timeout(2 * LONG)
def test_a_worker_that_is_killed_is_started_again_from_the_last_checkpoint(start_agent, tmp_path, left_alone):
    """Twice; with `--overwrite`, which is for the first start only."""
    agent = start_agent(40, "--standalone", "--nproc-per-node=2", "--max-restarts=5")
    for after in (8, 20):
        wait_for(lambda after=after: last_step(tmp_path / "run") > after, [agent])
        os.kill(random.Random(after).choice(agent.workers()), signal.SIGKILL)
    assert agent.process.wait(LONG) == 0, agent.said()
    assert agent.said().count("continues at step ") == 2
    assert_same(tmp_path / "run", left_alone(40), 40)


@pytest.mark.timeout(4 * LONG)
def test_two_machines_survive_losing_and_regaining_one(start_agent, tmp_path, left_alone):
    """One and two ranks in turns; the machine that stays is that of the rendezvous."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    rendezvous = ("--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=8", "--rdzv-backend=c10d", "--rdzv-id=elastic")
    rendezvous += (f"--rdzv-endpoint=localhost:{port}", "--rdzv-conf=last_call_timeout=3,keep_alive_interval=1")
    folder, steps = tmp_path / "run", 600
    stays = start_agent(steps, *rendezvous, own_store="1")
    wait_for(lambda: last_step(folder) > 6, [stays])
    comes = start_agent(steps, *rendezvous, own_store="1")
    wait_for(lambda: ranks_of(folder) == 2, [stays, comes])
    at = last_step(folder)
    wait_for(lambda: last_step(folder) > at + 6, [stays, comes])
    comes.lose()
    wait_for(lambda: ranks_of(folder) == 1, [stays])
    at = last_step(folder)
    wait_for(lambda: last_step(folder) > at + 6, [stays])
    again = start_agent(steps, *rendezvous, own_store="1")
    wait_for(lambda: ranks_of(folder) == 2, [stays, again])
    (tmp_path / FAST).touch()
    assert stays.process.wait(LONG) == 0, stays.said()
    assert again.process.wait(LONG) == 0, again.said()
    assert [row["step"] for row in numbers(folder)] == list(range(1, steps + 1))
    losses = [[row["loss"] for row in numbers(of)] for of in (folder, left_alone(steps))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def ranks_of(folder):
    """Ranks of the run's latest start."""
    path = folder / "environment.json"
    return json.loads(path.read_text())["ranks"] if path.exists() else 0
