"""The launcher `slurm`: its batch file, what is refused, and the file run by a fake Slurm with two nodes."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_slurm
import pytest
from distributions import repository_plugins

from rlinf_core import UserError, cli
from rlinf_core.config.load import load_config
from rlinf_core.slurm import batch_file

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples/quickstart.toml"


@pytest.fixture
def configure(tmp_path):
    def configure(*overrides):
        slurm = ["cluster.launcher=slurm", f"runner.output_dir={tmp_path}"]
        return load_config(QUICKSTART, [*slurm, *overrides], repository_plugins())

    return configure


def write(configure, *overrides, arguments=("config.toml",)):
    return batch_file(configure(*overrides), arguments)


def test_a_job_asks_for_nodes_gpus_and_a_signal(configure, tmp_path):
    text = write(
        configure,
        *("trainer.device=auto", "trainer.global_batch_size=64", "trainer.micro_batch_size=4", "cluster.num_nodes=2"),
        *("cluster.slurm.gpus_per_node=8", "cluster.slurm.time=2-12", "cluster.slurm.options.partition=gpu"),
        *("cluster.slurm.options.exclusive=true", "runner.name=pi05", "cluster.max_restarts=3"),
    )
    asked = fake_slurm.options(text)
    assert asked == {
        **{"job-name": "pi05", "nodes": "2", "ntasks-per-node": "1", "gpus-per-node": "8", "time": "2-12"},
        **{"requeue": "", "signal": "B:USR1@120", "open-mode": "append", "output": f"{tmp_path}/pi05.slurm-%j.out"},
        **{"chdir": str(Path.cwd()), "partition": "gpu", "exclusive": ""},
    }
    assert "--nnodes 2 --nproc-per-node 8 \\\n    --max-restarts 3" in text


def test_a_site_may_ask_for_gpus_in_its_own_words(configure):
    gpus = ["trainer.device=auto", "cluster.slurm.gpus_per_node=4", "trainer.micro_batch_size=4"]
    asked = fake_slurm.options(write(configure, *gpus, "cluster.slurm.options.gres=gpu:a100:4"))
    assert asked["gres"] == "gpu:a100:4"
    assert "gpus-per-node" not in asked


def test_odd_names_survive_the_shell_and_slurms_patterns(configure, tmp_path):
    folder = tmp_path / "50 % of it's"
    arguments = ["my config.toml", f"runner.output_dir={folder}", "a=$HOME"]
    text = write(configure, f"runner.output_dir={folder}", arguments=arguments)
    assert fake_slurm.options(text)["output"] == f"{tmp_path}/50 %% of it's/quickstart.slurm-%j.out"
    [line] = [line for line in text.splitlines() if line.startswith("train=(")]
    assert shlex.split(line.removeprefix("train=(").removesuffix(")")) == arguments
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["trainer.device=auto"], "cluster.slurm.gpus_per_node is not set"),
        (["cluster.slurm.gpus_per_node=8"], 'would be unused: trainer.device is "cpu"'),
        (
            ["trainer.device=auto", "cluster.slurm.gpus_per_node=8", "cluster.component_placement.actor=0-3"],
            r'set cluster\.slurm\.gpus_per_node = 4 and the placement to "all"',
        ),
        (["cluster.num_nodes=3"], "is not a multiple of 3 ranks"),
    ],
)
def test_what_does_not_fit_the_nodes_is_refused(configure, overrides, complaint):
    with pytest.raises(UserError, match=complaint):
        write(configure, *overrides)


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("options.nodes=2", "set cluster.num_nodes instead of 'nodes'"),
        ("options.array=1-3", "'array' cannot be set: all jobs of an array would train the same run"),
        ("options.p=gpu", "'p' is not the long name of an option"),
        ("options.exclusive=false", "exclusive = false does nothing"),
        ("options.comment='''a\nb'''", "contains characters that a line"),
        ("time=tomorrow", "invalid time limit 'tomorrow'"),
        ("setup=['#SBATCH --mem=0']", "would come too late"),
        ("signal_seconds=10", "greater than or equal to 60"),
    ],
)
def test_a_table_that_slurm_would_not_take_is_refused(configure, setting, complaint):
    with pytest.raises(UserError, match=complaint):
        configure(f"cluster.slurm.{setting}")


@pytest.fixture
def launch(monkeypatch, capsys, tmp_path):
    """`rlinf launch` on a machine with the fake Slurm; returns exit code, stdout and stderr."""
    monkeypatch.setattr("rlinf_core.plugins.registry.get_plugins", repository_plugins)

    def launch(*arguments, path=None):
        if not (tmp_path / "bin").exists():
            fake_slurm.install(tmp_path / "bin")
        monkeypatch.setenv("PATH", path or f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        given = [str(QUICKSTART), "cluster.launcher=slurm", f"runner.output_dir={tmp_path / 'runs'}", *arguments]
        return cli.main(["launch", *given]), *capsys.readouterr()

    return launch


def test_the_file_is_written_and_submitted(launch, tmp_path):
    code, out, _ = launch("cluster.slurm.options.account=lab")
    path = tmp_path / "runs" / "quickstart.sbatch"
    assert code == 0
    assert f"submitted job 4242: {path}; its log: {tmp_path}/runs/quickstart.slurm-4242.out" in out
    assert fake_slurm.options(path.read_text())["account"] == "lab"
    assert not (tmp_path / "runs" / "quickstart").exists()  # The job makes it.


def test_a_dry_run_only_prints_the_file(launch, tmp_path):
    code, out, _ = launch("--dry-run")
    assert code == 0
    assert out.startswith("#!/bin/bash\n#SBATCH --job-name=quickstart\n")
    assert not (tmp_path / "runs").exists()


def test_a_refusal_of_sbatch_and_its_absence_are_messages(launch, tmp_path):
    code, _, error = launch("cluster.slurm.options.wckey=x")
    assert code == 2
    assert f"sbatch refused {tmp_path}/runs/quickstart.sbatch: sbatch: unrecognized option '--wckey'" in error
    code, _, error = launch(path=str(tmp_path))
    assert code == 2
    assert "there is no sbatch on PATH. Launch on a machine that submits jobs" in error


@pytest.fixture
def job(toy_site, toy_plugins, tmp_path, monkeypatch):
    """A job of the toy policy on two nodes: `job(restart=0, ...)` starts it and returns (its shell, its log)."""
    folder = tmp_path / "runs"
    folder.mkdir()
    monkeypatch.setenv("FAKE_SLURM", str(tmp_path / "scontrol.jsonl"))
    path = f"{fake_slurm.install(tmp_path / 'bin')}:{os.environ['PATH']}"
    sources = os.pathsep.join([str(toy_site), str(ROOT / "tests" / "support")])
    environment = os.environ | {"PATH": path, "PYTHONPATH": sources, "RLINF_DISABLE_PLUGINS": "rlinf-plugins-text"}

    def job(*overrides, restart=0):
        settings = ["cluster.launcher=slurm", "cluster.num_nodes=2", f"runner.output_dir={folder}", "runner.name=toy"]
        arguments = [str(toy_site / "toy.toml"), *settings, *overrides]
        run = load_config(arguments[0], arguments[1:], toy_plugins)
        (folder / "toy.sbatch").write_text(batch_file(run, [*arguments, "--overwrite"]))
        return fake_slurm.run_job(folder / "toy.sbatch", environment, restart)

    return job


def wait_for(log, text, process, seconds=120):
    end = time.monotonic() + seconds
    while text not in log.read_text():
        assert process.poll() is None or text in log.read_text(), log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)


@pytest.mark.slow
def test_the_job_saves_before_its_time_limit_and_continues_when_it_is_queued_again(job, tmp_path):
    folder, requests = tmp_path / "runs" / "toy", tmp_path / "scontrol.jsonl"
    shell, log = job("runner.max_steps=100000", "runner.save_interval=0")
    wait_for(log, "ETA", shell)
    shell.send_signal(signal.SIGUSR1)
    shell.wait(60)
    assert json.loads((folder / "exit.json").read_text())["reason"] == "preempted", log.read_text()
    assert [json.loads(line) for line in requests.read_text().splitlines()] == [["requeue", "4242"]]
    saved = int((folder / "latest").read_text().split("_")[1])
    assert json.loads((folder / "environment.json").read_text())["ranks"] == 2

    requests.unlink()
    shell, log = job(f"runner.max_steps={saved + 2}", "runner.save_interval=0", restart=1)
    assert shell.wait(120) == 0, log.read_text()
    steps = [json.loads(line).get("step") for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == saved + 2
    assert {1, saved, saved + 1} <= set(steps)  # It has continued in spite of --overwrite.
    assert not requests.exists()


@pytest.mark.slow
def test_a_job_that_makes_no_progress_is_not_queued_again(job, tmp_path):
    shell, log = job("trainer.device=cpu", "data.num_workers=0")
    wait_for(log, "loading plugins", shell)
    shell.send_signal(signal.SIGUSR1)
    shell.wait(120)
    assert "no checkpoint was saved within this job's time limit" in log.read_text()
    assert not (tmp_path / "scontrol.jsonl").exists()


def test_a_python_of_the_nodes_may_be_another(configure):
    assert "export python=/opt/python3\n" in write(configure, "cluster.slurm.python=/opt/python3")
    assert f"export python={sys.executable}\n" in write(configure)
