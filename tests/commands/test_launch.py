"""`rlinf launch`: refuses early, starts processes as `[cluster]` says, and ends with the exit code of the run."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from distributions import entry_point, repository_entry_points, repository_plugins

from rlinf_core import UserError, cli, hookimpl, torchrun
from rlinf_core.config.load import load_config
from rlinf_core.plugins.registry import PLUGIN_GROUP, Plugins

ROOT = Path(__file__).parents[2]
QUICKSTART = "examples/quickstart.toml"
COMMAND = [sys.executable, "-c", "import sys; from rlinf_core.cli import main; sys.exit(main())", "launch", QUICKSTART]


@pytest.fixture
def launch(monkeypatch, capsys):
    """Run the command in this process; returns (exit code, stderr)."""

    def launch(*arguments, plugins=None):
        monkeypatch.setattr("rlinf_core.plugins.registry.get_plugins", lambda: plugins or repository_plugins())
        return cli.main(["launch", QUICKSTART, *arguments]), capsys.readouterr().err

    return launch


class Starter:
    """A launcher plugin that remembers what it was asked for."""

    @hookimpl
    def rlinf_launch(self, run, arguments):
        self.run, self.arguments = run, arguments
        return 130 if run.cluster.launcher == "toy" else None


@pytest.fixture
def starter():
    starter = Starter()
    return starter, Plugins([*repository_entry_points(), entry_point(PLUGIN_GROUP, "toy", starter, "toy-launcher")])


def test_the_launcher_gets_run_and_arguments_and_gives_the_exit_code(launch, starter):
    toy, plugins = starter
    assert launch("seed=7", "--overwrite", "cluster.launcher=toy", plugins=plugins)[0] == 130
    assert toy.run.seed == 7
    assert toy.arguments == [QUICKSTART, "seed=7", "cluster.launcher=toy", "--overwrite"]


def test_a_bad_config_starts_nothing(launch, starter):
    toy, plugins = starter
    code, error = launch("cluster.launcher=toy", "optim.lrr=1", plugins=plugins)
    assert code == 2
    assert "optim.lrr: unknown key" in error
    assert not hasattr(toy, "run")


def test_a_launcher_that_nobody_brings_is_named(launch):
    code, error = launch("cluster.launcher=sky")
    assert code == 2
    assert error.startswith("error: no installed plugin launches with cluster.launcher = 'sky'\n  install the package")
    broken = Plugins(
        [*repository_entry_points(), entry_point(PLUGIN_GROUP, "sky", "a_module_that_nobody_has", "acme-sky")]
    )
    assert "failed: acme-sky 1.0 (entry point 'sky =" in launch("cluster.launcher=sky", plugins=broken)[1]


def test_what_does_not_fit_this_machine_starts_nothing(launch, monkeypatch):
    def never(*_):
        raise AssertionError("started")

    monkeypatch.setattr("torch.distributed.launcher.api.launch_agent", never)
    code, error = launch("cluster.component_placement.actor=1-2")
    assert code == 2
    assert "no accelerators to choose from" in error
    code, error = launch("cluster.component_placement.actor=0-2")
    assert code == 2
    assert "is not a multiple of 3 ranks" in error


def run_of(folder):
    return load_config(ROOT / QUICKSTART, [f"runner.output_dir={folder}"], repository_plugins())


@pytest.fixture
def ended(monkeypatch, tmp_path):
    """Launch with workers that end as told; returns the exit code."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    end = tmp_path / "quickstart" / "exit.json"
    end.parent.mkdir()

    def ended(*, exitcode=0, received=None, code=None):
        def workers(*_):
            if code is not None:
                end.write_text(json.dumps({"code": code}))
            if received:
                raise SignalException("signal", received)
            if exitcode:
                missing = str(tmp_path / "none")
                raise ChildFailedError("train", {1: ProcessFailure(1, 4242, exitcode, missing)})

        monkeypatch.setattr("torch.distributed.launcher.api.launch_agent", workers)
        return torchrun.launch(run_of(tmp_path), ["config.toml"])

    return ended


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ({"code": 0}, 0),
        ({"exitcode": 1, "code": 2}, 2),
        ({"exitcode": 2}, 2),
        ({"exitcode": 130, "code": 130}, 130),
        ({"exitcode": 1}, 1),
        ({"exitcode": 9}, 1),
        ({"exitcode": 1, "code": 0}, 1),
        ({"received": signal.SIGTERM, "code": 0}, 0),
        ({"received": signal.SIGTERM}, 1),
        ({"received": signal.SIGINT, "code": 130}, 130),
        ({"received": signal.SIGINT}, 130),
    ],
    ids=str,
)
def test_the_exit_code_is_the_runs(ended, how, code):
    assert ended(**how) == code


