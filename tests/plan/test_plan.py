"""`rlinf plan` says what a run takes: its numbers are those of real runs, and it needs neither data nor weights."""

import json

import pytest
import torch
from distributions import ROOT, repository_plugins
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rlinf_core import UserError
from rlinf_core.cli import main
from rlinf_core.config.load import load_config
from rlinf_core.costs.gpus import peak_tflops
from rlinf_core.costs.memory import (
    Activations,
    Parameter,
    Sharding,
    State,
    Unit,
    largest_micro_batch,
    states,
    step_memory,
    traffic,
    usable,
)
from rlinf_core.plan.advice import advise
from rlinf_core.plan.step import plan

QUICKSTART = str(ROOT / "examples" / "quickstart.toml")
TEXT = str(ROOT / "examples" / "text_sft.toml")
STEP = ["trainer.param_dtype=bf16", "trainer.global_batch_size=8", "trainer.micro_batch_size=4"]
STEP += ["runner.val_check_interval=0", "data.validation_fraction=0.0"]
NOT_HERE = ["data.repo_id=nobody/nothing", "data.validation_fraction=0.0", "runner.val_check_interval=0"]


def planned(config, overrides=(), ranks=None):
    plugins = repository_plugins()
    return plan(load_config(config, list(overrides), plugins), plugins, ranks)


def test_bytes_are_those_of_the_trainers_tensors(tmp_path, start_ranks):
    ranks = 2
    result = start_ranks("plan_ranks:main", ranks, tmp_path, QUICKSTART, *STEP)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads((tmp_path / "bytes.json").read_text())
    made = planned(QUICKSTART, STEP, ranks)
    for name, size in found["states"].items():
        assert getattr(made.states, name) == pytest.approx(size, rel=0.01), name
    sums = {
        kind: sum(size for name, size in found["received"].items() if kind in name.replace("_", ""))
        for kind in ("allgather", "reducescatter")
    }
    others = (ranks - 1) / ranks  # The rest of what a collective hands over is the rank's own.
    assert made.traffic.all_gather == pytest.approx(others * sums["allgather"], rel=0.1)
    assert made.traffic.reduce_scatter == pytest.approx(others * sums["reducescatter"], rel=0.1)


def test_operations_are_those_of_the_data():
    plugins = repository_plugins()
    run = load_config(QUICKSTART, STEP, plugins)
    made = plan(run, plugins)
    from rlinf_core.plan.samples import sample_sources
    from rlinf_core.training.state.build import build_on_meta

    (source,) = sample_sources(run, plugins)
    (policy, _), batch = build_on_meta(run, plugins), run.policy.collate(source.samples[::64])
    policy.to_empty(device="cpu")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        torch.autograd.backward(policy(batch).loss_sum)
    counted = counter.get_total_flops() / len(batch["state"])
    assert made.flops_per_sample == pytest.approx(counted, rel=0.1)
    assert made.computed_per_sample == pytest.approx(counted, rel=0.1)


