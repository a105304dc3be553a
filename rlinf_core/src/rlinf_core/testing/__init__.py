"""Tools for testing plugins: conformance checks, a tiny dataset, and pytest fixtures.

    from rlinf_core.testing import check_dataset, check_policy

    def test_my_dataset_conforms():
        check_dataset(FrankaPick(repo_id="tests/data/franka"))

    def test_my_policy_conforms():
        check_policy(MyPolicyConfig(size="tiny"))

The fixtures `tiny_dataset`, `tiny_run` and `installed_plugins` come with `pytest_plugins = ["rlinf_core.testing"]` in a
`conftest.py`; everything else works without pytest. Importing this leaves torch unloaded.
"""

from importlib.util import find_spec

from rlinf_core.testing.datasets import check_dataset
from rlinf_core.testing.findings import Report
from rlinf_core.testing.lerobot import TinyDataset, write_tiny_dataset
from rlinf_core.testing.plugins import plugins_in_memory
from rlinf_core.testing.policies import check_policy

__all__ = ["Report", "TinyDataset", "check_dataset", "check_policy", "plugins_in_memory", "write_tiny_dataset"]

if find_spec("pytest"):
    from rlinf_core.testing.fixtures import installed_plugins as installed_plugins
    from rlinf_core.testing.fixtures import tiny_dataset as tiny_dataset
    from rlinf_core.testing.fixtures import tiny_run as tiny_run
