"""A plugin that implements every hook as briefly as possible. `render_hooks.py` quotes it; the tests run it."""

import os
import platform
import shlex
import signal
import subprocess
import sys
from collections import defaultdict
from typing import Literal

import numpy as np
from pydantic import BaseModel

from rlinf_core import (
    ActionSpace,
    AugmentationConfig,
    Command,
    DatasetConfig,
    EnvironmentConfig,
    EnvironmentTask,
    EvaluatorConfig,
    LoggerConfig,
    Metric,
    OptimizerConfig,
    Outcome,
    PolicyConfig,
    ScheduleConfig,
    TrainerConfig,
    TriageOutcome,
    TriageTest,
    UserError,
    hookimpl,
)


class ArmPolicy(PolicyConfig):
    """A custom policy; `rlinf_core.testing.check_policy` reports what it still lacks."""

    type: Literal["arm"] = "arm"


class DimAugmentation(AugmentationConfig):
    """A custom camera augmentation: darker images."""

    type: Literal["dim"] = "dim"
    darkest: float = 0.5

    def draw(self, generator, cameras):
        return {"factor": generator.uniform(self.darkest, 1.0, len(cameras)).astype(np.float32)}

    def apply(self, images, draws, cameras):
        return images * draws["factor"][..., None, None, None]


class CountingTrainer(TrainerConfig):
    """A custom trainer."""

    type: Literal["counting"] = "counting"


class Descent(OptimizerConfig):
    """Gradient descent without any state; [training.md](training.md) has an optimizer with some."""

    type: Literal["descent"] = "descent"

    def build(self, parameters):
        import torch

        return torch.optim.SGD([one.parameter for one in parameters], lr=self.lr)

    def initial_state(self, parameter):
        return {}


class Halving(ScheduleConfig):
    """A learning rate that halves every so many steps."""

    schedule: Literal["halving"] = "halving"
    halve_every: int = 1000

    def lr_at(self, step):
        return self.lr * 0.5 ** (step / self.halve_every).floor()


class SheetLogger(LoggerConfig):
    """A custom logger."""

    type: Literal["sheet"] = "sheet"


class ReachEvaluator(EvaluatorConfig):
    """A custom evaluator."""

    type: Literal["reach"] = "reach"

    def metrics(self, run):
        return [Metric("reach_success", larger_is_better=True)]


class ArmOptions(BaseModel):
    """The table `[plugins.arm]`."""

    model_config = {"frozen": True, "extra": "forbid"}

    freeze: str = "vision."
    """Parameters whose names start with this prefix are not trained."""
    largest_loss: float = 1e6
    """A run with a larger loss has diverged."""


class MemoryDataset(DatasetConfig):
    """Synthetic rows."""

    rows: int = 8


class MemoryRows:
    """The rows of one split."""

    def __init__(self, rows: int) -> None:
        self.episodes = np.zeros(rows, np.int64)

    def __len__(self):
        return len(self.episodes)

    def __getitems__(self, indices):
        return [{"state": np.float32([index])} for index in indices]

    without_images = __getitems__

    def describe(self, index):
        return f"synthetic row {index}"

    def fingerprint(self):
        return f"synthetic, {len(self)} rows"


class TableEnvironment:
    """A simulator in which an arm reaches a point; [simulators.md](simulators.md) explains the methods."""

    control_hz = 20.0
    actions = ActionSpace(low=-np.ones(3, np.float32), high=np.ones(3, np.float32), idle=np.zeros(3, np.float32))

    def reset(self, start):
        random = np.random.default_rng(start.seed)
        self.hand, self.goal = random.uniform(-1, 1, 3), random.uniform(-1, 1, 3)

    def observe(self):
        return {"observation.state": np.float32([*self.hand, *self.goal])}

    def step(self, action):
        self.hand = self.hand + 0.05 * action
        return Outcome(success=bool(np.abs(self.hand - self.goal).max() < 0.05))

    def frame(self):
        return np.zeros((64, 64, 3), np.uint8)  # A renderer's image.

    def close(self):
        pass


class TableConfig(EnvironmentConfig):
    """A custom simulator."""

    type: Literal["table"] = "table"

    def tasks(self):
        return [EnvironmentTask("reach", "reach the point", horizon=200)]

    def build(self, task):
        return TableEnvironment()


