"""What surrounds a run and is not as usual: temporary folders, file systems, terminals."""

import errno
import os
import subprocess
import sys
import tempfile
from multiprocessing import util
from pathlib import Path
from types import SimpleNamespace

import pytest
from distributions import install

from rlinf_core import UserError
from rlinf_core.data import worker_sockets
from rlinf_core.data.frame_cache.writer import lock
from rlinf_core.training.run_folder import lock_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture
def train(toy_site, tmp_path):
    """Train the toy policy for two steps in a process of its own; returns the finished process."""

    def train(*overrides, site=None, **environment):
        command = [sys.executable, "-m", "rlinf_core.train", str(toy_site / "toy.toml")]
        command += [f"runner.output_dir={tmp_path}", "runner.max_steps=2", *overrides]
        folders = [toy_site, ROOT / "tests" / "support", *filter(None, [site, os.environ.get("PYTHONPATH")])]
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


LOCKLESS = """
import errno, fcntl, os

def flock(file, operation):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

fcntl.flock = flock

from rlinf_core import hookimpl

@hookimpl
def rlinf_configure(run):
    pass
"""

TELLING = """
from rlinf_core import hookimpl
from rlinf_core.data.loading import loader

hand_over = loader.hand_over

def tell(batch):
    print("größe of a batch", flush=True)
    return hand_over(batch)

@hookimpl
def rlinf_configure(run):
    print("größe of a run")
    loader.hand_over = tell  # Workers import this module.
"""
ASCII = {"PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS])
@pytest.mark.parametrize("locked", ["run", "cache"])
def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, capsys, number, locked):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    folder = tmp_path / locked
    with lock_folder(SimpleNamespace(folder=folder)) if locked == "run" else lock(folder):
        pass
    assert capsys.readouterr().err == (
        f"warning: {folder} cannot be locked, as its file system has no locks ({os.strerror(number)}): make sure "
        "yourself that no other process writes to it meanwhile\n"
    )


def test_another_failure_to_lock_is_no_lack_of_locks(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), lock(tmp_path):
        pass


def test_a_run_trains_where_there_are_no_locks(train, tmp_path):
    install(tmp_path / "site", "lockless", plugins={"lockless": "lockless"}, lockless=LOCKLESS)
    ended = train("data.num_workers=0", site=tmp_path / "site")
    assert ended.returncode == 0, ended.stderr.decode()
    assert ended.stderr.decode().count("cannot be locked, as its file system has no locks") == 1
    assert (tmp_path / "run" / "latest").read_text() == "step_000000002"


def test_a_run_trains_without_utf8(train, tmp_path):
    install(tmp_path / "site", "telling", plugins={"telling": "telling"}, telling=TELLING)
    ended = train("data.num_workers=1", site=tmp_path / "site", **ASCII)
    assert ended.returncode == 0, ended.stderr.decode()
    assert ended.stdout.isascii()
    assert b"gr??e of a run\n" in ended.stdout
    assert b"gr??e of a batch\n" in ended.stdout
    assert (tmp_path / "run" / "latest").read_text() == "step_000000002"


@pytest.mark.parametrize("where", ["runner.output_dir", "data.repo_id"])
def test_a_name_that_the_encoding_lacks_is_refused(train, tmp_path, where):
    ended = train(f"{where}={tmp_path}/größe", **ASCII)
    assert ended.returncode == 2, ended.stderr.decode()
    assert ended.stderr.startswith(
        b"error: a file name or setting has characters that are not in ascii, the encoding of this environment's "
        b"locale: set PYTHONUTF8=1 or LC_ALL=C.UTF-8 (found in "
    )
    assert b"Traceback" not in ended.stderr
