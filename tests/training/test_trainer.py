"""Runs of the toy policy in this process: where they end, what they validate, save and keep."""

import json
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import toy_policy
from torch.distributed.checkpoint.filesystem import FileSystemReader

from rlinf_core import Metric
from rlinf_core.config.load import load_config
from rlinf_core.errors import UserError
from rlinf_core.loggers.jsonl import read_rows
from rlinf_core.training.config import Fsdp2TrainerConfig
from rlinf_core.training.distributed.processes import processes
from rlinf_core.training.state.blocks import Compilation
from rlinf_core.training.state.build import prepare_blocks
from rlinf_core.training.stopping import Best
from rlinf_core.training.trainer import Fsdp2Trainer


@pytest.fixture
def train(train_toy):
    return train_toy


@pytest.fixture
def configure(configure_toy):
    return configure_toy


def rows(trainer, key="loss"):
    return [row for row in read_rows(trainer.run.folder / "metrics.jsonl") if key in row]


def checkpoints(trainer):
    return [int(path.name.removeprefix("step_")) for path in sorted((trainer.run.folder / "checkpoints").iterdir())]


def test_a_run_begins_with_what_the_policy_says_of_the_data(train, monkeypatch, capsys):
    seen = []

    def describe(self, samples):
        seen.extend(samples)
        return {"toys": f"{len(seen)} of them"}

    monkeypatch.setattr(toy_policy.TrainableToyPolicy, "describe", describe)
    train("runner.max_steps=1")
    out = capsys.readouterr().out
    assert out.index("toys: 200 of them") < out.index("step 1/1")
    assert all("camera" not in sample and "noise" not in sample for sample in seen)


def test_data_that_need_images_are_not_described(train, monkeypatch):
    monkeypatch.setattr(toy_policy.TrainableToyPolicy, "describe", lambda *_: pytest.fail("asked"))
    train("runner.max_steps=1", "data.stats_need_images=true")


def test_epochs_end_a_run(train):
    """200 rows make 10 steps of 20."""
    trainer = train("runner.max_epochs=2")
    assert (trainer.step, trainer.stop_step, rows(trainer)[-1]["epoch"]) == (20, 20, 2.0)
    assert train("runner.max_epochs=2") is None
    assert train("runner.max_epochs=3").step == 30


def test_whichever_limit_comes_first_ends_a_run(train):
    assert train("runner.max_epochs=2", "runner.max_steps=3").step == 3
    assert train("runner.name=b", "runner.max_epochs=1", "runner.max_steps=30").step == 10


def test_limits_survive_being_written(configure, tmp_path, toy_plugins):
    from rlinf_core.config.load import dump_config

    for overrides in (["runner.max_epochs=2"], ["runner.max_epochs=2", "runner.max_steps=5"], []):
        run = configure(*overrides)
        (tmp_path / "again.toml").write_text(dump_config(run))
        assert load_config(tmp_path / "again.toml", [], toy_plugins) == run
    with pytest.raises(UserError, match="max_steps and max_epochs are both 0"):
        configure("runner.max_steps=0")


def test_a_validation_is_announced_and_the_eta_counts_those_to_come(train, capsys):
    train("runner.max_steps=4", "runner.val_check_interval=2")
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("step")]
    assert [line.partition(": ")[2] for line in lines if "validating" in line] == [
        "validating on held-out data ..."
    ] * 2
    assert next(line for line in lines if line.startswith("step 1/4")).endswith("+ 2 validations")
    assert "validation" not in next(line for line in lines if line.startswith("step 4/4"))


def test_validation_measures_live_and_averaged_weights(train):
    trainer = train("runner.max_steps=6", "runner.val_check_interval=3", "optim.ema_decay=0.9")
    for row in rows(trainer, "val_loss"):
        assert row.keys() >= {"val_loss", "val_action_mse", "ema_val_loss", "ema_val_action_mse"}
        assert row["ema_val_loss"] != row["val_loss"]
    # Validating in between changes nothing.
    assert [row["loss"] for row in rows(trainer)] == [
        row["loss"] for row in rows(train("runner.max_steps=6", "runner.name=without"))
    ]


@pytest.mark.parametrize("reshard", ["true", "false"])
def test_validation_of_the_average_is_that_of_a_policy_with_these_weights(train, reshard):
    settings = ("runner.max_steps=4", "runner.val_check_interval=4", "optim.ema_decay=0.5")
    trainer = train(*settings, f"trainer.reshard_after_forward={reshard}")
    [row] = rows(trainer, "val_loss")
    with torch.no_grad():
        for name, parameter in trainer.policy.named_parameters():
            parameter.to_local().copy_(trainer.ema.state_dict()[name].to_local())
    with processes("cpu"):
        [held_out] = trainer._evaluations.running
        again = held_out.evaluator.evaluate(trainer.policy, step=4, interrupted=lambda: False)
    assert again.metrics["val_loss"] == pytest.approx(row["ema_val_loss"], rel=1e-6)


