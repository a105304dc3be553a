"""`rlinf_gradients_ready`: plugins measure and change the gradients of a step before the optimizer uses them."""

import json
import math
from types import SimpleNamespace

import distributions
import numpy as np
import pytest
import torch
import toy_policy
from distributions import entry_point, repository_entry_points
from torch.nn.utils import get_total_norm

from rlinf_core import PluginError, hookimpl
from rlinf_core.loggers.jsonl import read_rows
from rlinf_core.plugins.registry import DATASET_GROUP, PLUGIN_GROUP, Plugins
from rlinf_core.training.gradients import GradientHooks

STEPS = "runner.max_steps=3"


@pytest.fixture
def acme():
    """A plugin whose hooks a test sets; `train` calls them after those of `later`."""
    return SimpleNamespace(__name__="acme")


@pytest.fixture
def later():
    return SimpleNamespace(__name__="later")


@pytest.fixture
def toy_plugins(acme, later):
    toys = [
        entry_point(PLUGIN_GROUP, "toy", toy_policy, "toy-policy"),
        entry_point(DATASET_GROUP, "toy", toy_policy.TrainableToyDataset, "toy-policy"),
        entry_point(PLUGIN_GROUP, "acme", acme, "acme"),
        entry_point(PLUGIN_GROUP, "later", later, "later"),
    ]
    return Plugins([*repository_entry_points(), *toys])


@pytest.fixture
def train(train_toy):
    return train_toy