def test_an_exit_file_of_an_earlier_run_does_not_count(ended):
    assert ended(code=2, exitcode=1) == 2
    assert ended(exitcode=1) == 1


def test_processes_that_end_without_a_word_are_no_success(ended, tmp_path, capsys):
    """As after os._exit(0) in a plugin."""
    assert ended() == 1
    assert f"rank 0 has not written {tmp_path / 'quickstart' / 'exit.json'}" in capsys.readouterr().err


def test_a_killed_process_is_named(ended, capsys):
    assert ended(exitcode=-signal.SIGKILL) == 1
    assert capsys.readouterr().err == "error: rank 1 (process 4242) was ended by SIGKILL, often for lack of memory\n"


def test_a_process_that_was_ended_because_it_hung_has_left_a_record(ended, tmp_path, monkeypatch, capsys):
    flight = run_of(tmp_path).folder / "flight"
    flight.mkdir(parents=True)
    (flight / "rank_00001.txt").write_text("rank 1, step 3: forward")
    told = f"was ended by SIGABRT; {flight} says what each rank was doing before"
    with monkeypatch.context() as patch:
        patch.setattr(torchrun.time, "time", lambda: 0.0)  # As if the run had begun before.
        assert ended(exitcode=-signal.SIGABRT) == 1
    assert told in capsys.readouterr().err
    os.utime(flight / "rank_00001.txt", (0, 0))
    assert ended(exitcode=-signal.SIGABRT) == 1
    assert told not in capsys.readouterr().err


@pytest.fixture
def unreachable(monkeypatch):
    """torchrun's agent fails with an error, and the store of the rendezvous does not answer afterwards."""

    def unreachable(error):
        def fail(*_):
            raise error

        monkeypatch.setattr("torch.distributed.launcher.api.launch_agent", fail)
        monkeypatch.setattr("rlinf_core.training.distributed.attendance.TCPStore", fail)
        monkeypatch.setattr(torchrun, "answers", lambda *_: True)

    return unreachable


def test_machines_that_do_not_come_are_a_message(unreachable, tmp_path):
    from torch.distributed.elastic.rendezvous.api import RendezvousTimeoutError

    unreachable(RendezvousTimeoutError())
    with pytest.raises(
        UserError, match=r"2 machines have not met at cluster\.rdzv_endpoint = 'node0:29500' within 600"
    ):
        torchrun.launch(meeting_at("node0:29500", tmp_path), [])


def test_a_rendezvous_that_is_lost_is_a_message_and_no_mistake(unreachable, tmp_path, capsys):
    from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError

    unreachable(RendezvousConnectionError("no answer"))
    assert torchrun.launch(meeting_at("node0:29500", tmp_path), []) == 1
    assert "the launcher at cluster.rdzv_endpoint = 'node0:29500' has ended or cannot" in capsys.readouterr().err


def test_a_rendezvous_that_nobody_opens_is_a_message(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torchrun, "answers", lambda *_: False)
    with pytest.raises(UserError, match=r"'node0:29500' has not answered for 600 s \(cluster\.join_timeout_seconds\)"):
        torchrun.launch(meeting_at("node0:29500", tmp_path), [])
    assert "waiting for the rendezvous at node0:29500" in capsys.readouterr().out


def test_the_machine_of_the_rendezvous_knows_itself_by_its_addresses(monkeypatch, tmp_path):
    """torchrun only knows it by its host name, and by the addresses of that."""
    seen = {}

    def workers(config, *_):
        seen.update(endpoint=config.rdzv_endpoint, address=config.local_addr, configs=config.rdzv_configs)

    monkeypatch.setattr("torch.distributed.launcher.api.launch_agent", workers)
    monkeypatch.setattr("rlinf_core.training.distributed.attendance.Attendance._attend", lambda self: None)
    monkeypatch.setattr(torchrun, "answers", lambda *_: True)
    place = torchrun.place_towards("127.0.0.1")
    torchrun.launch(meeting_at("127.0.0.1:29500", tmp_path), [])
    assert (seen["endpoint"], seen["address"]) == ("localhost:29500", place and place.address)
    torchrun.launch(meeting_at("node0:29500", tmp_path), [])
    assert (seen["endpoint"], seen["configs"]["is_host"]) == ("node0:29500", False)


