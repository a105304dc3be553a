"""What `rlinf_core.testing` has for the tests of plugins: a tiny dataset, a two-step run, plugins in memory."""

import json
import subprocess
import sys
from types import SimpleNamespace

import arm_policy
import numpy as np
import pytest
from arm_policy import ArmDataset, ArmPolicy

from rlinf_core import UserError, hookimpl, train
from rlinf_core.testing import plugins_in_memory, write_tiny_dataset


@pytest.fixture(scope="module")
def plugins():
    return plugins_in_memory(arm_policy)


def test_a_tiny_dataset_has_the_columns_one_asks_for(tmp_path, plugins):
    written = write_tiny_dataset(tmp_path / "data", cameras=["front"], vectors={"joints": 6, "action": 6}, lengths=[5])
    dataset = ArmDataset(repo_id=str(written.root), images={"front": "front"}, state=("joints",))
    [row] = plugins.hook.rlinf_open_dataset(dataset=dataset, policy=ArmPolicy(), split="train").__getitems__([4])
    np.testing.assert_array_equal(row["joints"], written.vectors["joints"][0][4])
    np.testing.assert_array_equal(row["front"], written.images[0][4, 0])


def test_a_tiny_run_trains_with_plugins_in_memory(installed_plugins, tiny_run, tiny_dataset):
    installed_plugins(arm_policy, datasets={"tiny": ArmDataset})
    path = tiny_run("tiny", tiny_dataset.root, "policy.horizon=2", "optim.lr=1e-4")
    assert train.main([str(path)]) == 0
    rows = [json.loads(line) for line in (path.parent / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]


def test_plugins_in_memory_that_fail_raise(plugins):
    assert plugins.policy("arm") is ArmPolicy
    with pytest.raises(UserError, match=r"in-memory 0 .*expected a subclass of PolicyConfig, found 3"):
        plugins_in_memory(_registering(3)).policy("arm")


def _registering(config):
    return SimpleNamespace(__name__="broken", rlinf_register_policies=hookimpl(lambda: [config]))


def test_testing_needs_neither_torch_nor_pytest():
    code = "import sys; sys.modules['pytest'] = None; import importlib.util as u; u.find_spec = lambda name: None; "
    code += (
        "import rlinf_core.testing as t; print(hasattr(t, 'tiny_run'), 'torch' in sys.modules, t.check_policy.__name__)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False", "check_policy"]
