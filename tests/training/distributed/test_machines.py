"""Machines of a run that do not see the same folder, config, code, data or weights. Ranks are threads."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy_data import Rows

from rlinf_core.contract.datasets import LeRobotDatasetConfig
from rlinf_core.data.lerobot.source import open_lerobot
from rlinf_core.errors import UserError
from rlinf_core.plugins.owners import Owner
from rlinf_core.training.distributed import same_inputs, shared_folder
from rlinf_core.training.distributed.same_inputs import WHOLE, check_same_files, check_same_program, digest_of
from rlinf_core.training.distributed.shared_folder import check_shared_folders


class Ranks:
    """The process groups of ranks that run in threads, each on a machine of its own."""

    def __init__(self, size):
        self._values, self._barrier = [None] * size, threading.Barrier(size, timeout=60)
        self.gathers = 0

    def of(self, rank):
        def gather(value):
            self._values[rank] = value
            self._barrier.wait()
            answers = list(self._values)
            self.gathers += rank == 0
            self._barrier.wait()
            return answers

        def decide(decision):
            return gather(decision() if rank == 0 else None)[0]

        return SimpleNamespace(rank=rank, size=len(self._values), gather=gather, decide=decide)


@pytest.fixture
def on_machines(monkeypatch):
    """`on_machines(check, *arguments)`: call `check(argument, group)` on each machine; returns the one error of all."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")

    def on_machines(check, *arguments):
        ranks = Ranks(len(arguments))

        def attempt(rank):
            try:
                check(arguments[rank], ranks.of(rank))
            except UserError as error:
                return str(error)
            return ""

        with ThreadPoolExecutor(len(arguments)) as pool:
            [said] = set(pool.map(attempt, range(len(arguments))))
        return said

    return on_machines


def test_a_folder_that_is_not_shared_is_refused_with_both_machines_named(configure_toy, tmp_path, on_machines):
    own = [configure_toy(f"runner.output_dir={tmp_path / name}") for name in ("a", "a", "b")]
    said = on_machines(check_shared_folders, *own)
    assert "runner.output_dir: the ranks do not share one folder. rank 0 on " in said
    assert f" to {tmp_path}/a, but rank 2 on " in said
    assert f"finds no such file in {tmp_path}/b. Every rank writes its part of a checkpoint there" in said
    assert "rank 1" not in said
    assert not any((tmp_path / "a").iterdir())


def test_a_folder_for_checkpoints_on_each_machine_is_refused(configure_toy, tmp_path, on_machines):
    own = [configure_toy(f"runner.checkpoint_dir={tmp_path / name}") for name in ("disk0", "disk1")]
    assert "runner.checkpoint_dir: the ranks do not share one folder." in on_machines(check_shared_folders, *own)
    (tmp_path / "disk1").symlink_to(tmp_path / "disk0")  # Another path, the same folder.
    assert on_machines(check_shared_folders, *own) == ""
    assert not [path.name for path in tmp_path.rglob("*token*")]


def test_a_folder_that_a_machine_cannot_write_to_is_refused(configure_toy, tmp_path, on_machines, monkeypatch):
    monkeypatch.setattr(shared_folder, "_try_to_write", lambda token, rank: "Read-only file system" if rank else "")
    run = configure_toy()
    assert f"cannot write to {tmp_path}: Read-only file system" in on_machines(check_shared_folders, run, run)


def test_what_a_killed_start_has_left_is_removed(configure_toy, tmp_path, on_machines):
    run = configure_toy()
    run.folder.mkdir()
    (tmp_path / f".{run.folder.name}.token.0").touch()
    assert on_machines(check_shared_folders, run, run) == ""
    assert [path.name for path in tmp_path.iterdir() if "token" in path.name] == []
    assert not any(run.folder.iterdir())  # Else the run would be refused: the folder holds no run.


def program(owners=()):
    return lambda run, group: check_same_program(run, owners, group)


def test_another_config_is_refused_with_the_key(configure_toy, tmp_path, on_machines):
    said = on_machines(program(), configure_toy("optim.lr=0.1"), configure_toy("optim.lr=0.2"))
    assert "the config differs between machines: on rank 1 on " in said
    assert "optim.lr = 0.2 instead of 0.1 on rank 0 on " in said


