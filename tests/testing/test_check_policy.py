"""`check_policy` passes what conforms and names every rule that a policy breaks."""

import arm_policy
import numpy as np
import pytest
import torch
from arm_policy import Arm, ArmPolicy, Needs, Pad, Stateful, Unpicklable, findings
from pydantic import field_serializer
from torch import nn

from rlinf_core import PolicyOutput, ShardUnit
from rlinf_core.testing import check_policy
from rlinf_plugins_openpi import Pi0Config, Pi05Config

SMALL = {"variant": "dummy", "action_horizon": 2, "action_dim": 8, "num_sampling_steps": 1}


@pytest.mark.parametrize("config", [ArmPolicy(), Pi05Config(**SMALL)])
def test_a_policy_that_conforms_passes(config):
    report = check_policy(config)
    assert "loss_sum of a batch is the sum over its parts (contract 4)" in report.checked
    assert str(report).startswith(f"{type(config).__name__} conforms\n  checked: ")


def test_a_policy_says_what_its_loss_does_not_reach():
    report = check_policy(Pi0Config(**SMALL))
    assert [line for line in report.not_checked if line.startswith("gradients of") and "prefix_end.norm.weight" in line]


def test_a_sample_of_ones_own_may_be_given():
    sample = {"state": np.ones(2, np.float32), "actions": np.ones((3, 2)), "actions_is_pad": np.zeros(3, bool)}
    check_policy(ArmPolicy(), sample)
    [line] = findings(check_policy, ArmPolicy(), {**sample, "state": np.ones(9, np.float32)})
    assert line.startswith("transforms take a sample; it raised ValueError: ")


class Nameless(ArmPolicy):
    """A policy without a name of its own."""

    type: str = "arm"


class Forgetful(ArmPolicy):
    """A policy whose horizon is lost on the way."""

    @field_serializer("horizon")
    def lose(self, horizon):
        return horizon + 1


class Nullable(ArmPolicy):
    """A policy with a field that TOML cannot clear."""

    note: str | None = "hello"


@pytest.mark.parametrize(
    ("config", "finding"),
    [
        (Nameless(), "`type` is a Literal with one name; it raised PluginError: Nameless must declare its name"),
        (Forgetful(), "the config is the same after TOML; found Forgetful("),
        (Nullable(), "no field that accepts None has another default: TOML has no null to set it with; found note"),
    ],
)
def test_defects_of_a_config_are_found(config, finding):
    [line] = findings(check_policy, config)
    assert line.startswith(finding)


class Continuing(ArmPolicy):
    """Offers real-time chunking; its module has none."""

    def continuation_ways(self):
        return {"guided": 3, "trained": 2}


class Forgetting(Continuing):
    """Its module ignores what it is given."""

    def build(self):
        class Ignoring(Arm):
            def continue_actions(self, batch, noise, previous):
                return self.sample_actions(batch, noise)

        return Ignoring(self.horizon)


def test_a_policy_continues_chunks_as_it_says():
    report = check_policy(Pi05Config(**SMALL, rtc_training_max_delay=1))
    assert "continue_actions() keeps the actions that are given (trained)" in report.checked
    assert "continue_actions() works (guided)" in report.checked
    [line] = findings(check_policy, Continuing())
    assert line.startswith("with continuation_ways(), has continue_actions()")
    [line] = findings(check_policy, Forgetting())
    assert line.startswith("continue_actions() keeps the actions that are given (trained)")


class Generating(Arm):
    forward_methods = ("sample_actions", "generate")


class Saved(Arm):
    def __init__(self, horizon):
        super().__init__(horizon)
        self.register_buffer("scale", torch.empty(8))


class Allocating(Arm):
    def __init__(self, horizon):
        super().__init__(horizon)
        self.enter.bias = nn.Parameter(torch.zeros(16, device="cpu"))


class Incomplete(nn.Linear):
    def shard_units(self):
        return iter(())

    def rebuild_buffers(self):
        pass


