"""A run whose ranks hang ends with one message that says where every rank was."""

import json
import re
import time
from types import SimpleNamespace

import distributions
import pytest

from rlinf_core.errors import RunError
from rlinf_core.training.monitor.flight_recorder import FlightRecorder, remember_collectives

HANGS = """
import os, time
from pathlib import Path
from rlinf_core import hookimpl

@hookimpl
def rlinf_policy_built(policy, run):
    if os.environ["RANK"] == "1":
        policy.register_forward_pre_hook(lambda *_: hang(policy, run.folder / "exit.json"))

def hang(policy, end):
    policy.steps = getattr(policy, "steps", 0) + 1
    if policy.steps == 3:
        wait_in_vain(end)

def wait_in_vain(end):
    until = time.monotonic() + 120
    while not end.exists() and time.monotonic() < until:  # The other rank has said its last by then.
        time.sleep(0.05)
    os._exit(0)
"""


@pytest.mark.slow  # 10 s; `tests/faults/test_hangs.py` has shorter ones.
def test_a_rank_that_stops_joining_is_shown_with_its_stack(toy_site, tmp_path, start_ranks):
    distributions.install(tmp_path / "site", "hangs", plugins={"hangs": "hangs"}, hangs=HANGS)
    settings = (toy_site / "toy.toml", f"runner.output_dir={tmp_path}", "runner.max_steps=4")
    paths = (toy_site, tmp_path / "site")
    ended = start_ranks(
        "rlinf_core.train:main", 2, *settings, "trainer.timeout_seconds=8", "trainer.micro_batch_size=10", paths=paths
    )
    assert ended.returncode == 1
    folder = tmp_path / "run"
    end = json.loads((folder / "exit.json").read_text())
    assert (end["code"], end["reason"], end["step"]) == (1, "defect", 2)
    # A rank that is ahead notices where it needs what the other has not sent.
    said = r"rank 0 waited for the other ranks in step 3 \((for|back)ward\) for longer than trainer.timeout_seconds = 8"
    assert re.match(said, end["message"])
    assert len(re.findall(f"error: {said}", ended.stderr)) == 1
    assert "Traceback" not in ended.stderr
    records = {path.name: path.read_text() for path in (folder / "flight").iterdir()}
    assert "rank 1, process" in records["rank_00001.txt"]
    assert "step 3: forward, for" in records["rank_00001.txt"]
    assert "wait_in_vain" in records["rank_00001.txt"]
    assert "ward, for" in records["rank_00000.txt"]


def test_what_takes_long_is_written_down_once(tmp_path, capsys):
    recorder = FlightRecorder(tmp_path, 3, timeout=0.2)
    with recorder.watching():
        recorder.enter("data_wait", 7)
        until = time.monotonic() + 20
        while not recorder.file.exists() and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.3)
    text = recorder.file.read_text()
    assert text.count("rank 3, process") == 1
    assert "step 7: data_wait" in text
    assert "test_what_takes_long_is_written_down_once" in text
    assert str(recorder.file) in capsys.readouterr().err


def test_a_run_that_hangs_nowhere_leaves_no_record(tmp_path):
    recorder = FlightRecorder(tmp_path, 0, timeout=60, beside_nccl=True)
    with recorder.watching():
        recorder.enter("forward", 1)
        assert recorder.file.parent.exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation",
        "[c10d] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=12, OpType=ALLREDUCE)",
    ],
)
def test_a_backends_words_become_ours(tmp_path, text):
    recorder = FlightRecorder(tmp_path, 1, timeout=5)
    recorder.enter("backward", 12)
    fault = recorder.explain(RuntimeError(text))
    assert isinstance(fault, RunError)
    assert "rank 1 waited for the other ranks in step 12 (backward)" in str(fault)


@pytest.mark.parametrize("error", [RuntimeError("Connection closed by peer"), ValueError("timeout of c10d")])
def test_other_errors_keep_their_words(tmp_path, error):
    assert FlightRecorder(tmp_path, 1, timeout=5).explain(error) is None


def test_nccls_recorder_writes_into_the_runs_folder_unless_told_otherwise(tmp_path, monkeypatch):
    environment = {"TORCH_FR_BUFFER_SIZE": "7"}
    monkeypatch.setattr("rlinf_core.training.monitor.flight_recorder.os", SimpleNamespace(environ=environment))
    remember_collectives(tmp_path)
    assert environment["TORCH_FR_BUFFER_SIZE"] == "7"
    assert environment["TORCH_FR_DUMP_TEMP_FILE"] == f"{tmp_path}/flight/nccl_rank_"