def rows(trainer):
    return [row for row in read_rows(trainer.run.folder / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize("reshard", ["true", "false"])
def test_the_gradients_are_those_of_the_mean_loss_over_all_micro_batches(train, acme, reshard):
    seen = []

    @hookimpl
    def rlinf_gradients_ready(trainer, policy, step, scale):
        seen.append((trainer.step, step, policy is trainer.policy))
        each = {
            f"grad_norm/{name}": get_total_norm([parameter.grad]) * scale
            for name, parameter in policy.named_parameters()
            if parameter.grad is not None
        }
        return {**each, "acme/numpy": np.float32(step), "acme/nan": math.nan, "acme/whole": torch.tensor([step])}

    acme.rlinf_gradients_ready = rlinf_gradients_ready
    acme.rlinf_policy_built = hookimpl(lambda policy: policy.blocks[0].requires_grad_(False) and None)
    trainer = train(STEPS, f"trainer.reshard_after_forward={reshard}")
    assert seen == [(0, 1, True), (1, 2, True), (2, 3, True)]
    for row in rows(trainer):
        norms = [value for name, value in row.items() if name.startswith("grad_norm/")]
        trained = [name for name, parameter in trainer.policy.named_parameters() if parameter.requires_grad]
        assert 0 < len(norms) == len(trained) < len(list(trainer.policy.parameters()))
        assert math.hypot(*norms) == pytest.approx(row["grad_norm"], rel=1e-5)
        assert (row["acme/numpy"], row["acme/nan"], row["acme/whole"]) == (row["step"], None, row["step"])


def test_what_a_plugin_does_to_gradients_is_what_the_optimizer_gets(train, acme, later):
    @hookimpl
    def halve_or_spoil(trainer, policy, step):
        for parameter in policy.parameters():
            if trainer.run.runner.name == "halved":
                parameter.grad.mul_(0.5)
            if trainer.run.runner.name == "spoilt" and step == 2:
                parameter.grad = parameter.grad * math.nan

    later.rlinf_gradients_ready = halve_or_spoil  # Called first.
    acme.rlinf_gradients_ready = hookimpl(
        lambda policy, scale: {"acme/norm": get_total_norm([p.grad * scale for p in policy.parameters()])}
    )
    plain, halved, spoilt = (rows(train(STEPS, f"runner.name={name}")) for name in ("plain", "halved", "spoilt"))
    for row in (*plain, *halved):
        assert row["acme/norm"] == pytest.approx(row["grad_norm"], rel=1e-5)
    assert halved[0]["grad_norm"] == pytest.approx(plain[0]["grad_norm"] / 2, rel=1e-5)
    assert [row["skipped"] for row in spoilt] == [0, 1, 0]
    assert spoilt[1]["acme/norm"] is None
    assert spoilt[2]["grad_norm"] > 0


def test_without_an_implementation_a_step_does_nothing_more():
    assert GradientHooks.of(None, None, None, Plugins(repository_entry_points())) is None


TAKEN = "the metric name {0!r} is taken: choose another, such as 'my_plugin/{0}'"


@pytest.mark.parametrize(
    ("metrics", "complaint"),
    [
        ({"grad_norm": 1.0}, TAKEN.format("grad_norm")),
        ({"step": 1.0}, TAKEN.format("step")),
        ({"mfu": 1.0}, TAKEN.format("mfu")),
        ({"val_loss": 1.0}, TAKEN.format("val_loss")),
        ({"later": 1.0}, TAKEN.format("later")),
        ({"": 1.0}, "expected the name of a metric, found ''"),
        ({"a": "1.0"}, "the metric 'a' must be a number, not str '1.0'"),
        ({"a": None}, "the metric 'a' must be a number, not NoneType None"),
        ({"a": torch.ones(2)}, "the metric 'a' must be a scalar, not a tensor of shape [2]"),
        (1.0, "expected a mapping from names to numbers, found 1.0"),
    ],
)
def test_metrics_that_cannot_be_reported_end_the_run_and_name_their_owner(train, acme, later, metrics, complaint):
    acme.rlinf_gradients_ready = hookimpl(lambda: metrics)
    later.rlinf_gradients_ready = hookimpl(lambda: {"later": 2})
    with pytest.raises(PluginError) as caught:
        train(STEPS)
    assert str(caught.value) == f"{complaint} [rlinf_gradients_ready of acme 1.0 (entry point 'acme = toy:acme')]"


MEASURES = """
import os
import torch
from rlinf_core import UserError, hookimpl
from torch.nn.utils import get_total_norm

@hookimpl
def rlinf_gradients_ready(trainer, policy, scale):
    given = {n: p.grad for n, p in policy.named_parameters()}
    # As one may do it: partial sums, which core reduces over the ranks.
    sums = {f"acme/square/{n}": (grad * scale).square().sum() for n, grad in given.items()}
    assert not trainer.step or all(value.placements[0].is_partial() for value in sums.values())
    if trainer.run.runner.name == "differs" and os.environ["RANK"] == "1":
        del sums["acme/square/enter.bias"]
    return {**sums, "acme/norm": get_total_norm(given.values()) * scale, "acme/rank": float(os.environ["RANK"])}

@hookimpl
def rlinf_train_finished():
    if os.environ["RANK"] == "1":
        raise OSError("no spoon")
"""


@pytest.mark.slow
def test_several_ranks_reduce_metrics_together_and_return_the_same(toy_site, tmp_path, start_ranks):
    distributions.install(tmp_path / "site", "acme", plugins={"acme": "acme"}, acme=MEASURES)
    settings = (toy_site / "toy.toml", f"runner.output_dir={tmp_path}", STEPS)
    start = {"paths": (toy_site, tmp_path / "site")}
    ended = start_ranks("rlinf_core.train:main", 2, *settings, **start)
    assert ended.returncode == 0, ended.stderr
    for row in read_rows(tmp_path / "run" / "metrics.jsonl"):
        squares = [row.pop(name) for name in list(row) if name.startswith("acme/square/")]
        assert math.sqrt(sum(squares)) == pytest.approx(row["grad_norm"], rel=1e-5)
        assert (row["acme/norm"], row["acme/rank"]) == (pytest.approx(row["grad_norm"], rel=1e-5), 0.0)
    # An observer of another rank fails, too.
    owner = "acme 1.0 (entry point 'acme = acme')"
    assert ended.stderr.count(f"warning: rlinf_train_finished of {owner} failed on rank 1 and is left out") == 1
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 0
    ended = start_ranks("rlinf_core.train:main", 2, *settings, "runner.name=differs", **start)
    assert ended.returncode == 2
    assert (
        "error: every rank must return the same metrics, but 'acme/square/enter.bias' was returned on rank 0 "
        f"and not on rank 1 [rlinf_gradients_ready of {owner}]"
    ) in ended.stderr
