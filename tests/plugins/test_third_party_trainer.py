"""The trainers of docs/trainers.md: another step in core's loop, and another loop, made of public names alone."""

import re
import sys

import pytest
import torch
from distributions import ROOT, entry_point, repository_entry_points
from toy_policy import TrainableToyDataset

from rlinf_core import UserError
from rlinf_core.plugins.registry import DATASET_GROUP, PLUGIN_GROUP, Plugins
from rlinf_core.training.distributed.processes import to_device
from rlinf_core.training.state.fsdp import local_shard

PAGE = (ROOT / "docs" / "trainers.md").read_text(encoding="utf-8")
SOURCES = dict(re.findall(r"`(acme_\w+)\.py`[^`]*?:\n\n```python\n(.*?)```", PAGE, re.DOTALL))
NO_VALIDATION = "data.validation_fraction=0.0"


@pytest.fixture
def toy_plugins(site):
    """The repository's plugins, the toy policy, and the page's two packages."""
    for name, source in SOURCES.items():
        (site / f"{name}.py").write_text(source)
    points = [
        entry_point(PLUGIN_GROUP, "toy", "toy_policy", "toy-policy"),
        entry_point(DATASET_GROUP, "toy", TrainableToyDataset, "toy-policy"),
        entry_point(PLUGIN_GROUP, "sharp", "acme_sharp", "acme-sharp"),
        entry_point(PLUGIN_GROUP, "loop", "acme_loop", "acme-loop"),
    ]
    return Plugins([*repository_entry_points(), *points])


def weights(trainer):
    return {name: local_shard(one).clone() for name, one in trainer.policy.named_parameters()}


def test_they_are_made_of_public_names_and_short():
    assert sorted(SOURCES) == ["acme_loop", "acme_loop_trainer", "acme_sharp", "acme_sharp_step"]
    for name, source in SOURCES.items():
        imported = set(re.findall(r"^(?:from|import) (rlinf_core\S*)", source, re.MULTILINE))
        assert imported <= {"rlinf_core", "rlinf_core.trainers"}
        assert ("torch" in source or "rlinf_core.trainers" in source) == name.endswith(("_trainer", "_step"))
    loop = SOURCES["acme_loop"] + SOURCES["acme_loop_trainer"]
    assert len([line for line in loop.splitlines() if line.strip()]) < 110


def test_a_loop_of_its_own_trains_saves_and_resumes_as_cores(train_toy, configure_toy, tmp_path):
    core = train_toy(NO_VALIDATION, "runner.name=core", "runner.max_steps=6")
    train_toy(NO_VALIDATION, "trainer.type=loop", "runner.name=loop", "runner.max_steps=3")
    loop = train_toy(NO_VALIDATION, "trainer.type=loop", "runner.name=loop", "runner.max_steps=6")
    assert type(loop).__module__ == "acme_loop_trainer"
    ours = {name: local_shard(one) for name, one in loop.state.tensors().items()}
    theirs = {name: local_shard(one) for name, one in core._state.tensors().items()}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    files = [(tmp_path / name / "metrics.jsonl").read_text().count("\n") for name in ("core", "loop")]
    assert files == [6, 6]
    with pytest.raises(UserError, match=r"'loop' does not validate: leave runner\.val_check_interval out"):
        configure_toy("trainer.type=loop", "runner.val_check_interval=2")


def test_a_sharp_step_uses_the_gradient_at_the_moved_weights(train_toy, configure_toy):
    with pytest.raises(UserError, match="micro_batch_size must be global_batch_size / 1 ranks"):
        train_toy("trainer.type=sharp", "runner.max_steps=1")
    given = ("trainer.micro_batch_size=20", "runner.max_steps=1", "runner.val_check_interval=0", NO_VALIDATION)
    start = train_toy(*given, "runner.name=zero", "optim.lr=1e-30", "optim.min_lr=0")
    batch = to_device(next(iter(start.data.loader(start._group, 0))), torch.device("cpu"))
    batch.pop("rlinf_source", None)
    parameters = dict(start.policy.named_parameters())
    expected = {name: local_shard(one).clone() for name, one in parameters.items()}

    def gradients():
        out = start.policy(batch)
        out.loss_sum.backward()
        found = {name: local_shard(one.grad).clone() for name, one in parameters.items()}
        for one in parameters.values():
            one.grad = None
        return found

    first = gradients()
    norm = torch.sqrt(sum(one.square().sum() for one in first.values()))
    for name, one in parameters.items():
        local_shard(one).add_(first[name] * (0.5 / norm))
    second = gradients()
    sharp = train_toy(*given, "trainer.type=sharp", "trainer.rho=0.5", "runner.name=sharp")
    plain = train_toy(*given, "runner.name=plain")
    # AdamW's first step moves each weight by the rate against the gradient's sign.
    for trainer, gradient in ((sharp, second), (plain, first)):
        for name, after in weights(trainer).items():
            clear = gradient[name].abs() > 1e-4
            moved = (after - expected[name])[clear]
            torch.testing.assert_close(moved, -1e-2 * gradient[name][clear].sign(), rtol=0, atol=2e-4)
    assert any((first[name].sign() != second[name].sign()).any() for name in first)


def test_nothing_loads_torch_before_a_trainer_is_built(toy_plugins):
    assert toy_plugins.trainer("sharp").__module__ == "acme_sharp"
    assert "acme_sharp_step" not in sys.modules
