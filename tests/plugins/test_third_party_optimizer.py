"""The optimizer that docs/training.md shows as a complete plugin, installed as a package, trains and resumes."""

import re
import sys

import pytest
import torch
from distributions import ROOT, entry_point, repository_entry_points
from torch.distributed.tensor import DTensor
from toy_policy import TrainableToyDataset

from rlinf_core import PluginError
from rlinf_core.plan.step import plan
from rlinf_core.plugins.registry import DATASET_GROUP, PLUGIN_GROUP, Plugins
from rlinf_core.training.state.fsdp import local_shard

PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
[SOURCE] = [block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "class LionConfig" in block]
SETTINGS = ("optim.type=lion", "optim.lr=1e-3", "optim.weight_decay=0.1", "runner.val_check_interval=0")


@pytest.fixture
def toy_plugins(tmp_path, monkeypatch):
    """The repository's plugins, the toy policy, and the page's optimizer, which is imported from a file."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "acme_lion.py").write_text(SOURCE)
    monkeypatch.delitem(sys.modules, "acme_lion", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    toys = [
        entry_point(PLUGIN_GROUP, "toy", "toy_policy", "toy-policy"),
        entry_point(DATASET_GROUP, "toy", TrainableToyDataset, "toy-policy"),
        entry_point(PLUGIN_GROUP, "lion", "acme_lion", "acme-lion"),
    ]
    return Plugins([*repository_entry_points(), *toys])


def test_it_trains_resumes_to_the_bit_and_is_planned(train_toy, configure_toy, toy_plugins):
    once = train_toy(*SETTINGS, "runner.name=once", "runner.max_steps=6")
    train_toy(*SETTINGS, "runner.name=twice", "runner.max_steps=3")
    twice = train_toy(*SETTINGS, "runner.name=twice", "runner.max_steps=6")
    ours, theirs = ({k: local_shard(t) for k, t in one._state.tensors().items()} for one in (once, twice))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    weights = sum(tensor.nbytes for key, tensor in ours.items() if key.startswith("model."))
    momenta = {key: tensor for key, tensor in ours.items() if key.startswith("optim.momentum.")}
    assert sum(tensor.nbytes for tensor in momenta.values()) == weights
    assert all(tensor.any() for tensor in momenta.values())
    assert plan(configure_toy(*SETTINGS), toy_plugins, 1).states.optimizer == weights


@pytest.mark.parametrize("sharded", [False, True], ids=["shards", "dtensors"])
def test_its_steps_are_lions(train_toy, tmp_path, sharded):
    """The first has no momentum: each weight decays, and moves by the learning rate against its gradient's sign."""
    if sharded:
        line = "    elementwise: ClassVar[bool] = True\n"
        assert line in SOURCE
        (tmp_path / "site" / "acme_lion.py").write_text(SOURCE.replace(line, ""))
    before = train_toy(*SETTINGS, "runner.name=zero", "runner.max_steps=1", "optim.lr=1e-30", "optim.min_lr=0")
    after = train_toy(*SETTINGS, "runner.name=one", "runner.max_steps=1")
    starts, ends = (dict(one.policy.named_parameters()) for one in (before, after))
    for name, start in starts.items():
        moved = local_shard(ends[name]) - local_shard(start) * (1 - 1e-3 * 0.1)
        torch.testing.assert_close(moved.abs(), torch.full_like(moved, 1e-3), rtol=0, atol=1e-6)
    given = {type(weights) for group in after.optimizer._torch.param_groups for weights in group["params"]}
    assert [issubclass(one, DTensor) for one in given] == [sharded]


def test_its_owner_is_named_where_it_keeps_what_checkpoints_lack(train_toy, tmp_path):
    path = tmp_path / "site" / "acme_lion.py"
    path.write_text(SOURCE.replace('{"momentum": torch', '{"average": torch').replace('["momentum"]', '["average"]'))
    path.write_text(path.read_text().replace("momentum.lerp_(", 'self.state[weights]["age"] = 1; momentum.lerp_('))
    with pytest.raises(PluginError, match=r"optim.type = 'lion' \(LionConfig of acme-lion 1\.0 .*has 'age', which"):
        train_toy(*SETTINGS, "runner.max_steps=1")


def test_it_needs_public_names_alone():
    assert re.findall(r"^(?:from|import) (rlinf_core\S*)", SOURCE, re.MULTILINE) == ["rlinf_core"]
    assert len(SOURCE.splitlines()) < 60