def test_without_data_samples_are_the_longest_and_nobody_is_asked(monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    made = planned(QUICKSTART, [*NOT_HERE, "policy.max_token_len=150"])
    assert "nobody/nothing is not on this machine" in " ".join(made.assumptions)
    shorter = planned(QUICKSTART, [*NOT_HERE, "policy.max_token_len=20"])
    assert shorter.flops_per_sample < made.flops_per_sample
    assert shorter.memory().activations < made.memory().activations


def test_compiled_blocks_are_counted_on_cuda_and_suggested_before_checkpointing():
    compiled, eager = ([*STEP, "trainer.device=auto", *more] for more in ((), ("trainer.compile=false",)))
    made, other = planned(QUICKSTART, compiled), planned(QUICKSTART, eager)
    assert (made.compiled, other.compiled) == (True, False)
    assert made.memory().activations < other.memory().activations
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlinf_core.plan.advice.usable", lambda *_: other.memory().total - 1)
        patch.setattr("rlinf_core.costs.memory.usable", lambda *_: other.memory().total - 1)
        settings = [change.settings for change in advise(other, repository_plugins(), 1)]
    first = next(number for number, text in enumerate(settings) if "activation_checkpointing" in text)
    assert settings.index("trainer.compile = true with trainer.micro_batch_size = 4") < first


def test_text_is_planned_with_padding_as_cuda_computes_it():
    packed = planned(TEXT, ["trainer.param_dtype=bf16"])
    assert packed.flops_per_sample < packed.computed_per_sample < 2 * packed.flops_per_sample
    assert packed.parameters.reached == packed.parameters.total


def test_the_command_prints_and_says_what_was_assumed(capsys):
    assert main(["plan", QUICKSTART, "--gpu-memory", "12"]) == 0
    out = capsys.readouterr().out
    for said in ("reached by the loss", "GFLOP useful", "12 GB", "80 GB", "samples/s on H100", "give --ranks"):
        assert said in out
    assert "Options:" not in out


def test_json_has_the_same_in_bytes(capsys):
    assert main(["plan", QUICKSTART, "--ranks", "2", "--gpu-memory", "12", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ranks"] == 2
    assert told["peak_bytes"]["total"] > told["states_bytes"]["weights"] > 0
    assert told["fits"] == {"12": 16, "24": 16, "48": 16, "80": 16}
    assert told["samples_per_second"]["H100"] == pytest.approx(2 * 0.4 * 989e12 / told["flops_per_sample"])
    assert told["changes"] == []


def test_changes_that_make_it_fit_do(monkeypatch):
    made = planned(QUICKSTART, [*NOT_HERE, *STEP[:1], "trainer.global_batch_size=64", "trainer.micro_batch_size=64"])
    room = made.memory().total * 0.75
    monkeypatch.setattr("rlinf_core.plan.advice.usable", lambda *_: room)
    monkeypatch.setattr("rlinf_core.costs.memory.usable", lambda *_: room)
    changes = {change.settings: change for change in advise(made, repository_plugins(), 1)}
    assert all(change.peak <= room for change in changes.values())
    assert "trainer.micro_batch_size = 32" in changes
    full = changes['trainer.activation_checkpointing = "full" with trainer.micro_batch_size = 64']
    assert (
        full.peak
        == made.counting({"activation_checkpointing": "full"}, repository_plugins())
        .memory(activation_checkpointing="full")
        .total
    )


def test_another_trainer_and_ranks_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match=r"not a multiple of 3 ranks"):
        planned(QUICKSTART, ranks=3)


ADAMW = State(per_number=8, once=4)
UNITS = (
    Unit((Parameter("a", (1000, 100), state=ADAMW),), 2),
    Unit((Parameter("b", (1001, 100), state=ADAMW), Parameter("dead", (500, 100), reached=False, state=ADAMW)), 2),
    Unit(
        (Parameter("root", (10, 10), state=ADAMW), Parameter("frozen", (50, 10), trainable=False, averaged=False)),
        4,
    ),
)
GROWS = Activations((1, 0, 2), (0.0, 0.0, 0.0), (1e6, 1e6, 1e6))


def test_states_are_sharded_by_rows():
    two = states(UNITS, Sharding(ranks=2, ema=True))
    rows = 500 * 100 + 501 * 100 + 250 * 100 + 50 + 250
    assert two.weights == 4 * rows
    assert two.gradients == 4 * (rows - 250 * 100 - 250)
    assert two.ema == 4 * (rows - 250)
    assert two.optimizer == 2 * two.ema + 4 * 4
    assert states(UNITS, Sharding(ranks=4, num_replicas=2, ema=True)) == two


@pytest.mark.parametrize(
    ("change", "part", "grows"),
    [
        ({"reshard_after_forward": False}, "gathered", True),
        ({"cpu_offload": True}, "weights", False),
        ({"ema_on_cpu": True}, "ema", False),
        ({"ranks": 4}, "optimizer", False),
    ],
)
def test_settings_move_the_part_they_are_about(change, part, grows):
    given = {"ranks": 2, "ema": True}
    plain = step_memory(UNITS, GROWS, 1, Sharding(**given), accumulates=False)
    changed = step_memory(UNITS, GROWS, 1, Sharding(**(given | change)), accumulates=False)
    assert (getattr(changed, part) > getattr(plain, part)) is grows
    assert (changed.total > plain.total) is grows


def test_accumulation_keeps_whole_gradients_unless_they_are_reduced_each_time():
    learning = 4 * sum(unit.learning for unit in UNITS)
    whole = step_memory(UNITS, GROWS, 1, Sharding(ranks=4), accumulates=True)
    reduced = step_memory(UNITS, GROWS, 1, Sharding(ranks=4, reduce_every_micro_batch=True), accumulates=True)
    assert whole.gradients >= learning > reduced.gradients


def test_the_largest_micro_batch_fits_and_the_next_does_not():
    capacity, sharding = 20e6, Sharding()
    size = largest_micro_batch(UNITS, GROWS, sharding, 48, capacity)
    fits = [
        n for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 48) if largest_micro_batch(UNITS, GROWS, sharding, n, capacity) == n
    ]
    assert size == max(fits) < 48
    assert largest_micro_batch(UNITS, GROWS, sharding, 48, 1e6) == 0
    assert 79e9 < usable(80, Sharding()) < 80 * 2**30
    assert 0.9e9 < usable(80, Sharding()) - usable(80, Sharding(ranks=8)) < 1e9


def test_traffic_follows_the_settings():
    # Four ranks exchange 1004 of the 1001 rows of `b`, 12 of the root's 10 and 52 of the 50 that are frozen.
    gathered = sum(unit.gathered for unit in UNITS) + 2 * 3 * 100 + 4 * (2 + 2) * 10
    assert sum(unit.exchanged(4) for unit in UNITS) == gathered
    assert traffic(UNITS, Sharding(ranks=4), 1).all_gather == pytest.approx(2 * 0.75 * gathered)
    assert traffic(UNITS, Sharding(ranks=4, reshard_after_forward=False), 3).all_gather == pytest.approx(
        0.75 * gathered
    )
    assert traffic(UNITS, Sharding(ranks=4), 3).reduce_scatter == traffic(UNITS, Sharding(ranks=4), 1).reduce_scatter
    assert traffic(UNITS, Sharding(ranks=4, num_replicas=2), 1).all_reduce > 0
    assert traffic(UNITS, Sharding(ranks=1), 3).total == 0


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA T600", None)],
)
def test_cards_are_known_by_the_drivers_names(name, peak):
    assert peak_tflops(name) == peak
