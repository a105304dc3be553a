"""Machines of a run: how the model is sharded over them, and how many files each rank opens."""

import json
import resource
from types import SimpleNamespace

import pytest
from distributions import install

from rlinf_core.errors import UserError
from rlinf_core.training.distributed import open_files
from rlinf_core.training.distributed.open_files import allow_open_files, count_open_files, count_sockets
from rlinf_core.training.settings import Fsdp2Settings
from rlinf_core.training.topology import count_machines


def group_of(monkeypatch, machines):
    """The process group of rank 0, where each machine has so many ranks."""
    placed = [(local, sum(machines[:machine])) for machine, local in enumerate(machines) for _ in range(local)]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(machines[0]))
    monkeypatch.setenv("LOCAL_RANK", "0")
    return SimpleNamespace(rank=0, size=len(placed), gather=lambda mine: [mine, *placed[1:]])


@pytest.mark.parametrize(
    ("ranks", "machines"), [([4], 1), ([1], 1), ([4, 4], 2), ([1, 1, 1], 3), ([4, 2], 1), ([2, 4, 2], 1)]
)
def test_machines_count_if_all_have_equally_many_ranks(monkeypatch, ranks, machines):
    assert count_machines(group_of(monkeypatch, ranks)) == machines


def test_a_launcher_that_says_nothing_has_one_machine(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    group = SimpleNamespace(rank=0, size=4, gather=lambda mine: [(4, 0)] * 4)
    assert count_machines(group) == 1


@pytest.mark.parametrize(
    ("wanted", "ranks", "machines", "copies"),
    [
        ("auto", 8, 1, 1),
        ("auto", 16, 2, 2),
        ("auto", 1024, 128, 128),
        ("auto", 3, 3, 1),  # Nothing could be sharded within a machine.
        ("auto", 7, 2, 1),
        (1, 16, 2, 1),
        (4, 16, 2, 4),
    ],
)
def test_a_copy_of_the_model_per_machine_unless_the_user_says_otherwise(wanted, ranks, machines, copies):
    settings = Fsdp2Settings(type="fsdp2", num_replicas=wanted)
    assert settings.replicas(ranks, machines) == copies
    assert settings.placed(ranks, machines).num_replicas == copies


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("auto", '2 copies of the model, each sharded over the 8 ranks of a machine (trainer.num_replicas = "auto")'),
        (1, "one copy of the model, sharded over the 16 ranks of all machines (trainer.num_replicas = 1)"),
        (4, "4 copies of the model, each sharded over the 4 ranks of a copy (trainer.num_replicas = 4)"),
        (16, "16 copies of the model, each whole on one rank (trainer.num_replicas = 16)"),
    ],
)
def test_sharding_in_words(wanted, said):
    assert Fsdp2Settings(type="fsdp2", num_replicas=wanted).describe_replicas(16, 2) == said


@pytest.mark.slow
@pytest.mark.parametrize("copies", [1, 2])
def test_sockets_of_a_run_of_four_ranks_are_those_of_the_formula(copies, toy_site, tmp_path, start_ranks):
    install(tmp_path, "counting", plugins={"counting": "open_files_of_ranks"})
    arguments = [str(toy_site / "toy.toml"), f"runner.output_dir={tmp_path}", "runner.max_steps=2"]
    arguments += ["runner.save_interval=1", "trainer.micro_batch_size=5", f"trainer.num_replicas={copies}"]
    paths = (toy_site, tmp_path)
    ended = start_ranks("rlinf_core.train:main", 4, *arguments, paths=paths, OPEN_FILES=str(tmp_path))
    assert ended.returncode == 0, ended.stderr
    for rank in range(4):
        counted = json.loads((tmp_path / f"{rank}.json").read_text())
        assert counted["sockets"] == count_sockets(4, copies)
        assert counted["all"] <= count_open_files(4, copies)


def test_the_soft_limit_is_raised_to_what_is_needed(monkeypatch):
    limits = {"now": (1024, 4096)}
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits["now"])
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.update(now=new))
    allow_open_files(count_open_files(256), 256)
    assert limits["now"] == (1024, 4096)
    allow_open_files(count_open_files(1024, 128, 8), 1024)
    assert limits["now"] == (2 * 1024 + 8 + 128 + 2 + 48 + 256, 4096)
    with pytest.raises(UserError, match=r"each of the 2048 processes opens up to \d+ .* the limit is 4096 here"):
        allow_open_files(count_open_files(2048), 2048)


def test_a_limit_that_is_too_low_is_a_warning_of_validate(configure_toy, toy_plugins, monkeypatch):
    from rlinf_core.preflight import check_run

    monkeypatch.setattr(open_files, "find_limit", lambda: 100)
    run = configure_toy("trainer.micro_batch_size=5", "cluster.num_nodes=2", "cluster.rdzv_endpoint=node0:29500")
    report = check_run(run, toy_plugins, 4)
    assert not report.findings
    assert "2 copies of the model, each sharded over the 2 ranks of a machine" in report.facts["sharding"]
    assert any("each of the 4 processes opens up to 270 files" in warning for warning in report.warnings)
    assert "sharding" not in check_run(configure_toy(), toy_plugins, 1).facts