def test_paths_and_workers_of_a_machine_may_differ(configure_toy, tmp_path, on_machines):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    mine = [
        configure_toy(f"runner.output_dir={tmp_path}/runs_{name}", f"data.repo_id={tmp_path}/{name}", workers)
        for name, workers in (("a", "data.num_workers=1"), ("b", "data.num_workers=2"))
    ]
    assert on_machines(program(), *mine) == ""
    assert "data.repo_id = " in on_machines(program(), mine[0], configure_toy("data.repo_id=somebody/else"))


def test_another_version_of_a_plugin_is_refused(configure_toy, tmp_path, on_machines, monkeypatch):
    run = configure_toy()

    def check(version, group):
        check_same_program(run, [Owner("my-robot", version, "robot = rlinf_plugins_openpi.plugin")], group)

    said = on_machines(check, "1.0", "1.1")
    assert "the package rlinf_plugins_openpi differs between machines: rank 1 on" in said
    assert "my-robot 1.1 in " in said
    assert "their files are the same" in said
    assert on_machines(check, "1.0", "1.0") == ""


def test_code_that_was_not_updated_is_refused_with_the_file(configure_toy, tmp_path, on_machines, monkeypatch):
    for machine, text in (("a", "x = 1\n"), ("b", "x = 2\n")):
        (tmp_path / machine / "robot").mkdir(parents=True)
        (tmp_path / machine / "robot" / "__init__.py").touch()
        (tmp_path / machine / "robot" / "arm.py").write_text(text)
    sources, here = same_inputs._sources, threading.local()

    def of_machine(package):
        root = tmp_path / here.machine
        if package == "robot":
            return [(path.relative_to(root).as_posix(), path) for path in sorted((root / "robot").glob("*.py"))]
        return sources(package)

    def check(machine, group):
        here.machine = machine
        check_same_program(configure_toy(), [Owner("robot", "1", "robot = robot")], group)

    monkeypatch.setattr(same_inputs, "_sources", of_machine)
    assert "these files differ: robot/arm.py (its content)" in on_machines(check, "a", "b")


def files(run, source, *, with_weights=True):
    return lambda _, group: check_same_files(run, [("", source(group.rank), None)], group, with_weights=with_weights)


def test_other_rows_are_refused(configure_toy, on_machines):
    said = on_machines(files(configure_toy(), lambda rank: Rows(20 + rank)), 0, 1)
    assert "data differs between machines: rank 1 on " in said
    assert "The run would train on a mixture of both." in said
    assert on_machines(files(configure_toy(), lambda rank: Rows(20)), 0, 1) == ""


def test_an_older_copy_of_a_dataset_is_refused_with_the_file(configure_toy, tmp_path, on_machines, video_dataset):
    copies = [tmp_path / name for name in ("a", "b")]
    for copy in copies:
        shutil.copytree(video_dataset.root, copy)
        shutil.rmtree(copy / ".cache", ignore_errors=True)
    cameras = open_cameras(video_dataset.root)

    def check():
        configs = [LeRobotDatasetConfig(repo_id=str(copy), images=cameras) for copy in copies]
        opened = [open_lerobot(config, 2, "train") for config in configs]  # Here: it forks, which threads forbid.
        return on_machines(files(configure_toy(), opened.__getitem__), 0, 1)

    video = sorted((copies[1] / "videos").rglob("*.mp4"))[-1]
    os.utime(video, (0, 0))
    assert check() == ""
    with video.open("ab") as file:
        file.write(bytes(8))
    said = check()
    assert "data, image files differs between machines" in said
    assert f"these files differ: {video.relative_to(copies[1])} ({video.stat().st_size} bytes instead of " in said
    path = sorted((copies[1] / "data").rglob("*.parquet"))[1]
    table = pq.read_table(path)
    place = table.column_names.index("action")
    doubled = pa.array((2 * np.array(table["action"].to_pylist(), np.float32)).tolist(), table["action"].type)
    pq.write_table(table.set_column(place, table.schema.field(place), doubled), path)
    said = check()
    assert f"these files differ: {path.relative_to(copies[1])} (" in said


def open_cameras(root):
    source = open_lerobot(LeRobotDatasetConfig(repo_id=str(root)), 0, "train")
    return {name.rpartition(".")[2]: name for name in source.metadata.columns_of("video")}


