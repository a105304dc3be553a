"""The model of a step on many GPUs: limits that hold for any model, its parts by hand, and published figures."""

import json
from dataclasses import replace

import pytest

from rlinf_core.cli import main
from rlinf_core.costs.gpus import NVLINK, PEAKS
from rlinf_core.costs.memory import Parameter, Sharding, Unit
from rlinf_core.errors import UserError
from rlinf_core.plan.scaling import ACHIEVED, Load, Machines, interconnect, scale, scaled_step

WIDTH, LAYERS = 2048, 18
LAYER = 43 * 1024
UNITS = (
    *(Unit((Parameter(f"layers.{n}", (LAYER, WIDTH)),), 2) for n in range(2 * LAYERS)),
    Unit((Parameter("root", (WIDTH, 32)),), 4),
)
"""As large as π0.5: 36 units, 3.2 billion parameters; all numbers of GPUs divide their rows."""
LOAD = Load(UNITS, Sharding(ranks=8, ema=True), samples=32, micro_batches=1, flops=9.6e12, save_interval=1000)
MACHINES = Machines("H100", 8, 400.0, 0.4)


def test_one_gpu_only_computes():
    one = scaled_step(LOAD, MACHINES, 1)
    assert one.compute == pytest.approx(32 * 9.6e12 / (0.4 * PEAKS["H100"] * 1e12))
    assert (one.all_gather, one.reduce_scatter, one.all_reduce, one.exposed, one.data) == (0, 0, 0, 0, 0)
    assert one.samples_per_second == pytest.approx(32 / (one.compute + one.checkpoint))


def test_a_gather_takes_its_bytes_over_the_link_and_the_rings_steps():
    eight = scaled_step(LOAD, MACHINES, 8)
    numbers = sum(unit.parameters[0].numel for unit in UNITS[:-1])
    bytes_ = 7 / 8 * 2 * (2 * numbers + 4 * WIDTH * 32)
    latency = 2 * len(UNITS) * (8.4e-6 + 7 * 3.4e-6)
    assert eight.all_gather == pytest.approx(bytes_ / (1e9 * ACHIEVED * NVLINK["H100"]) + latency)
    sixteen = scaled_step(LOAD, MACHINES, 16)
    bytes_ = 15 / 16 * 2 * (2 * numbers + 4 * WIDTH * 32)
    latency = 2 * len(UNITS) * (8.4e-6 + 14 * 3.4e-6 + 14e-6)
    assert sixteen.all_gather == pytest.approx(bytes_ / (1e9 * ACHIEVED * 400 / 8) + latency)


@pytest.mark.parametrize("network", [1.25, 50.0, 400.0])
def test_more_gpus_are_faster_and_less_efficient(network):
    steps = scale(LOAD, replace(MACHINES, network=network), 1024)
    assert [one.gpus for one in steps] == [2**n for n in range(11)]
    each = [one.samples_per_second / one.gpus for one in steps[3:]]  # Copies to the host get smaller on few GPUs.
    assert each == sorted(each, reverse=True)


def test_a_slow_network_is_not_hidden_and_copies_avoid_it():
    slow = replace(MACHINES, network=12.5)
    sharded = scaled_step(LOAD, slow, 64)
    assert sharded.exposed > sharded.compute
    copies = replace(LOAD, sharding=Sharding(ranks=64, num_replicas=8, ema=True))
    hybrid = scaled_step(copies, slow, 64)
    assert hybrid.replicas == 8
    assert hybrid.all_gather == pytest.approx(scaled_step(LOAD, slow, 8).all_gather)
    assert hybrid.exposed < sharded.exposed
    assert scaled_step(copies, slow, 4).replicas == 1  # Fewer GPUs than a copy has.


def test_data_that_a_machine_cannot_load_in_time_is_waited_for():
    machines = replace(MACHINES, samples_per_second=100.0)
    step = scaled_step(LOAD, machines, 16)
    assert step.compute + step.exposed + step.data == pytest.approx(8 * 32 / 100)
    assert scaled_step(LOAD, machines, 1).data == 0


def test_quoted_figures_are_near():
    """Quoted for LingBot-VLA (arXiv 2601.18692), not checked: 229 samples/s on 8 GPUs, 6,411 on 256."""
    quoted = (6411 / 256) / (229 / 8)
    eight, many = (scaled_step(LOAD, MACHINES, gpus) for gpus in (8, 256))
    predicted = (many.samples_per_second / 256) / (eight.samples_per_second / 8)
    assert quoted == pytest.approx(0.875, abs=0.001)
    assert predicted == pytest.approx(quoted, abs=0.15)


def test_networks_have_names_or_numbers():
    assert interconnect("ndr-8x400") == 400
    assert interconnect("37.5") == 37.5
    for text in ("ndr-8x40", "0", "-1", "nan", "inf", ""):
        with pytest.raises(UserError, match=r"--interconnect: .* is neither a number of GB/s above 0 nor one of"):
            interconnect(text)


QUICKSTART = ["examples/quickstart.toml", "data.repo_id=org/not_here", "data.validation_fraction=0"]
QUICKSTART += ["runner.val_check_interval=0"]


def test_the_command_prints_the_table(capsys):
    arguments = [*QUICKSTART, "--nodes", "2", "--gpus", "1", "--interconnect", "100g", "--gpu", "A100"]
    assert main(["plan", *arguments]) == 0
    out = capsys.readouterr().out
    assert "predicted, not measured" in out
    assert "1 x A100 in a machine, 12.5 GB/s between machines" in out
    assert main(["plan", *arguments, "--json"]) == 0
    scaling = json.loads(capsys.readouterr().out)["scaling"]
    assert [one["gpus"] for one in scaling["steps"]] == [1, 2]
    assert scaling["steps"][0]["efficiency"] == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "8"], "give --nodes"),
        (["--nodes", "2", "--ranks", "4"], "leave out --ranks"),
        (["--nodes", "2", "--gpus", "1", "--gpu", "H1000"], "--gpu: 'H1000' is not one of"),
        (["--nodes", "2", "--gpus", "1", "--data-rate", "0"], "--data-rate"),
        (["--nodes", "2", "--interconnect", "fast"], "--interconnect: 'fast'"),
    ],
)
def test_options_that_do_not_fit_are_refused_first(arguments, said, capsys):
    assert main(["plan", "nowhere.toml", *arguments]) == 2
    assert said in capsys.readouterr().err