collate, forward, actions = ArmPolicy.collate, Arm.forward, Arm.actions
BREAKS = [
    (ArmPolicy, "__doc__", None, "the class has a docstring, which listings show"),
    (ArmPolicy, "model_config", {"extra": "forbid"}, "the config is frozen (model_config)"),
    (ArmPolicy, "model_config", {"frozen": True}, "the config forbids unknown keys (model_config)"),
    (ArmPolicy, "run_defaults", {"optimm": {}}, "run_defaults sets keys that a run has; found optimm"),
    (ArmPolicy, "run_defaults", [1], "run_defaults is a table; found [1]"),
    (
        ArmPolicy,
        "draw",
        lambda self, generator: {"noise": np.random.standard_normal((3, 8)).astype(np.float32)},
        "draw() is a function of its generator alone (contract 1)",
    ),
    (
        ArmPolicy,
        "draw",
        lambda self, generator: {"noise": generator.standard_normal((3, 8)).astype(np.float16)},
        "draw() gives `noise`, float32 [H, A] with H = 3; found float16 [3, 8]",
    ),
    (
        ArmPolicy,
        "describe",
        lambda self, samples: {"states": len(list(samples))},
        "describe() maps names of facts to lines of text; found {'states': 1}",
    ),
    (
        ArmPolicy,
        "transforms",
        lambda self: (Needs("prompt"), Needs("gripper")),
        "transforms take a sample (a synthetic one; pass check_policy a sample that fits); "
        "it raised KeyError: 'gripper'",
    ),
    (
        ArmPolicy,
        "transforms",
        lambda self: (Pad(8), Unpicklable()),
        "transforms can be pickled (they are sent to workers); it raised TypeError: no copy of me",
    ),
    (
        ArmPolicy,
        "transforms",
        lambda self: (Pad(8), Needs("actions")),
        "transforms take a sample without actions (inference); it raised KeyError: 'actions'",
    ),
    (
        ArmPolicy,
        "transforms",
        lambda self: (Pad(8), Needs("images")),
        "transforms take a sample without images (statistics); it raised KeyError: 'images'",
    ),
    (ArmPolicy, "transforms", lambda self: (Pad(8), Stateful()), "transforms do the same each time"),
    (
        ArmPolicy,
        "collate",
        lambda self, samples: collate(self, samples) | {"images": torch.zeros(len(samples), 2)},
        "images stay uint8; found images",
    ),
    (
        ArmPolicy,
        "collate",
        lambda self, samples: collate(self, samples) | {"prompts": ["lift"] * len(samples)},
        "a batch holds tensors only; found prompts",
    ),
    (
        ArmPolicy,
        "collate",
        lambda self, samples: collate(self, samples) | {"time": {"start": torch.zeros(())}},
        "every tensor of a batch has the sample axis first, except those of 'packing'; found time.start",
    ),
    (
        ArmPolicy,
        "collate",
        lambda self, samples: collate(self, samples) | {"state": samples[0]["gripper"]},
        "collate() stacks samples; it raised KeyError: 'gripper'",
    ),
    (
        ArmPolicy,
        "build",
        lambda self: Allocating(3),
        "build() allocates nothing under torch.device('meta'); found enter.bias",
    ),
    (
        ArmPolicy,
        "build",
        lambda self: Saved(3),
        "no buffer is persistent: checkpoints hold parameters only; found scale",
    ),
    (
        ArmPolicy,
        "build",
        lambda self: Incomplete(2, 2),
        "the module follows Policy; found no initial_value, sample_actions",
    ),
    (
        ArmPolicy,
        "build",
        lambda self: Generating(3),
        "the module follows Policy; found no generate",
    ),
    (ArmPolicy, "build", lambda self: 1 // 0, "build() works on the meta device; it raised ZeroDivisionError: "),
    (
        ArmPolicy,
        "published_name",
        lambda self, name: name.removesuffix(".bias").removesuffix(".weight"),
        "published_name() gives every parameter a different name; found blocks.0, enter, leave",
    ),
    (
        Arm,
        "shard_units",
        lambda self: iter([ShardUnit(self)]),
        "every shard unit is a submodule of the policy, not the policy itself",
    ),
    (
        Arm,
        "shard_units",
        lambda self: iter([ShardUnit(self.enter), ShardUnit(self.enter)]),
        "no shard unit is listed twice; found enter",
    ),
    (
        Arm,
        "shard_units",
        lambda self: iter([ShardUnit(self.blocks), ShardUnit(self.blocks[0])]),
        "inner shard units come before the outer ones that contain them; found blocks.0",
    ),
    (
        Arm,
        "shard_units",
        lambda self: iter([ShardUnit(self.enter, "bf16")]),
        "a shard unit's dtype is 'compute' or 'fp32'; found bf16",
    ),
    (
        Arm,
        "initial_value",
        lambda self, name, shape, generator: torch.randn(shape),
        "initial_value() is a function of its generator alone (contract 2); "
        "found enter.weight, enter.bias, blocks.0.weight, blocks.0.bias, leave.weight, leave.bias",
    ),
    (
        Arm,
        "initial_value",
        lambda self, name, shape, generator: torch.zeros(shape, dtype=torch.float64 if name == "leave.bias" else None),
        "initial_value() gives the whole shape, float32, on the CPU; found leave.bias",
    ),
    (Arm, "rebuild_buffers", lambda self: None, "rebuild_buffers() fills every buffer; found scale"),
    (
        Arm,
        "forward",
        lambda self, batch: forward(self, batch).loss_sum,
        "forward() returns a PolicyOutput; found Tensor",
    ),
    (
        Arm,
        "forward",
        lambda self, batch: forward(self, batch)._replace(loss_sum=torch.zeros(())),
        "loss_sum is a float32 scalar with a gradient; found float32 [] without gradient",
    ),
    (
        Arm,
        "forward",
        lambda self, batch: forward(self, batch)._replace(weight=torch.ones(1)),
        "weight is a float32 scalar; found float32 [1] without gradient",
    ),
    (
        Arm,
        "forward",
        lambda self, batch: forward(self, batch)._replace(sample_losses=torch.zeros(len(batch["state"]), 2)),
        "sample_losses add up to loss_sum and weight; found [0.0, 0.0]",
    ),
    (
        arm_policy.Layer,
        "forward",
        nn.Linear.forward,
        "forward() gives a float32 loss when compute units are in bf16, as trainers gather them (contract 3); "
        "it raised RuntimeError: ",
    ),
    (
        Arm,
        "forward",
        lambda self, batch: forward(self, batch)._replace(weight=torch.zeros(())),
        "the weight is positive; found 0.0",
    ),
    (
        Arm,
        "forward",
        lambda self, batch: forward(self, batch)._replace(metrics={"error": forward(self, batch).loss_sum}),
        "metrics are detached scalars; found error",
    ),
    (
        Arm,
        "forward",
        lambda self, batch: PolicyOutput(
            self.leave.bias.sub(self.leave.bias).sqrt().sum(), torch.tensor(1.0 * len(batch["state"])), {}
        ),
        "gradients reach parameters, and are finite; found leave.bias",
    ),
    (
        Arm,
        "sample_actions",
        lambda self, batch, noise: actions(self, batch) + torch.randn_like(noise),
        "sample_actions() is a function of observation and noise only",
    ),
    (
        Arm,
        "sample_actions",
        lambda self, batch, noise: actions(self, batch) + batch["actions"],
        "sample_actions() ignores the actions in the batch",
    ),
    (
        Arm,
        "sample_actions",
        lambda self, batch, noise: actions(self, batch)[:, 0].double(),
        "sample_actions() gives float32 [3, 3, 8], the noise's shape; found float64 [3, 8] without gradient",
    ),
]


@pytest.mark.parametrize(("target", "name", "broken", "finding"), BREAKS, ids=[case[-1][:60] for case in BREAKS])
def test_defects_of_a_policy_are_found_one_by_one(monkeypatch, target, name, broken, finding):
    monkeypatch.setattr(target, name, broken)
    [line] = findings(check_policy, ArmPolicy())
    assert line.startswith(finding)
    assert finding.endswith(": ") or line == finding


def test_a_mean_instead_of_a_sum_is_found(monkeypatch):
    """Contract 4, in both ways to break it: a mean over the batch, and a weight that forgets the mask."""

    def mean(self, batch):
        out = forward(self, batch)
        return out._replace(loss_sum=out.loss_sum / out.weight, weight=torch.ones(()))

    monkeypatch.setattr(Arm, "forward", mean)
    loss, weight = findings(check_policy, ArmPolicy())
    assert loss.startswith("loss_sum of a batch is the sum over its parts (contract 4); found ")
    assert weight == "weight of a batch is the sum over its parts (contract 4); found 1, the parts sum to 2"


def test_everything_found_stands_in_one_message(monkeypatch):
    monkeypatch.setattr(ArmPolicy, "__doc__", None)
    monkeypatch.setattr(ArmPolicy, "transforms", lambda self: (Needs("gripper"),))
    with pytest.raises(AssertionError) as caught:
        check_policy(ArmPolicy())
    assert str(caught.value) == (
        "ArmPolicy breaks 2 rules:\n"
        "  the class has a docstring, which listings show\n"
        "  transforms take a sample (a synthetic one; pass check_policy a sample that fits); "
        "it raised KeyError: 'gripper'\n"
        "  (not checked: collate and the module: no samples could be encoded)"
    )


def test_the_sample_that_a_policy_fails_on_is_shown(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ArmPolicy, "transforms", lambda self: (Needs("gripper"),))
        with pytest.raises(AssertionError) as caught:
            check_policy(ArmPolicy())
    (note,) = caught.value.__notes__
    head, *lines = note.splitlines()
    assert head == "check_policy made this sample; if the policy needs another, pass it: check_policy(config, sample):"
    assert lines[0] == "  images: {}"
    assert lines[1].startswith("  state: float32 [7] from -")
    assert lines[2] == "  prompt: 'lift the red block'"
    assert lines[3].startswith("  actions: float32 [3, 7] from -")
    assert lines[4] == "  actions_is_pad: bool [3]"
    given = {"images": {"wrist": np.zeros((4, 4, 3), np.uint8)}, "state": np.ones(9, np.float32)}
    with pytest.raises(AssertionError) as caught:
        check_policy(ArmPolicy(), given)
    assert caught.value.__notes__[0].startswith(
        "the sample that was given:\n  images.wrist: uint8 [4, 4, 3] from 0 to 0"
    )


def test_a_mistake_in_the_config_shows_no_sample(monkeypatch):
    monkeypatch.setattr(ArmPolicy, "__doc__", None)
    with pytest.raises(AssertionError) as caught:
        check_policy(ArmPolicy())
    assert not hasattr(caught.value, "__notes__")