def test_other_weights_are_refused_unless_the_run_continues(configure_toy, tmp_path, on_machines):
    runs = []
    for machine in (0, 1):
        path = tmp_path / f"{machine}.safetensors"
        path.write_bytes(bytes(2 * WHOLE) + bytes([machine]))
        runs.append(configure_toy(f"policy.weights={path}"))

    def check(run, group, *, with_weights=True):
        check_same_files(run, [("", Rows(20), None)], group, with_weights=with_weights)

    said = on_machines(check, *runs)
    assert f"policy.weights differs between machines: rank 1 on {os.uname().nodename} reads {tmp_path}/1" in said
    assert on_machines(lambda run, group: check(run, group, with_weights=False), *runs) == ""


def test_given_statistics_that_differ_are_refused(configure_toy, tmp_path, on_machines):
    runs = [configure_toy(f"data.norm_stats={tmp_path}/{name}.json") for name in ("a", "b")]
    check = [lambda run, group: check_same_files(run, [("", Rows(20), None)], group, with_weights=True)]
    (tmp_path / "a.json").write_text("{}")
    assert on_machines(check[0], *runs) == ""  # Only rank 0 reads them.
    (tmp_path / "b.json").write_text("{ }")
    assert "data.norm_stats differs between machines" in on_machines(check[0], *runs)


def test_a_large_file_is_sampled_to_its_end(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(3 * WHOLE))
    before = digest_of(path)
    for place in (0, 3 * WHOLE - 1):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"\1")
        assert digest_of(path) != before
        before = digest_of(path)


def test_one_machine_compares_nothing(configure_toy, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    nobody = SimpleNamespace(rank=0, size=2)  # Neither gathers nor decides.
    check_same_program(configure_toy(), [], nobody)
    check_same_files(configure_toy(), [("", Rows(20), None)], nobody, with_weights=True)
    check_shared_folders(configure_toy(), SimpleNamespace(rank=0, size=1))


def test_torch_stays_unloaded():
    code = "import sys; import rlinf_core.training.run_folder, rlinf_core.training.distributed.same_inputs; "
    subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], check=True)


@pytest.fixture
def start_agents(toy_site, tmp_path):
    """`start_agents(name, nodes, ...)`: two ranks under so many agents of torchrun, each in a folder of its own."""

    def start(name, nodes, *overrides):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        agents = []
        paths = os.pathsep.join([str(toy_site), str(Path(__file__).parents[2] / "support")])
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OTHER_RANKS_WAIT": "3"}
        environment["RLINF_DISABLE_PLUGINS"] = "rlinf-plugins-text"
        for node in range(nodes):
            folder = tmp_path / name / f"machine_{node}"
            folder.mkdir(parents=True)
            command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--node-rank={node}"]
            command += [f"--nproc-per-node={2 // nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}"]
            command += ["-m", "rlinf_core.train", str(toy_site / "toy.toml"), "runner.name=run", "runner.max_steps=2"]
            with (folder / "said").open("w") as said:
                pipes = {"stdout": said, "stderr": said}
                agents.append(subprocess.Popen([*command, *overrides], cwd=folder, env=environment, **pipes))
        codes = [agent.wait(280) for agent in agents]
        return codes, "".join(path.read_text() for path in sorted((tmp_path / name).glob("*/said")))

    return start


@pytest.mark.slow
def test_two_agents_in_two_folders_are_refused_and_with_one_folder_equal_one_machine(start_agents, tmp_path):
    codes, said = start_agents("apart", 2, "runner.output_dir=runs")
    assert all(codes), said
    flat = " ".join(said.split())
    assert "the ranks do not share one folder. rank 0 on" in flat
    for node in (0, 1):
        assert f"{tmp_path}/apart/machine_{node}/runs" in flat
    assert not list((tmp_path / "apart").rglob("*.distcp"))
    losses = []
    for name, nodes in (("one", 1), ("two", 2)):
        codes, said = start_agents(name, nodes, f"runner.output_dir={tmp_path}/{name}")
        assert not any(codes), said
        assert len(list((tmp_path / name).glob("run/checkpoints/*/*.distcp"))) == 2
        lines = (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert len(losses[0]) == 2
    assert losses[0] == losses[1]
