"""Runs and commands in environments drawn at random: they work, or say in one message why not.

`RLINF_FUZZ=200 pytest -n 0 tests/faults/test_start_environment.py` draws as many.
"""

import errno
import getpass
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import surroundings
from damaging import LONG

from rlinf_core.errors import Exit, UserError, beyond_environment
from rlinf_core.process.start import check_launcher, launched_rank, name_user

ROOT = Path(__file__).parents[2]
STARTS, TRAINS = range(LONG or 2), range(LONG) if LONG else (4, 8, 13)
"""Seeds. A command takes a second and a half, a forked run one. Those of runs have a closed stdout, a path that is too
long, and a folder that does not exist yet."""


def files_of(folder):
    """The files below a folder."""
    return {os.path.join(above, name) for above, _, names in os.walk(folder) for name in names}


def check(code, err, environment):
    """It has worked, or has said in one message what is wrong with the environment."""
    told = f"{environment}\n{code}: {err}"
    assert "Traceback" not in err, told
    assert code in (Exit.OK, Exit.USER_ERROR, Exit.DEFECT), told
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (len(lines) == 1) == (code != Exit.OK), told


@pytest.mark.parametrize("drawn", TRAINS)
def test_a_run_trains_or_says_why_not(drawn, toy_site, tmp_path, start_ranks):
    environment = surroundings.draw(drawn, tmp_path, mounts=False)
    before = files_of(tmp_path)
    ended = start_ranks(
        "surroundings:train",
        1,
        json.dumps(environment),
        tmp_path,
        toy_site / "toy.toml",
        f"runner.output_dir={json.dumps(environment['output'])}",
        *("runner.max_steps=1", "runner.name=run"),
        paths=[toy_site, ROOT / "tests" / "support"],
        RLINF_DISABLE_PLUGINS="rlinf-plugins-text,rlinf-plugins-openpi",
    )
    check(ended.returncode, ended.stderr, environment)
    output = os.path.realpath(tmp_path / environment["output"])
    stray = {one for one in files_of(tmp_path) - before if not one.startswith((output, *caches(environment)))}
    assert not stray, environment
    if ended.returncode == 0:
        assert Path(output, "run", "latest").is_symlink() or Path(output, "run", "latest").is_file()


def caches(environment):
    """Where a run may write besides its output folder."""
    variables = environment["variables"]
    return tuple(
        variables[name]
        for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "HF_HOME", "RLINF_CACHE")
        if variables.get(name)
    )


@pytest.mark.parametrize("drawn", STARTS)
def test_a_command_works_or_says_why_not(drawn, tmp_path):
    environment = surroundings.draw(1000 + drawn, tmp_path)
    words = [sys.executable, "-m", "rlinf_core.cli", "validate", ROOT / "examples" / "quickstart.toml"]
    words += [f"runner.output_dir={json.dumps(environment['output'])}"]
    words += [f"data.repo_id={ROOT / 'examples' / 'data' / 'metaworld_3tasks'}"]
    with subprocess.Popen(
        surroundings.command(environment, tmp_path, *words),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    ) as process:
        try:
            _, err = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    check(process.returncode, err.decode(errors="replace"), environment)


def test_a_run_resumes_through_links_and_after_it_was_moved(train_toy, tmp_path):
    """A folder on another disk, linked; a run that was moved there later; and checkpoints on a third one."""
    for name in ("disk", "other", "third"):
        (tmp_path / name).mkdir()
    (tmp_path / "runs").symlink_to("disk")
    (tmp_path / "saved").symlink_to("third")
    settings = [f"runner.output_dir={tmp_path / 'runs'}", "runner.save_interval=1"]
    assert train_toy(*settings, "runner.max_steps=1").step == 1
    assert (tmp_path / "disk/run/latest").read_text() == "step_000000001"
    (tmp_path / "disk/run").rename(tmp_path / "other/run")
    (tmp_path / "disk/run").symlink_to("../other/run")
    assert train_toy(*settings, "runner.max_steps=2").step == 2
    rows = [json.loads(line) for line in (tmp_path / "other/run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    apart = [*settings, "runner.name=apart", f"runner.checkpoint_dir={tmp_path / 'saved'}"]
    assert train_toy(*apart, "runner.max_steps=1").step == 1
    assert train_toy(*apart, "runner.max_steps=2").step == 2
    assert list((tmp_path / "third").rglob("step_000000002/state.json"))


ERRORS = {
    errno.ENAMETOOLONG: "a file's name may have 255 bytes",
    errno.ELOOP: "correct the symbolic links",
    errno.EROFS: "runner.output_dir, .* TMPDIR",
    errno.EACCES: "change the permissions",
    errno.ENOTDIR: "a part of the path is a file",
    errno.EMFILE: "raise the limit of open files",
}


@pytest.mark.parametrize("number", ERRORS)
def test_an_error_of_the_environment_names_the_path_and_the_way_out(number):
    said = beyond_environment(OSError(number, os.strerror(number), "/data/x"))
    assert re.match(f"{re.escape(os.strerror(number))}: /data/x: .*{ERRORS[number]}", str(said))
    assert beyond_environment(OSError(errno.EBADF, "a defect")) is None


def test_streams_that_are_closed_go_nowhere(tmp_path):
    """Otherwise what is printed goes into the next file that is opened."""
    code = (
        "import os; os.close(1); from rlinf_core.process.start import open_streams; open_streams();"
        "file = open('data', 'w'); os.write(1, b'printed'); file.write('data')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / "data").read_text() == "data"


def test_a_user_without_a_name_gets_one(monkeypatch):
    """As with `docker run --user 54321`."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 54_321_987)
    name_user()
    assert getpass.getuser() == "54321987"


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "29500", "LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("left", "said"),
    [
        ({"RANK": "0"}, "do not fit: no WORLD_SIZE, no MASTER_ADDR, no MASTER_PORT"),
        (TORCHRUN | {"RANK": "2"}, "do not fit: RANK=2, WORLD_SIZE=2"),
        (TORCHRUN | {"RANK": "one"}, "do not fit: RANK=one"),
        (TORCHRUN | {"LOCAL_RANK": "", "MASTER_ADDR": ""}, "do not fit: MASTER_ADDR=, LOCAL_RANK="),
    ],
)
def test_what_another_launcher_left_is_one_message(monkeypatch, left, said):
    for name in (*TORCHRUN, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        check_launcher()


def test_a_process_without_a_rank_is_alone(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    check_launcher()
    assert launched_rank() == 1
    monkeypatch.delenv("RANK")
    check_launcher()
    assert not {"WORLD_SIZE", "LOCAL_RANK"} & os.environ.keys()
    assert launched_rank() == 0


def test_commands_work_without_docstrings():
    """As with `python -OO` or PYTHONOPTIMIZE=2."""
    for module in ("rlinf_core.train", "rlinf_core.cli"):
        command = [sys.executable, "-OO", "-m", module, "--help"]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