class TemperatureTest(TriageTest):
    """Whether the motors were cold at the site."""

    name = "temperature"
    question = "Were the motors as warm at the site as in training?"
    needs_site = True

    def run(self, scene):
        here, there = (
            np.mean([row["temperature"] for row in rows.without_images(range(len(rows)))])
            for rows in (scene.site, scene.training)
        )
        if abs(here - there) < 10:
            return TriageOutcome("fine", f"{here:.0f} and {there:.0f} °C")
        return TriageOutcome(
            "cause", f"the motors had {here:.0f} °C, in training {there:.0f}", "Warm them up", strength=0.5
        )


@hookimpl
def rlinf_register_policies():
    return [ArmPolicy]


@hookimpl
def rlinf_register_augmentations():
    return [DimAugmentation]


@hookimpl
def rlinf_register_trainers():
    return [CountingTrainer]


@hookimpl
def rlinf_register_optimizers():
    return [Descent]


@hookimpl
def rlinf_register_schedules():
    return [Halving]


@hookimpl
def rlinf_register_loggers():
    return [SheetLogger]


@hookimpl
def rlinf_register_evaluators():
    return [ReachEvaluator]


@hookimpl
def rlinf_register_triage():
    return [TemperatureTest]


@hookimpl
def rlinf_register_environments():
    return [TableConfig]


@hookimpl
def rlinf_register_commands():
    return [Command(name="arm-rest", help="move the arm to its rest position", module="acme_arm.rest")]


@hookimpl
def rlinf_register_options():
    return {"arm": ArmOptions}


@hookimpl
def rlinf_configure(run):
    if run.plugin_options(ArmOptions).freeze and run.policy.weights == "random":
        raise UserError("plugins.arm.freeze would freeze random weights: set policy.weights, or freeze nothing")


@hookimpl
def rlinf_launcher_names():
    return ["one-process"]


@hookimpl
def rlinf_launch(run, arguments):
    if run.cluster.launcher != "one-process":
        return None
    return subprocess.call([sys.executable, "-m", "rlinf_core.train", *arguments])


@hookimpl
def rlinf_describe_launch(run, arguments):
    if run.cluster.launcher != "one-process":
        return None
    return shlex.join([sys.executable, "-m", "rlinf_core.train", *arguments])


@hookimpl
def rlinf_open_dataset(dataset, split):
    if not isinstance(dataset, MemoryDataset):
        return None
    return MemoryRows(dataset.rows if split == "train" else 1)


@hookimpl
def rlinf_policy_built(policy, run):
    frozen = run.plugin_options(ArmOptions).freeze
    for name, parameter in policy.named_parameters():
        if frozen and name.startswith(frozen):
            parameter.requires_grad_(False)


@hookimpl
def rlinf_train_started(trainer):
    print(f"{trainer.run.runner.name} trains on {platform.node()} from step {trainer.step}")


@hookimpl
def rlinf_gradients_ready(policy, scale):
    from torch.nn.utils import get_total_norm  # Here, so that loading the plugin leaves torch unloaded.

    layers = defaultdict(list)  # Norms of the gradient per layer, e.g. grad_norm/blocks.0
    for name, parameter in policy.named_parameters():
        if parameter.grad is not None:  # A frozen or unused parameter has none.
            layers[".".join(name.split(".")[:2])].append(parameter.grad)
    return {f"grad_norm/{layer}": get_total_norm(gradients) * scale for layer, gradients in layers.items()}


@hookimpl
def rlinf_step_metrics():
    return {"arm/host_load": os.getloadavg()[0]}


@hookimpl
def rlinf_step_finished(trainer, step, metrics):
    if metrics["loss"] > trainer.run.plugin_options(ArmOptions).largest_loss:
        print(f"the run has diverged: its loss is {metrics['loss']:.3g} after step {step}")
        signal.raise_signal(signal.SIGTERM)  # Every rank saves, then the run ends. An exception would not end it.


@hookimpl
def rlinf_validation_finished(step, metrics):
    print(f"held-out loss after step {step}: {metrics['val_loss']:.4f}")


@hookimpl
def rlinf_checkpoint_saved(step, path):
    print(f"to be uploaded: {path}, of step {step}")


@hookimpl
def rlinf_train_finished(trainer, error):
    print(f"{trainer.run.runner.name} ended after step {trainer.step}: {error or 'done'}")
