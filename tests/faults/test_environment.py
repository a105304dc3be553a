"""What surrounds a run and is not as usual: temporary folders, file systems, terminals."""

import os
import subprocess
import sys
import tempfile
from multiprocessing import util
from pathlib import Path

import pytest

from rlinf_core import UserError
from rlinf_core.data import worker_sockets

ROOT = Path(__file__).parents[2]


@pytest.fixture
def train(toy_site, tmp_path):
    """Train the toy policy for two steps in a process of its own; returns the finished process."""

    def train(*overrides, **environment):
        command = [sys.executable, "-m", "rlinf_core.train", str(toy_site / "toy.toml")]
        command += [f"runner.output_dir={tmp_path}", "runner.max_steps=2", *overrides]
        folders = [toy_site, ROOT / "tests" / "support", *filter(None, [os.environ.get("PYTHONPATH")])]
        paths = {"PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=os.environ | paths | environment, capture_output=True)

    return train


def test_workers_meet_in_a_short_folder(train, tmp_path):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    ended = train("data.num_workers=1", TMPDIR=str(long))
    assert ended.returncode == 0, ended.stderr.decode()
    assert (tmp_path / "run" / "latest").read_text() == "step_000000002"


def test_without_a_short_folder_the_long_one_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", f"/{'x' * 70}")
    worker_sockets.place_sockets("set data.num_workers = 0")  # It fits.
    long = f"/{'x' * 71}"
    monkeypatch.setattr(tempfile, "tempdir", long)
    monkeypatch.setattr(worker_sockets, "SHORT_FOLDERS", (str(tmp_path / "missing"),))
    with pytest.raises(UserError) as caught:
        worker_sockets.place_sockets("set data.num_workers = 0")
    assert str(caught.value) == (
        f"TMPDIR ({long}) is too long for the sockets of worker processes: set it to a folder of at most 71 "
        "characters, or set data.num_workers = 0"
    )


def test_a_long_folder_that_python_uses_already_is_named(monkeypatch):
    long = f"/{'x' * 80}"
    monkeypatch.setattr(tempfile, "tempdir", long)
    monkeypatch.setattr(util, "get_temp_dir", lambda: f"{long}/pymp-12345678")
    with pytest.raises(UserError, match="is too long for the sockets"):
        worker_sockets.place_sockets("use --workers 1")
    assert tempfile.tempdir == long