@pytest.mark.parametrize("reshard", ["true", "false"])
def test_weights_are_the_same_to_the_bit_after_lending_their_place_to_the_average(train, reshard):
    trainer = train("runner.max_steps=2", "optim.ema_decay=0.5", f"trainer.reshard_after_forward={reshard}")
    before = {name: p.detach().to_local().clone() for name, p in trainer.policy.named_parameters()}
    average = {name: t.to_local().clone() for name, t in trainer.ema.state_dict().items()}
    with trainer.ema.in_place_of_weights():
        for name, parameter in trainer.policy.named_parameters():
            assert torch.equal(parameter.detach().to_local(), average[name])
    for name, parameter in trainer.policy.named_parameters():
        assert torch.equal(parameter.detach().to_local(), before[name])


def test_a_skipped_step_does_not_move_the_average(train):
    trainer = train("runner.max_steps=2", "optim.ema_decay=0.5")
    before = {name: t.to_local().clone() for name, t in trainer.ema.state_dict().items()}
    trainer.ema.update(torch.tensor(1.0))
    assert all(torch.equal(t.to_local(), before[name]) for name, t in trainer.ema.state_dict().items())
    trainer.ema.update(torch.tensor(0.0))
    assert not all(torch.equal(t.to_local(), before[name]) for name, t in trainer.ema.state_dict().items())


def test_what_is_saved_after_a_validation_is_the_float32_masters(train):
    """Validation leaves units gathered in the compute dtype where nothing releases them."""
    options = ("trainer.reshard_after_forward=false", "trainer.param_dtype=bf16")
    trainer = train("runner.max_steps=2", "runner.val_check_interval=2", *options)
    saved = FileSystemReader(trainer.run.folder / "checkpoints" / "step_000000002").read_metadata().state_dict_metadata
    dtypes = {name: entry.properties.dtype for name, entry in saved.items() if name.startswith("model.")}
    assert set(dtypes.values()) == {torch.float32}
    whole = train("runner.max_steps=4", "runner.name=whole", *options)
    parts = train("runner.max_steps=4", "runner.val_check_interval=2", *options)
    for name, parameter in whole.policy.named_parameters():
        assert torch.equal(
            parameter.detach().to_local(), dict(parts.policy.named_parameters())[name].detach().to_local()
        )


def test_a_validation_that_a_signal_prevented_is_made_up_for(train, monkeypatch):
    settings = ("runner.max_steps=4", "runner.val_check_interval=4", "runner.save_best=true")
    with monkeypatch.context() as patch:
        patch.setattr(Fsdp2Trainer, "_validate", lambda self, stop: (False, False))
        assert rows(train(*settings), "val_loss") == []
    trainer = train(*settings)
    assert [row["step"] for row in rows(trainer, "val_loss")] == [4]
    assert (trainer.run.folder / "best").read_text() == "step_000000004"
    assert train(*settings) is None
    expected = rows(train("runner.name=whole", *settings), "val_loss")
    assert rows(trainer, "val_loss")[0]["val_loss"] == expected[0]["val_loss"]


def test_the_average_is_resumed(train):
    whole = train("runner.max_steps=6", "optim.ema_decay=0.9")
    train("runner.name=parts", "runner.max_steps=3", "optim.ema_decay=0.9")
    parts = train("runner.name=parts", "runner.max_steps=6", "optim.ema_decay=0.9")
    for name, average in whole.ema.state_dict().items():
        assert torch.equal(average.to_local(), parts.ema.state_dict()[name].to_local())


VALIDATED = ("runner.val_check_interval=2", "runner.save_interval=0", "runner.keep_last=1")


def test_the_best_checkpoint_is_saved_named_and_kept(train):
    results = [3.0, 1.0, 2.0, 1.5]
    trainer = train("runner.max_steps=8", "runner.save_best=true", *VALIDATED, results=results)
    assert (trainer.run.folder / "best").read_text() == "step_000000004"
    assert checkpoints(trainer) == [4, 8]
    state = json.loads((trainer.run.folder / "checkpoints" / "step_000000008" / "state.json").read_text())
    assert state["best"] == {"step": 4, "value": 1.0, "stale": 2, "metric": "val_loss"}


def test_a_best_checkpoint_that_is_no_longer_kept_up_has_no_name(train):
    results = [3.0, 1.0, 2.0, 1.5]
    train("runner.max_steps=8", "runner.save_best=true", *VALIDATED, results=results)
    trainer = train("runner.max_steps=10", *VALIDATED, results=[0.5])
    assert not (trainer.run.folder / "best").exists()
    assert checkpoints(trainer) == [10]