def meeting_at(endpoint, folder):
    overrides = [f"runner.output_dir={folder}", "cluster.num_nodes=2", f"cluster.rdzv_endpoint={endpoint}"]
    return load_config(ROOT / QUICKSTART, [*overrides, "trainer.micro_batch_size=8"], repository_plugins())


def test_placed_accelerators_are_the_visible_ones(monkeypatch, tmp_path):
    seen = {}

    def workers(config, *_):
        seen.update(processes=config.nproc_per_node, devices=os.environ.get("CUDA_VISIBLE_DEVICES"))

    monkeypatch.setattr("torch.distributed.launcher.api.launch_agent", workers)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = load_config(
        ROOT / QUICKSTART,
        [f"runner.output_dir={tmp_path}", "trainer.device=auto", "cluster.component_placement.actor=1,3"],
        repository_plugins(),
    )
    torchrun.launch(run, [])
    assert seen == {"processes": 2, "devices": "5,7"}


@pytest.fixture
def toy(toy_site, tmp_path):
    """What starts a process that launches runs of the toy policy: the beginning of its command, and its environment."""
    command = [*COMMAND[:-1], str(toy_site / "toy.toml"), f"runner.output_dir={tmp_path}", "runner.name=toy"]
    return command, os.environ | {"PYTHONPATH": os.pathsep.join([str(toy_site), str(ROOT / "tests" / "support")])}


def test_a_run_on_two_processes(toy, tmp_path):
    command, environment = toy
    command += ["cluster.component_placement.actor=0-1", "runner.max_steps=2"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "step 2: saved" in result.stdout
    assert json.loads((tmp_path / "toy" / "environment.json").read_text())["ranks"] == 2
    assert json.loads((tmp_path / "toy" / "exit.json").read_text())["code"] == 0


def test_a_mistake_in_a_worker_is_one_message(tmp_path):
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart" / "notes.txt").touch()
    result = subprocess.run(
        [*COMMAND, f"runner.output_dir={tmp_path}", "cluster.component_placement.actor=0"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.count("is not empty and holds no run") == 1
    assert "Traceback" not in result.stderr
    assert "torch.distributed" not in result.stderr


@pytest.mark.slow
def test_ctrl_c_reaches_the_workers_which_save(toy, tmp_path):
    command, environment = toy
    command += ["cluster.component_placement.actor=0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        for line in process.stdout:
            if line.startswith("step "):
                process.send_signal(signal.SIGINT)
                break
        out, error = process.communicate(timeout=240)
    assert process.returncode == 130, out + error
    assert (tmp_path / "toy" / "latest").read_text().startswith("step_")
    assert "Traceback" not in error


def test_a_launcher_that_describes_nothing_is_named_and_not_started(launch, starter):
    toy, plugins = starter
    code, error = launch("--dry-run", "cluster.launcher=toy", plugins=plugins)
    assert code == 2
    assert "the launcher 'toy' does not describe what it starts (hook rlinf_describe_launch)" in error
    assert not hasattr(toy, "run")


def test_a_dry_run_prints_a_command_for_the_shell_and_starts_nothing(launch, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    printed = []
    monkeypatch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(words)))
    placed = ["trainer.device=auto", "cluster.component_placement.actor=1-2", "runner.output_dir=my runs"]
    assert launch("--dry-run", *placed)[0] == 0
    assert printed == [
        "CUDA_VISIBLE_DEVICES=1,2 torchrun --nproc-per-node 2 --standalone -m rlinf_core.train "
        "examples/quickstart.toml trainer.device=auto cluster.component_placement.actor=1-2 'runner.output_dir=my runs'"
    ]
    printed.clear()
    several = ["cluster.num_nodes=2", "cluster.rdzv_endpoint=node0:29500", "cluster.max_restarts=3"]
    assert launch("--dry-run", *several)[0] == 0
    assert printed[0].startswith(
        "torchrun --nproc-per-node 1 --nnodes 2 --rdzv-backend c10d --rdzv-id quickstart --rdzv-endpoint node0:29500 "
        "--rdzv-conf is_host=0,join_timeout=600"
    )
    assert " --max-restarts 3 -m rlinf_core.train examples/quickstart.toml" in printed[0]
    assert launch("--dry-run", "cluster.launcher=toy")[0] == 2
    assert "no installed plugin launches with cluster.launcher = 'toy'" in printed[-1]
    assert not (tmp_path / "runs").exists()
