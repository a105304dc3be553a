"""The launcher `ray`: placement, and runs on a Ray cluster that this test starts on this machine.

uv run --group ray pytest tests/ray_cluster -m 'slow or not slow'
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from rlinf_core import UserError

if not find_spec("rlinf_plugins_ray") or not find_spec("ray"):
    pytest.skip("rlinf-plugins-ray is not installed: uv sync --group ray", allow_module_level=True)

from rlinf_plugins_ray import launcher, plugin

ROOT = Path(__file__).parents[2]
GPUS, CPUS = {"GPU": 4.0, "CPU": 64.0}, {"CPU": 2.0}


@pytest.mark.parametrize(
    ("overrides", "resources", "placed"),
    [
        (["trainer.device=auto"], GPUS, (4, True)),
        (["trainer.device=auto", "cluster.component_placement.actor=0-1"], GPUS, (2, True)),
        ([], GPUS, (1, False)),
        (["cluster.num_nodes=2"], CPUS, (2, False)),
        (["cluster.component_placement.actor=0-1"], CPUS, (2, False)),
    ],
)
def test_workers_are_those_of_the_placement(configure_toy, overrides, resources, placed):
    run = configure_toy("cluster.launcher=ray", "trainer.micro_batch_size=5", *overrides)
    assert launcher.place(run, resources) == placed


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["cluster.component_placement.actor=2-3"], r'Ray chooses them: write a range from 0, such as "0-1"'),
        (["cluster.component_placement.actor=0-3"], r"needs 4 CPUs, the Ray cluster has 2: add nodes"),
        (["cluster.component_placement.actor=0-1", "trainer.micro_batch_size=20"], "is not a multiple of 2 ranks x"),
    ],
)
def test_what_does_not_fit_the_cluster_is_refused(configure_toy, overrides, complaint):
    with pytest.raises(UserError, match=complaint):
        launcher.place(configure_toy("cluster.launcher=ray", *overrides), CPUS)


def test_secrets_of_the_driver_stay_there(configure_toy, monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HF_HOME", "NCCL_DEBUG", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    passed = launcher._job(configure_toy(), [], tmp_path)["environment"]
    assert {"HF_HOME", "NCCL_DEBUG"} <= passed.keys()
    assert not {"HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"} & passed.keys()


def test_only_runs_that_ask_for_ray_get_it(configure_toy):
    assert plugin.rlinf_launch(configure_toy(), []) is None
    assert plugin.rlinf_describe_launch(configure_toy(), []) is None
    run = configure_toy("cluster.launcher=ray", "cluster.component_placement.actor=0-1", "cluster.max_restarts=3")
    text = plugin.rlinf_describe_launch(run, ["toy.toml"])
    assert text == "Ray Train, 2 workers, up to 3 restarts: python -m rlinf_core.train toy.toml"


def test_no_cluster_is_a_message(configure_toy, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr("ray.init", lambda **_: (_ for _ in ()).throw(ConnectionError("nobody answers")))
    with pytest.raises(UserError, match=r"no Ray cluster can be reached \(nobody answers\). Start one with `ray start"):
        launcher.launch(configure_toy("cluster.launcher=ray"), [])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The address of a Ray cluster of two CPUs, ended with its own process group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The path of a socket in it may have 107 characters.
    folder = tmp_path_factory.mktemp("r")
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
    command += ["--node-ip-address=127.0.0.1", "--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats"]
    environment = os.environ | {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    environment["RAY_memory_monitor_refresh_ms"] = (
        "0"  # Else it kills workers when other jobs of the machine need memory.
    )
    log = (folder / "ray.txt").open("w")
    with subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True) as process:
        end = time.monotonic() + 120
        while True:
            assert process.poll() is None, (folder / "ray.txt").read_text()
            if "Ray runtime started" in (folder / "ray.txt").read_text():
                break
            assert time.monotonic() < end
            time.sleep(0.2)
        yield f"127.0.0.1:{port}"
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    log.close()


@pytest.fixture
def launch(cluster, toy_site, tmp_path):
    """Start `rlinf launch` of the toy policy on two workers; returns its process."""

    def launch(*overrides):
        code = "import sys; from rlinf_core.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", code, "launch", str(toy_site / "toy.toml"), "cluster.launcher=ray"]
        command += ["cluster.component_placement.actor=0-1", f"runner.output_dir={tmp_path}", "runner.name=toy"]
        paths = os.pathsep.join([str(toy_site), str(ROOT / "tests" / "support")])
        environment = os.environ | {"RAY_ADDRESS": cluster, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        environment |= {"RLINF_DISABLE_PLUGINS": "rlinf-plugins-text"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen([*command, *overrides], env=environment, **pipes)

    return launch


def ranks_of(folder):
    """Processes that train the run in a folder."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if b"rlinf_core.train" in words and f"runner.output_dir={folder}".encode() in words:
                yield int(path.parent.name)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_survives_a_killed_rank(launch, tmp_path):
    run = tmp_path / "toy"
    process = launch("runner.max_steps=600", "runner.save_interval=100", "cluster.max_restarts=1", "--overwrite")
    while not (run / "latest").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    saved = int((run / "latest").read_text().split("_")[1])
    os.kill(max(ranks_of(tmp_path)), signal.SIGKILL)
    out, _ = process.communicate(timeout=500)
    assert process.returncode == 0, out
    steps = [row["step"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "lr" in row]
    assert steps == list(range(1, 601))  # None is missing or double, and --overwrite has not begun again.
    assert f"resumes from step {saved}" in out or "continues" in out or "from checkpoint" in out, out[-4000:]
    assert json.loads((run / "environment.json").read_text())["ranks"] == 2
    assert not list(ranks_of(tmp_path))
    assert not (tmp_path / ".toy.ray").exists()


@pytest.mark.slow
def test_a_mistake_is_said_and_not_tried_again(launch, tmp_path):
    process = launch("runner.max_steps=2", "cluster.max_restarts=3", "policy.weights=nowhere")
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 2, out
    assert "policy.weights: there is no file nowhere" in out  # Only the ranks look for it.
    assert out.count("loading plugins and the config") == 1  # Rank 0 was started once.
