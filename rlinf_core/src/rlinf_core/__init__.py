"""Supervised fine-tuning of robot and text policies; plugins bring the policies and the datasets.

The names in `__all__` are the public surface, with the modules `data.transforms`, `data.rotations`, `data.normalize`,
`data.pipeline`, `data.sample`, `hub`, `illustration`, `results`, `plots.actions` and, for the tests of plugins,
`testing`. They load on first use, so that importing the package costs nothing and leaves torch unloaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlinf_core.contract.adapter import Adapter as Adapter
    from rlinf_core.contract.adapter import BufferedAdapter as BufferedAdapter
    from rlinf_core.contract.adapter import MergeableAdapter as MergeableAdapter
    from rlinf_core.contract.augmentation import AugmentationConfig as AugmentationConfig
    from rlinf_core.contract.command import Command as Command
    from rlinf_core.contract.continuation import Continuation as Continuation
    from rlinf_core.contract.datasets import DatasetConfig as DatasetConfig
    from rlinf_core.contract.datasets import LeRobotDatasetConfig as LeRobotDatasetConfig
    from rlinf_core.contract.datasets import SampleSource as SampleSource
    from rlinf_core.contract.environment import ActionSpace as ActionSpace
    from rlinf_core.contract.environment import Environment as Environment
    from rlinf_core.contract.environment import EnvironmentConfig as EnvironmentConfig
    from rlinf_core.contract.environment import EnvironmentTask as EnvironmentTask
    from rlinf_core.contract.environment import EpisodeError as EpisodeError
    from rlinf_core.contract.environment import Outcome as Outcome
    from rlinf_core.contract.environment import Start as Start
    from rlinf_core.contract.evaluation import Evaluation as Evaluation
    from rlinf_core.contract.evaluation import Evaluator as Evaluator
    from rlinf_core.contract.evaluation import EvaluatorConfig as EvaluatorConfig
    from rlinf_core.contract.evaluation import Metric as Metric
    from rlinf_core.contract.hookspecs import hookimpl as hookimpl
    from rlinf_core.contract.module import Policy as Policy
    from rlinf_core.contract.module import PolicyOutput as PolicyOutput
    from rlinf_core.contract.module import ShardUnit as ShardUnit
    from rlinf_core.contract.optim import OptimizerConfig as OptimizerConfig
    from rlinf_core.contract.optim import ScheduleConfig as ScheduleConfig
    from rlinf_core.contract.optim import TrainedParameter as TrainedParameter
    from rlinf_core.contract.policy import PolicyConfig as PolicyConfig
    from rlinf_core.contract.run import Logger as Logger
    from rlinf_core.contract.run import LoggerConfig as LoggerConfig
    from rlinf_core.contract.run import RunConfig as RunConfig
    from rlinf_core.contract.run import Trainer as Trainer
    from rlinf_core.contract.run import TrainerConfig as TrainerConfig
    from rlinf_core.contract.triage import TriageOutcome as TriageOutcome
    from rlinf_core.contract.triage import TriageTest as TriageTest
    from rlinf_core.data.sample import Sample as Sample
    from rlinf_core.errors import PluginError as PluginError
    from rlinf_core.errors import UserError as UserError
    from rlinf_core.inference import load_policy as load_policy
    from rlinf_core.rows import open_rows as open_rows
    from rlinf_core.rows import open_samples as open_samples
    from rlinf_core.training.settings import Fsdp2Settings as Fsdp2Settings

_HOME = {
    "DatasetConfig": "contract.datasets",
    "LeRobotDatasetConfig": "contract.datasets",
    "SampleSource": "contract.datasets",
    "PolicyConfig": "contract.policy",
    "Policy": "contract.module",
    "PolicyOutput": "contract.module",
    "ShardUnit": "contract.module",
    "AugmentationConfig": "contract.augmentation",
    "Adapter": "contract.adapter",
    "MergeableAdapter": "contract.adapter",
    "BufferedAdapter": "contract.adapter",
    "OptimizerConfig": "contract.optim",
    "ScheduleConfig": "contract.optim",
    "TrainedParameter": "contract.optim",
    "Fsdp2Settings": "training.settings",
    "TrainerConfig": "contract.run",
    "Trainer": "contract.run",
    "LoggerConfig": "contract.run",
    "Logger": "contract.run",
    "EvaluatorConfig": "contract.evaluation",
    "Evaluator": "contract.evaluation",
    "Evaluation": "contract.evaluation",
    "Metric": "contract.evaluation",
    "EnvironmentConfig": "contract.environment",
    "Environment": "contract.environment",
    "EnvironmentTask": "contract.environment",
    "ActionSpace": "contract.environment",
    "Start": "contract.environment",
    "Outcome": "contract.environment",
    "EpisodeError": "contract.environment",
    "TriageTest": "contract.triage",
    "TriageOutcome": "contract.triage",
    "Command": "contract.command",
    "Sample": "data.sample",
    "RunConfig": "contract.run",
    "hookimpl": "contract.hookspecs",
    "Continuation": "contract.continuation",
    "load_policy": "inference",
    "open_rows": "rows",
    "open_samples": "rows",
    "PluginError": "errors",
    "UserError": "errors",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
