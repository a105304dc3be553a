"""Every option of the trainer gives the plain run to rounding, on four gloo ranks in float32 (contract 1).

The runs of one process group share its ranks (`option_runs.py`): starting processes costs more than training.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_run import DIMENSIONS, SETTINGS

from rlinf_plugins_openpi.model.parts import unpacked

STEPS = 2
BASE = [*SETTINGS, f"runner.max_steps={STEPS}", "optim.ema_decay=0.0", "policy.augment=false"]
BASE += ["trainer.global_batch_size=8", "trainer.micro_batch_size=1"]
TOY = """
[data]
config_name = "toy"
num_workers = 0
[trainer]
device = "cpu"
param_dtype = "fp32"
global_batch_size = 16
micro_batch_size = 2
[optim]
lr = 1e-2
warmup_steps = 0
[runner]
max_steps = 2
"""
VARIANTS = {
    "selective_checkpointing": ["trainer.activation_checkpointing=selective"],
    "full_checkpointing": ["trainer.activation_checkpointing=full"],
    "hybrid_sharding": ["trainer.num_replicas=2"],
    "offloaded": ["trainer.cpu_offload=true"],
    "together": [
        *("trainer.num_replicas=2", "trainer.cpu_offload=true", "trainer.activation_checkpointing=selective"),
        *("trainer.reduce_every_micro_batch=true", "optim.ema_decay=0.9"),
    ],
}


TOYS = {
    "one_micro_batch": ["trainer.micro_batch_size=8"],
    "reduced_every_micro_batch": ["trainer.reduce_every_micro_batch=true"],
    "kept_gathered": ["trainer.reshard_after_forward=false"],
}


@pytest.fixture(scope="module")
def train_all(start_ranks):
    """Train all named runs into a folder, and give it back."""

    def train_all(folder, config, runs, ranks):
        named = [f"{name}:{','.join(settings)}" for name, settings in runs.items()]
        compiled = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
        result = start_ranks("option_runs:main", ranks, folder, config, *named, **compiled)
        assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
        return folder

    return train_all


@pytest.fixture(scope="module")
def runs(tmp_path_factory, train_all):
    """Plain and with each option: the dummy π0.5 on the embedded dataset, four ranks, two micro batches a step."""
    variants = {name: [*BASE, *settings] for name, settings in ({"plain": []} | VARIANTS).items()}
    return train_all(tmp_path_factory.mktemp("options"), "examples/quickstart.toml", variants, ranks=4)


@pytest.fixture(scope="module")
def toy_runs(tmp_path_factory, train_all):
    """The same with a policy of two small blocks."""
    folder = tmp_path_factory.mktemp("toys")
    (folder / "toy.toml").write_text(TOY)
    variants = (
        {"plain": []}
        | TOYS
        | {f"ema{n}": ["optim.ema_decay=0.9", f"runner.max_steps={n}"] for n in range(1, STEPS + 1)}
    )
    return train_all(folder, folder / "toy.toml", variants, ranks=2)


def weights(folder, name, when):
    return load_file(folder / name / f"{when}.safetensors")


def metrics(folder, name):
    return json.loads((folder / name / "rows.json").read_text())


def losses(folder, name):
    return torch.tensor([row["loss"] for row in metrics(folder, name)], dtype=torch.float64)


def assert_equal_to_rounding(folder, name):
    torch.testing.assert_close(losses(folder, name), losses(folder, "plain"), rtol=1e-4, atol=0)
    start, end, other = (weights(folder, *which) for which in (("plain", "start"), ("plain", "end"), (name, "end")))
    assert all(torch.equal(start[key], tensor) for key, tensor in weights(folder, name, "start").items())
    # The true gradient of these is zero: Adam turns its rounding noise into movement (docs/numerics.md).
    start, end, other = (unpacked(state, DIMENSIONS) for state in (start, end, other))
    names = [key for key in start if not (key.startswith("vision.") and key.endswith("k_proj.bias"))]
    off = sum(float((other[key] - end[key]).square().sum()) for key in names) ** 0.5
    update = sum(float((end[key] - start[key]).square().sum()) for key in names) ** 0.5
    assert update > 0
    assert off / update <= 5e-3


@pytest.mark.parametrize("name", VARIANTS)
def test_an_option_gives_the_plain_run(runs, name):
    assert len(losses(runs, name)) == STEPS
    assert_equal_to_rounding(runs, name)


@pytest.mark.parametrize("name", TOYS)
def test_an_option_gives_the_plain_run_of_the_toy(toy_runs, name):
    assert_equal_to_rounding(toy_runs, name)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_pi05_gives_the_plain_run(tmp_path, train_all):
    compiled = [*BASE, "trainer.compile=true", "trainer.activation_checkpointing=selective"]
    variants = {"plain": BASE, "compiled": compiled}
    train_all(tmp_path, "examples/quickstart.toml", variants, ranks=2)
    assert list((tmp_path / "inductor").rglob("*.so"))
    assert_equal_to_rounding(tmp_path, "compiled")


def test_computing_again_changes_no_bit(runs):
    for name in ("selective_checkpointing", "full_checkpointing"):
        assert torch.equal(losses(runs, name), losses(runs, "plain"))
        other = weights(runs, name, "end")
        assert all(torch.equal(tensor, other[key]) for key, tensor in weights(runs, "plain", "end").items())


def test_the_average_is_the_references(toy_runs):
    """ema ← 0.9 · ema + 0.1 · weights after each step, from the initial weights on."""
    expected = weights(toy_runs, "ema1", "start")
    for step in range(1, STEPS + 1):
        after = weights(toy_runs, f"ema{step}", "end")
        expected = {key: 0.9 * average + 0.1 * after[key] for key, average in expected.items()}
        average = weights(toy_runs, f"ema{step}", "ema")
        torch.testing.assert_close(average, expected, rtol=1e-6, atol=1e-7)
    assert any(not torch.allclose(average[key], tensor, atol=1e-4) for key, tensor in after.items())


def sent(folder, name, what):
    counts = json.loads((folder / name / "sent.json").read_text())
    return sum(number for key, number in counts.items() if what in key)


def test_micro_batches_before_the_last_send_no_gradient(toy_runs):
    once = sent(toy_runs, "one_micro_batch", "reduce_scatter")
    assert once > 0
    assert sent(toy_runs, "plain", "reduce_scatter") == once
    assert sent(toy_runs, "reduced_every_micro_batch", "reduce_scatter") == 4 * once


def test_replicas_reduce_among_each_other_once_a_step(runs):
    plain = sent(runs, "plain", "allreduce")
    extra = sent(runs, "hybrid_sharding", "allreduce") - plain
    assert extra > 0
    assert sent(runs, "together", "allreduce") - plain == extra
    assert sent(runs, "together", "reduce_scatter") == 2 * sent(runs, "hybrid_sharding", "reduce_scatter")


def test_what_stays_gathered_is_not_gathered_again(toy_runs):
    assert sent(toy_runs, "kept_gathered", "allgather") < sent(toy_runs, "plain", "allgather")


def test_a_step_says_where_its_time_went(runs):
    for row in metrics(runs, "plain"):
        shares = [row[f"{phase}_share"] for phase in ("data_wait", "forward", "backward", "optimizer")]
        assert min(shares) > 0
        assert sum(shares) <= 1
        assert row["peak_memory_gb"] > 0.1
        assert row["samples_per_second"] * row["step_seconds"] == pytest.approx(8)
