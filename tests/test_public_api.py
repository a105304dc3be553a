"""The public names, frozen, and what importing costs."""

import subprocess
import sys

import pytest

import rlinf_core

PUBLIC = [
    "ActionSpace",
    "AugmentationConfig",
    "Adapter",
    "BufferedAdapter",
    "Command",
    "Continuation",
    "DatasetConfig",
    "Environment",
    "EnvironmentConfig",
    "EnvironmentTask",
    "EpisodeError",
    "Evaluation",
    "Fsdp2Settings",
    "Evaluator",
    "EvaluatorConfig",
    "LeRobotDatasetConfig",
    "Logger",
    "LoggerConfig",
    "MergeableAdapter",
    "Metric",
    "OptimizerConfig",
    "Outcome",
    "PluginError",
    "Policy",
    "PolicyConfig",
    "PolicyOutput",
    "RunConfig",
    "Sample",
    "SampleSource",
    "ScheduleConfig",
    "ShardUnit",
    "Start",
    "TrainedParameter",
    "Trainer",
    "TrainerConfig",
    "TriageOutcome",
    "TriageTest",
    "UserError",
    "hookimpl",
    "load_policy",
    "open_rows",
    "open_samples",
]


def loaded_after(statement, *modules):
    """Which of these modules a fresh interpreter has loaded after a statement."""
    code = f"import sys; {statement}; print(*sorted({set(modules)!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return result.stdout.split()


def test_public_names_are_these():
    assert sorted(rlinf_core.__all__) == sorted(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_resolve(name):
    assert getattr(getattr(rlinf_core, name), "__name__", "hookimpl") == name
    assert name in dir(rlinf_core)


def test_other_names_are_no_attributes():
    with pytest.raises(AttributeError, match="no attribute 'Polcy'"):
        _ = rlinf_core.Polcy


def test_importing_the_package_costs_nothing():
    assert loaded_after("import rlinf_core", "torch", "pydantic", "pluggy", "numpy", "rich") == []


def test_declarative_modules_leave_torch_unloaded():
    imports = "from rlinf_core import cli, hub, testing; from rlinf_core.config import load; "
    imports += "from rlinf_core.contract import adapter, datasets, evaluation, hookspecs, module, optim, policy, run; "
    imports += "from rlinf_core.evaluators import held_out; "
    imports += "from rlinf_core.plugins import builtin, registry; from rlinf_core.training import config"
    assert loaded_after(imports, "torch", "lerobot", "huggingface_hub", "rich", "tomli_w") == []
