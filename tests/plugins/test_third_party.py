"""A package with a trainer, a logger, settings and a dataset of its own, made of core's public names alone.

It is installed into a folder and used by a run as users start it.
"""

import json
import os
import re
import subprocess
import sys

import pytest
from distributions import install

PACKAGE = '''
"""Least squares without torch: the whole model is one vector."""

from typing import ClassVar, Literal

import numpy as np
from pydantic import BaseModel

from rlinf_core import DatasetConfig, LoggerConfig, PolicyConfig, TrainerConfig, UserError, hookimpl


class Line(DatasetConfig):
    """Points of a line."""

    run_defaults: ClassVar = {"policy": {"type": "line"}, "trainer": {"type": "line", "global_batch_size": 4}}

    slope: float = 2.0


class Points:
    """The points of one split."""

    def __init__(self, slope):
        self.x = np.linspace(-1, 1, 64, dtype=np.float32)
        self.y = slope * self.x

    def __len__(self):
        return len(self.x)

    def __getitems__(self, indices):
        return [{"x": self.x[i], "y": self.y[i]} for i in indices]


class LinePolicy(PolicyConfig):
    """A slope."""

    type: Literal["line"] = "line"


class LineTrainer(TrainerConfig):
    """Gradient descent on the slope."""

    type: Literal["line"] = "line"
    rate: float = 0.5

    def build(self, run, *, start, group, plugins):
        if group.size > 1:
            raise UserError("the trainer 'line' is for one process")
        rows = plugins.hook.rlinf_open_dataset(dataset=run.data, policy=run.policy, split="train")
        loggers = plugins.build_loggers(run, start_step=start.step, stop_step=run.runner.max_steps)
        return Descent(run, rows, loggers, plugins.hook, start.step)


class Descent:
    def __init__(self, run, rows, loggers, hook, step):
        self.run, self.step = run, step
        self._rows, self._loggers, self._hook, self._slope = rows, loggers, hook, 0.0

    def train(self):
        self._hook.rlinf_train_started(trainer=self)
        batch = self.run.trainer.global_batch_size
        while self.step < self.run.runner.max_steps:
            rows = self._rows.__getitems__([(7 * self.step + 11 * i) % len(self._rows) for i in range(batch)])
            x, y = (np.array([row[key] for row in rows]) for key in "xy")
            error = self._slope * x - y
            self._slope -= self.run.trainer.rate * 2 * float((error * x).mean())
            self.step += 1
            metrics = {"loss": float(np.square(error).mean()), "slope": self._slope}
            for logger in self._loggers:
                logger.step(self.step, metrics)
            self._hook.rlinf_step_finished(trainer=self, step=self.step, metrics=metrics)
        for logger in self._loggers:
            logger.close(None)
        self._hook.rlinf_train_finished(trainer=self, error=None)


class Options(BaseModel):
    """`[plugins.line]`."""

    model_config = {"frozen": True, "extra": "forbid"}

    goal: float = 0.0


class NoteLogger(LoggerConfig):
    """Writes sentences."""

    type: Literal["note"] = "note"

    def build(self, run, *, start_step, stop_step):
        goal = run.plugin_options(Options).goal
        return Note((run.folder / "note.txt").open("a"), f"of {stop_step}, goal {goal}")


class Note:
    def __init__(self, file, rest):
        self._file, self._rest = file, rest

    def step(self, step, metrics):
        print(f"step {step} {self._rest}: slope {metrics['slope']:.2f}", file=self._file)

    def validation(self, step, metrics):
        print("validated", file=self._file)

    def message(self, text):
        print(text, file=self._file)

    def close(self, error):
        print(f"ended: {error}", file=self._file)
        self._file.close()


@hookimpl
def rlinf_register_policies():
    return [LinePolicy]


@hookimpl
def rlinf_register_trainers():
    return [LineTrainer]


@hookimpl
def rlinf_register_loggers():
    return [NoteLogger]


@hookimpl
def rlinf_register_options():
    return {"line": Options}


@hookimpl
def rlinf_open_dataset(dataset):
    return Points(dataset.slope) if isinstance(dataset, Line) else None


@hookimpl
def rlinf_step_finished(trainer, step, metrics):
    if metrics["loss"] > 100:
        raise UserError(f"diverged at step {step}")
'''
CONFIG = """
[runner]
max_steps = 20
loggers = ["note"]
[data]
config_name = "line"
[plugins.line]
goal = 2
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    site = tmp_path_factory.mktemp("site")
    install(site, "least-squares", plugins={"line": "line"}, datasets={"line": "line:Line"}, line=PACKAGE)
    return site


@pytest.fixture
def train(site, tmp_path):
    def train(*overrides):
        (tmp_path / "run.toml").write_text(CONFIG)
        command = [sys.executable, "-m", "rlinf_core.train", "run.toml", *overrides]
        environment = {**os.environ, "PYTHONPATH": str(site)}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    return train


def test_a_trainer_and_a_logger_of_another_package_make_a_run(train, tmp_path):
    result = train()
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "runs" / "run"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert rows[-1]["slope"] == pytest.approx(2.0, abs=0.1)
    notes = (folder / "note.txt").read_text().splitlines()
    assert re.fullmatch(r"step 1 of 20, goal 2\.0: slope \d\.\d\d", notes[0])
    assert notes[20:] == ["ended: None"]
    assert 'type = "line"' in (folder / "config.toml").read_text()


def test_its_errors_name_the_package(train):
    result = train("trainer.rate=30")
    assert result.returncode == 2
    assert re.search(
        r"^error: diverged at step \d+ "
        r"\[rlinf_step_finished of least-squares 1\.0 \(entry point 'line = line'\)\]$",
        result.stderr,
        re.MULTILINE,
    )


def test_it_imports_public_names_only():
    imported = re.findall(r"^(?:from|import) (rlinf_core\S*)", PACKAGE, re.MULTILINE)
    assert imported == ["rlinf_core"]
