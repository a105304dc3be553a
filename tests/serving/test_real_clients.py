"""The published clients of openpi and vla-eval, each in an environment of its own, against `rlinf serve`."""

import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from saved_run import save_run
from websockets.sync.client import connect

from rlinf_client import PolicyClient
from rlinf_core import cli
from rlinf_core.config.load import load_config
from rlinf_core.data.normalize import NormStats
from rlinf_core.training.distributed.processes import processes

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("uv"), reason="needs uv, which makes environments")]

OPENPI = """
import sys
import numpy as np
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy

assert np.__version__ < "2"
policy = WebsocketClientPolicy("127.0.0.1", int(sys.argv[1]), api_key="secret")
assert policy.get_server_metadata()["action_horizon"] == 5
seen = {"observation/image": np.zeros((48, 64, 3), np.uint8), "observation/state": np.zeros(4), "prompt": "push"}
first, second = policy.infer(seen), policy.infer(seen)
assert first["actions"].shape == (5, 4) and first["policy_timing"]["infer_ms"] > 0
assert second["server_timing"]["prev_total_ms"] > 0
try:
    policy.infer({"observation/image": 1})
except RuntimeError as error:
    assert "lacks 'observation.state'" in str(error) and "Traceback" not in str(error)
broker = ActionChunkBroker(policy, 5)
assert [broker.infer(seen)["actions"].shape for _ in range(7)] == [(4,)] * 7
"""
VLA_EVAL = """
import sys
import anyio
import numpy as np
from vla_eval.connection import Connection

async def main():
    seen = {"images": {"agentview": np.zeros((48, 64, 3), np.uint8)}, "states": np.zeros(4), "task_description": "push"}
    connection = Connection(f"ws://127.0.0.1:{sys.argv[1]}/vla-eval")
    await connection.connect(benchmark="libero")
    assert connection.server_info["protocol_version"] == 1
    await connection.start_episode({"task": {"name": "push"}})
    assert [(await connection.act(seen))["actions"].shape for _ in range(7)] == [(4,)] * 7
    await connection.start_episode({"task": {"name": "push"}})
    try:
        await connection.act({"images": {}})
    except RuntimeError as error:
        assert "lacks" in str(error)
    else:
        raise AssertionError("nothing was refused")
    await connection.close()

anyio.run(main)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An exported policy with random weights."""
    there = tmp_path_factory.mktemp("served")
    run = load_config("examples/quickstart.toml", ["policy.num_sampling_steps=2", f"runner.output_dir={there}"])
    torch.manual_seed(0)
    values = {name: torch.randn_like(one) * 0.05 for name, one in run.policy.build().named_parameters()}
    spread = NormStats(mean=np.zeros(4), std=np.ones(4), q01=-np.ones(4), q99=np.ones(4))
    with processes("cpu") as group:
        save_run(run, values, {"state": spread, "actions": spread}, group)
    assert cli.main(["export", str(run.folder), "--output", str(there / "policy")]) == 0
    return there / "policy"


@pytest.fixture
def serve(folder, monkeypatch):
    """Start `rlinf serve`, as a user does; it must end well on SIGTERM."""
    running = []

    def serve(**environment):
        command = [sys.executable, "-m", "rlinf_core.cli", "serve", str(folder), "--port", "0"]
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        lines = iter(running[0].stdout.readline, "")
        return next(match[1] for line in lines if (match := re.search(r"serving on ws://127.0.0.1:(\d+)", line)))

    serve.running = running
    yield serve
    running[0].send_signal(signal.SIGTERM)
    assert running[0].wait(60) == 0


def run_with(folder, packages, script, port):
    uv = shutil.which("uv")
    python = folder / "environment" / "bin" / "python"
    subprocess.run([uv, "venv", "-q", str(folder / "environment"), "--python", sys.executable], check=True)
    subprocess.run([uv, "pip", "install", "-q", "--python", str(python), *packages], check=True)
    subprocess.run([str(python), "-c", script, port], check=True, timeout=120)


def test_openpis_client_and_its_broker_work_unchanged(serve, tmp_path):
    # The published package does not declare typing_extensions, which it imports.
    run_with(tmp_path, ["openpi-client==0.1.2", "typing_extensions"], OPENPI, serve(RLINF_API_KEY="secret"))


def test_vla_evals_connection_works_unchanged(serve, tmp_path):
    run_with(tmp_path, ["vla-eval==0.8.0"], VLA_EVAL, serve())


def test_of_a_thousand_requests_among_garbage_none_is_lost_and_memory_is_flat(serve, capsys):
    address = f"ws://127.0.0.1:{serve()}"
    seen = {"observation/image": np.zeros((224, 224, 3), np.uint8), "state": np.zeros(4), "prompt": "push"}
    clients = [PolicyClient(address) for _ in range(2)]
    server = Path(f"/proc/{serve.running[0].pid}/status")
    answered, overheads, sizes = [0, 0], [], []

    def ask(number):
        for index in range(500):
            options = ({}, {"num_steps": 1 + index % 3}, {"seed": [number, index], "draw": index % 5})[index % 3]
            reply = clients[number].infer(seen, **options)
            assert np.isfinite(reply["actions"]).all()
            answered[number] += 1
            if number == 0 and index % 100 == 0:
                sizes.append(int(re.search(r"VmRSS:\s+(\d+)", server.read_text())[1]) / 1024)

    def disturb():
        while sum(answered) < 1000:
            with connect(address, proxy=None) as connection:
                connection.recv()
                for message in (b"\xc1", "text", b"\x91" * 2000):
                    connection.send(message)
                    assert isinstance(connection.recv(timeout=30), str)
            time.sleep(0.05)

    with ThreadPoolExecutor(3) as threads:
        for one in [threads.submit(ask, 0), threads.submit(ask, 1), threads.submit(disturb)]:
            one.result()
    for _ in range(100):  # Alone: what the server adds to computing.
        start = time.perf_counter()
        reply = clients[0].infer(seen)
        overheads.append((time.perf_counter() - start) * 1e3 - reply["server_timing"]["infer_ms"])
    assert answered == [500, 500]
    assert max(sizes[1:]) - sizes[1] < 40, sizes  # MB; the first requests fill caches.
    with capsys.disabled():
        print(f"\noverhead p50 {np.median(overheads):.2f} ms, memory {sizes} MB")
    for client in clients:
        client.close()
