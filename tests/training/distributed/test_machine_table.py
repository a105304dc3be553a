"""The table of machines before the first step: what differs is named, and so is the slowest link."""

import json
import math
from dataclasses import replace

import pytest

from rlinf_core.training.distributed.machine_table import Machine, MachineTable, _compare_clocks, _measure_links

NODE = Machine(
    host="node0",
    ranks=8,
    devices="8 x NVIDIA H100",
    driver="570.1",
    versions={"torch": "2.11.0", "CUDA": "13.0"},
    folder="/runs/run",
    free_gb=1234.5,
    token_seconds=0.01,
    to_next_gb_per_second=12.0,
)


def table(*changes):
    """A table of machines that differ from `NODE` in these fields."""
    machines = [replace(NODE, host=f"node{number}", **change) for number, change in enumerate(changes)]
    return MachineTable(tuple(machines), 40.0, 50.0, 256.0, 1.2)


def test_machines_that_are_alike_have_a_row_each_and_no_warning():
    lines = list(table({}, {}).lines())
    assert lines[0] == "machines, measured in 1.2 s:"
    assert lines[1].split("  ")[1:4] == ["node0", "8 ranks", "8 x NVIDIA H100, driver 570.1"]
    assert "torch 2.11.0, CUDA 13.0  clock +0.00 s  new files seen after 0.01 s  1,234 GB free" in lines[1]
    assert lines[3] == (
        "  all-reduce over all ranks: 50 GB/s with 256 MB, 40 us with one number; "
        "slowest link: node0 -> node1, 12 GB/s (median 12)"
    )
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"driver": "550.9"}, "the GPU driver differs between machines: 550.9 on node1; 570.1 on node0, node2"),
        ({"versions": {"torch": "2.10.0", "CUDA": "13.0"}}, "torch differs between machines: 2.10.0 on node1; 2.11.0"),
        ({"devices": "7 x NVIDIA H100"}, "the set of devices differs between machines: 7 x NVIDIA H100 on node1;"),
        ({"clock_seconds": -61.5}, "clocks differ from that of node0: node1 -61.5 s."),
        ({"to_next_gb_per_second": 1.2}, "the link node1 -> node2 has 1.2 GB/s, the median is 12"),
    ],
)
def test_what_differs_is_named(change, said):
    (warning,) = table({}, change, {}).warnings()
    assert warning.startswith(said)


def test_the_last_machine_is_linked_to_the_first():
    assert (
        "slowest link: node2 -> node0, 3 GB/s (median 12)"
        in list(table({}, {}, {"to_next_gb_per_second": 3.0}).lines())[4]
    )


def test_many_machines_are_in_the_file_only():
    lines = list(table(*[{}] * 20).lines())
    assert lines[17] == "  and 4 more: machines.json"
    assert len(lines) == 19


def test_a_clock_that_is_wrong_is_found(monkeypatch):
    from types import SimpleNamespace

    group = SimpleNamespace(wait=lambda: None, gather=lambda mine: [mine, mine + 100.0, mine - 3.0])
    assert _compare_clocks(group) == pytest.approx([0.0, 100.0, -3.0])


def test_a_link_has_the_speed_of_its_faster_end(monkeypatch):
    """Machines 1 and 2 are slow because of the link between them; machines 0 and 3 are not."""
    from types import SimpleNamespace

    import torch

    monkeypatch.setattr("rlinf_core.training.distributed.machine_table._exchange", lambda *_: 0.1)
    gathered = {0: 0.1, 2: 1.0, 4: 1.0, 6: 0.1}
    group = SimpleNamespace(
        rank=0, size=8, device=torch.device("cpu"), gather=lambda mine: [gathered.get(rank, 0.0) for rank in range(8)]
    )
    speeds = _measure_links(group, [0, 2, 4, 6], 1.0)
    assert [speeds[0] / speeds[rank] for rank in (2, 4, 6)] == pytest.approx([10.0, 1.0, 1.0])


@pytest.mark.parametrize(("preflight", "made"), [pytest.param("auto", False, marks=pytest.mark.slow), ("always", True)])
def test_one_machine_makes_the_table_if_asked(preflight, made, toy_site, tmp_path, start_ranks):
    arguments = [str(toy_site / "toy.toml"), f"runner.output_dir={tmp_path}", "runner.name=run", "runner.max_steps=1"]
    ended = start_ranks("rlinf_core.train:main", 2, *arguments, f"cluster.preflight={preflight}", paths=[toy_site])
    assert ended.returncode == 0, ended.stderr
    assert ("machines, measured in" in ended.stdout) is made
    assert (tmp_path / "run" / "machines.json").exists() is made
    if made:
        found = json.loads((tmp_path / "run" / "machines.json").read_text())
        assert [machine["ranks"] for machine in found["machines"]] == [2]
        assert found["machines"][0]["token_seconds"] < math.inf
        assert found["all_reduce_gb_per_second"] > 0
        assert not list((tmp_path / "run").glob(".machines*"))