def test_a_run_that_no_longer_improves_ends_early(train):
    early = ("runner.max_steps=20", "runner.early_stop_patience=2", *VALIDATED)
    trainer = train(*early, results=[3.0, 2.0, 2.0, math.nan, 0.0])
    assert trainer.step == 8
    assert checkpoints(trainer) == [8]
    assert train(*early) is None
    assert train("runner.max_steps=10", *VALIDATED, results=[1.0]).step == 10


def test_an_improvement_must_be_large_enough(train):
    small = ("runner.early_stop_min_delta=0.5", "runner.early_stop_patience=1", "runner.max_steps=20", *VALIDATED)
    assert train(*small, results=[3.0, 2.4, 2.0]).step == 6


def test_the_first_number_is_an_improvement_and_no_number_is_none():
    best = Best().after(1, Metric("loss"), math.nan, 0.0)
    assert (best.step, best.stale) == (0, 1)
    assert best.after(2, Metric("loss"), 5.0, 0.0) == Best(2, 5.0, 0, "loss")


def test_of_a_success_rate_larger_is_better_and_equal_is_no_improvement():
    rate = Metric("success", larger_is_better=True)
    best = Best().after(1, rate, 0.0, 0.0)
    assert best == Best(1, 0.0, 0, "success")
    best = best.after(2, rate, 1.0, 0.1)
    assert best == Best(2, 1.0, 0, "success")
    assert best.after(3, rate, 1.0, 0.0) == best.after(3, rate, math.nan, 0.0) == Best(2, 1.0, 1, "success")
    assert Best(2, 0.5, 0, "success").after(3, rate, 0.55, 0.1) == Best(2, 0.5, 1, "success")


def test_values_of_different_metrics_are_not_compared():
    best = Best(4, 0.1, 3, "val_loss")
    assert best.after(6, Metric("val_action_mse"), 750.0, 0.0) == Best(6, 750.0, 0, "val_action_mse")
    assert best.should_stop_early("", 3)
    assert best.should_stop_early("val_loss", 3)
    assert not best.should_stop_early("val_action_mse", 3)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["runner.save_best=true"], "runner.save_best needs validations: set runner.val_check_interval"),
        (["runner.early_stop_min_delta=0.1"], "does nothing without early_stop_patience"),
        (["trainer.cpu_offload=true", "trainer.ema_device=cpu"], "is redundant with cpu_offload"),
        (["trainer.ema_device=cpu"], "does nothing without optim.ema_decay"),
    ],
)
def test_options_that_would_do_nothing_are_refused(configure, overrides, complaint):
    with pytest.raises(UserError, match=complaint):
        configure(*overrides)


def test_an_unknown_best_metric_is_refused_before_training(train):
    with pytest.raises(UserError, match=r"validation reports no 'val_los'; did you mean 'val_loss'\? \(it"):
        train("runner.best_metric=val_los", "runner.val_check_interval=2")


def test_replicas_that_do_not_divide_the_ranks_are_refused(train):
    with pytest.raises(UserError, match=r"trainer\.num_replicas = 2 does not divide the 1 ranks"):
        train("trainer.num_replicas=2")


def test_a_policy_without_blocks_cannot_be_checkpointed_or_compiled(train, monkeypatch):
    monkeypatch.setattr(toy_policy.ToyModule, "shard_units", lambda self: iter(()))
    with pytest.raises(UserError, match=r"'trainable_toy' names none: its shard_units\(\) must say"):
        train("trainer.compile=true")


def test_a_run_says_once_what_it_compiled(train, monkeypatch, capsys):
    import torch._dynamo

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    train("trainer.compile=true", "runner.max_steps=3")
    out = capsys.readouterr().out
    assert out.count("torch.compile made ") == 1
    assert "graphs for the policy's 2 blocks" in out
    assert "runs eagerly" not in out
    assert "as one graph" not in out
    train("runner.name=eager", "runner.max_steps=3")
    assert "torch.compile" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "on_cuda", "on_cpu"),
    [({}, True, False), ({"compile": True}, True, True), ({"compile": False}, False, False)],
)
def test_blocks_are_compiled_on_cuda_unless_the_config_says_otherwise(settings, on_cuda, on_cpu):
    config = Fsdp2TrainerConfig(**settings)
    assert (config.compiles("cuda"), config.compiles("cpu")) == (on_cuda, on_cpu)


def test_a_policy_without_blocks_runs_eagerly_where_nobody_asked_for_compilation():
    policy = SimpleNamespace(shard_units=lambda: iter(()))
    prepare_blocks(None, policy, "none", Compilation(), wanted=False)
