"""Several machines for real: `rlinf launch` in network namespaces that are joined by a switch, killed and cut off.

pytest -n 0 -m slow tests/faults/test_machines_in_a_network.py    # as root
"""

import json
import os
import re
import sys
import time
from pathlib import Path

import pytest
from distributions import install
from machines import Machines, why_not
from pace import UNTIL
from toy_policy import CONFIG

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
if reason := why_not():
    pytest.skip(reason, allow_module_level=True)

SUPPORT = Path(__file__).parents[1] / "support"
LONG = 400
"""Seconds that anything may take on a busy machine."""
PORT = 29555
STEPS = 40


@pytest.fixture
def cluster(tmp_path):
    """`cluster(machines)`: a `Cluster` in a temporary folder, which ends with the test."""
    clusters = []

    def cluster(machines):
        clusters.append(Cluster(tmp_path, machines))
        return clusters[-1]

    yield cluster
    for one in clusters:
        one.machines.__exit__()


class Cluster:
    """Machines that train the toy policy, by default so slowly that they can be disturbed."""

    def __init__(self, folder, count):
        self.folder, self.count = folder, count
        self.run = folder / "runs" / "run"
        install(folder, "toy", plugins={"toy": "toy_policy"}, datasets={"toy": "toy_policy:TrainableToyDataset"})
        install(folder, "pace", plugins={"pace": "pace"})
        (folder / "toy.toml").write_text(CONFIG)
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, (folder, SUPPORT))),
            "OMP_NUM_THREADS": "1",
            "RLINF_DISABLE_PLUGINS": "rlinf-plugins-text",
            UNTIL: str(folder / "fast"),
        }
        self.machines = Machines(count, folder).__enter__()

    @property
    def settings(self):
        batch = [f"runner.output_dir={self.folder}/runs", "runner.name=run", f"runner.max_steps={STEPS}"]
        batch += ["runner.save_interval=4", "trainer.global_batch_size=12", "trainer.micro_batch_size=1"]
        return [*batch, "trainer.timeout_seconds=20"]

    @property
    def rendezvous(self):
        return [f"cluster.num_nodes={self.count}", f"cluster.rdzv_endpoint=node0:{PORT}"]

    def launch(self, node, *overrides):
        """`rlinf launch` on a machine."""
        start = "import sys; from rlinf_core.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", start, "launch", self.folder / "toy.toml"]
        return self.start(node, [*command, *self.settings, *self.rendezvous, *overrides])

    def start(self, node, command):
        with self.said_by(node).open("a") as said:
            return self.machines.start(node, command, cwd=self.folder, env=self.environment, stdout=said, stderr=said)

    def said_by(self, node):
        return self.folder / f"node{node}.txt"

    def said(self):
        """What the machines have printed, in one line each."""
        return [
            " ".join(self.said_by(n).read_text().split()) if self.said_by(n).exists() else "" for n in range(self.count)
        ]

    def rows(self):
        path = self.run / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for(self, step):
        """Wait until so many steps are done."""
        end = time.monotonic() + LONG
        while len(self.rows()) < step:
            assert time.monotonic() < end, self.said()
            time.sleep(0.2)

    def hurry(self):
        (self.folder / "fast").touch()

    def finish(self, launchers):
        """Wait for the end of a run that goes well, which has made each step once."""
        self.hurry()
        for launcher in launchers:
            assert launcher.wait(LONG) == 0, "\n".join(self.said())
        assert [row["step"] for row in self.rows()] == list(range(1, STEPS + 1))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Losses of one process."""
    cluster = Cluster(tmp_path_factory.mktemp("alone"), 1)
    cluster.hurry()
    command = [sys.executable, "-m", "rlinf_core.train", cluster.folder / "toy.toml", *cluster.settings]
    try:
        assert cluster.start(0, command).wait(LONG) == 0, cluster.said()
    finally:
        cluster.machines.__exit__()
    return [row["loss"] for row in cluster.rows()]


def assert_equal(cluster, alone):
    """Contract 1."""
    assert [row["loss"] for row in cluster.rows()] == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("count", [2, 3])
def test_machines_with_addresses_of_their_own_train_as_one_process(cluster, alone, count):
    machines = cluster(count)
    machines.finish([machines.launch(node) for node in range(count)])
    assert_equal(machines, alone)


def test_each_machine_keeps_a_copy_of_the_model_and_another_topology_continues(cluster, alone):
    """Two machines with two ranks each, then one process."""
    machines = cluster(2)
    two = ["cluster.component_placement.actor=0-3", "runner.max_steps=20"]
    machines.hurry()
    launchers = [machines.launch(node, *two) for node in range(2)]
    assert [launcher.wait(LONG) for launcher in launchers] == [0, 0], machines.said()
    said = machines.said()[0]
    assert (
        'sharding: 2 copies of the model, each sharded over the 2 ranks of a machine (trainer.num_replicas = "auto")'
        in said
    )
    assert re.search(
        r"machines, measured in .* node0 2 ranks CPU.* node1 2 ranks CPU.*; slowest link: node\d -> node\d", said
    )
    found = json.loads((machines.run / "machines.json").read_text())
    assert [machine["host"] for machine in found["machines"]] == ["node0", "node1"]
    assert found["seconds"] < 30  # A second or two on a machine that is not busy.
    command = [sys.executable, "-m", "rlinf_core.train", machines.folder / "toy.toml", *machines.settings]
    machines.finish([machines.start(0, command)])
    assert_equal(machines, alone)


def test_torchrun_by_hand_does_the_same(cluster, alone):
    """Only the ranks choose their interface: torchrun gets neither `--local-addr` nor `is_host`."""
    machines = cluster(2)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    torchrun += ["--rdzv-backend=c10d", f"--rdzv-endpoint=node0:{PORT}", "-m", "rlinf_core.train"]
    command = [*torchrun, machines.folder / "toy.toml", *machines.settings]
    machines.finish([machines.start(node, command) for node in range(2)])
    assert_equal(machines, alone)


def test_a_machine_that_is_lost_comes_back_and_the_run_goes_on(cluster, alone):
    machines = cluster(2)
    launchers = [machines.launch(node, "cluster.max_restarts=3") for node in range(2)]
    machines.wait_for(8)
    machines.machines.lose(1)
    launchers[1].wait(LONG)
    machines.finish([launchers[0], machines.launch(1, "cluster.max_restarts=3")])
    assert_equal(machines, alone)
    assert "continues at step " in machines.said()[0]


def test_the_others_end_when_the_machine_of_the_rendezvous_is_lost_and_all_start_again(cluster, alone):
    machines = cluster(2)
    launchers = [machines.launch(node, "cluster.join_timeout_seconds=20", "cluster.max_restarts=3") for node in (0, 1)]
    machines.wait_for(8)
    machines.machines.lose(0)
    assert launchers[1].wait(LONG) == 1, machines.said()
    assert (
        machines.said()[1].count(f"the launcher at cluster.rdzv_endpoint = 'node0:{PORT}' has ended or cannot be") == 1
    )
    assert "Exception raised" not in machines.said()[1]
    machines.finish([machines.launch(node) for node in range(2)])
    assert_equal(machines, alone)


def test_a_machine_that_never_comes_is_reported_with_those_that_are_there(cluster):
    machines = cluster(3)
    launchers = [machines.launch(node, "cluster.join_timeout_seconds=40") for node in (0, 1)]
    assert [launcher.wait(LONG) for launcher in launchers] == [2, 2], machines.said()
    for said in machines.said()[:2]:
        assert "waiting for the other machines; " in said
        assert "2 of 3 machines are there: node0 (10.83.0.1), node1 (10.83.0.2). Run the same command" in (
            said.replace("node1 (10.83.0.2), node0 (10.83.0.1)", "node0 (10.83.0.1), node1 (10.83.0.2)")
        )


def test_a_rendezvous_that_nobody_opens_is_reported(cluster):
    machines = cluster(2)
    launcher = machines.launch(1, "cluster.join_timeout_seconds=12")
    assert launcher.wait(LONG) == 2
    assert f"cluster.rdzv_endpoint = 'node0:{PORT}' has not answered for 12 s" in machines.said()[1]


@pytest.mark.parametrize("restored", [True, False])
def test_a_cut_cable_ends_both_sides_with_one_message_each(cluster, alone, restored):
    machines = cluster(2)
    launchers = [machines.launch(node) for node in range(2)]
    machines.wait_for(8)
    machines.machines.cut(1)
    began = time.monotonic()
    if restored:
        time.sleep(30)
        machines.machines.restore(1)
    assert [launcher.wait(LONG) for launcher in launchers] == [1, 1], machines.said()
    assert time.monotonic() - began < 150  # 20 s, twice where a launcher has to notice, and a busy machine.
    for said in machines.said():
        # Of the rank, and of the launcher if it has lost the rendezvous.
        assert said.count("(trainer.timeout_seconds = 20)") + said.count("trainer.timeout_seconds = 20:") <= 1
        assert 1 <= said.count("error: ") + said.count("error on rank 1: ") <= 2
        assert "Exception raised" not in said
    if not restored:
        machines.machines.restore(1)
    machines.finish([machines.launch(node) for node in range(2)])  # Nothing is lost.
    assert_equal(machines, alone)


def test_a_cable_that_is_back_soon_is_not_noticed_and_later_costs_a_restart(cluster, alone):
    machines = cluster(2)
    launchers = [machines.launch(node, "cluster.max_restarts=3") for node in range(2)]
    machines.wait_for(6)
    machines.machines.cut(1)
    time.sleep(6)
    machines.machines.restore(1)
    machines.wait_for(10)
    assert "continues at step" not in machines.said()[0]
    machines.machines.cut(1)
    time.sleep(35)
    machines.machines.restore(1)
    machines.finish(launchers)
    assert "continues at step" in machines.said()[0]
    assert_equal(machines, alone)
