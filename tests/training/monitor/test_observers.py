"""Loggers and observers that fail are named once and left out; the run goes on to its end."""

import math
import signal
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
import torch
import toy_policy
from distributions import entry_point, repository_entry_points

from rlinf_core import LoggerConfig, PluginError, UserError, hookimpl
from rlinf_core.loggers.console import ConsoleLogger
from rlinf_core.loggers.jsonl import JsonlLogger, read_rows
from rlinf_core.plugins.observers import TRACEBACKS
from rlinf_core.plugins.registry import DATASET_GROUP, PLUGIN_GROUP, Plugins

OWNER = "acme 1.0 (entry point 'acme = toy:acme')"


class Tracker:
    """A logger that does what a test says, and otherwise notes what it is told."""

    def __init__(self, name, failing=None):
        self.name, self.told, self._failing = name, [], failing or {}

    def _note(self, what, *arguments):
        self.told.append((what, *arguments))
        if what in self._failing:
            raise self._failing[what]

    def step(self, step, metrics):
        self._note("step", step)

    def validation(self, step, metrics):
        self._note("validation", step)

    def message(self, text):
        self._note("message")

    def close(self, error):
        self._note("close")


def config(name, logger):
    """A logger's config that builds this one, or raises it."""

    def build(self, run, *, start_step, stop_step):
        if isinstance(logger, Exception):
            raise logger
        return logger

    body = {"__annotations__": {"type": Literal[name]}, "type": name, "build": build, "__module__": __name__}
    return type(name, (LoggerConfig,), body)


@pytest.fixture
def acme():
    """A plugin whose hooks a test sets."""
    return SimpleNamespace(__name__="acme")


@pytest.fixture
def later():
    """Another one, whose hooks come first."""
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


def warnings(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if "left out" in line]


def rows(trainer):
    return [row for row in read_rows(trainer.run.folder / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize(
    ("method", "before"),
    [("step", ["step"]), ("validation", ["step", "step", "validation"]), ("message", []), ("close", None)],
)
def test_a_logger_that_fails_is_named_once_and_closed(train_toy, acme, capsys, method, before):
    mlflow = Tracker("mlflow", {method: ConnectionError("api.acme.ai is down\nretry later"), "close": OSError("again")})
    sheet = Tracker("sheet")
    acme.rlinf_register_loggers = hookimpl(lambda: [config("mlflow", mlflow), config("sheet", sheet)])
    options = ("runner.max_steps=4", "runner.val_check_interval=2", 'runner.loggers=["mlflow", "sheet"]')
    trainer = train_toy(*options)
    said, path = warnings(capsys), trainer.run.folder / TRACEBACKS
    what = "OSError: again" if method == "close" else "ConnectionError: api.acme.ai is down"
    assert said == [
        f"warning: logger 'mlflow' of {OWNER} failed and is left out from now on: {what} (traceback: {path})"
    ]
    assert [what for what, *_ in mlflow.told if what != "message"] == (
        [*before, "close"] if before is not None else [what for what, *_ in sheet.told if what != "message"]
    )
    assert [step for what, *step in sheet.told if what == "step"] == [[1], [2], [3], [4]]
    assert sheet.told[-1] == ("close",)
    assert (trainer.step, len(rows(trainer))) == (4, 4)
    assert path.read_text().count("Traceback") == (1 if method == "close" else 2)
    assert "retry later" in path.read_text() or method == "close"


def test_a_logger_that_cannot_be_built_is_an_error_before_the_start(train_toy, acme):
    acme.rlinf_register_loggers = hookimpl(
        lambda: [
            config("mlflow", UserError("log in first")),
            config("board", PermissionError("/data/tb")),
            config("flow", ModuleNotFoundError("No module named 'mlflow'", name="mlflow")),
        ]
    )
    with pytest.raises(PluginError) as caught:
        train_toy("runner.max_steps=2", 'runner.loggers=["mlflow"]')
    assert str(caught.value) == f"log in first [logger 'mlflow' of {OWNER}]"
    with pytest.raises(PermissionError) as caught:
        train_toy("runner.max_steps=2", 'runner.loggers=["board"]', "runner.name=board")
    assert f"in logger 'board' of {OWNER}" in caught.value.__notes__
    with pytest.raises(PluginError) as caught:
        train_toy("runner.max_steps=2", 'runner.loggers=["flow"]', "runner.name=flow")
    assert str(caught.value) == (
        "the logger 'flow' cannot start: No module named 'mlflow', and acme needs it: pip install mlflow "
        "(or the package that provides this module)"
    )


def test_a_console_that_is_gone_ends_nothing_but_the_record_does(train_toy, monkeypatch, capsys):
    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(ConsoleLogger, "step", fail)
    assert train_toy("runner.max_steps=2").step == 2
    assert "warning: logger 'console' of rlinf-core" in capsys.readouterr().err
    monkeypatch.setattr(JsonlLogger, "step", fail)
    with pytest.raises(OSError, match="Input/output error"):
        train_toy("runner.max_steps=2", "runner.name=other")


def test_of_several_observers_only_the_one_that_fails_is_left_out(train_toy, acme, later, capsys):
    seen = []

    def note(name, fails=()):
        @hookimpl
        def observe(step):
            seen.append((name, step))
            if step in fails:
                raise UserError(f"no {name}")

        return observe

    acme.rlinf_step_finished, later.rlinf_step_finished = note("acme"), note("later", [2])
    acme.rlinf_validation_finished, later.rlinf_validation_finished = note("held-out", [4]), note("later's")
    acme.rlinf_checkpoint_saved = note("saved", [2])
    acme.rlinf_train_finished = hookimpl(lambda trainer, error: 1 / 0)
    later.rlinf_train_finished = hookimpl(lambda trainer, error: seen.append(("end", error)))
    trainer = train_toy(
        "runner.max_steps=4", "runner.val_check_interval=4", "runner.save_interval=2", "runner.async_save=false"
    )
    assert [step for name, step in seen if name == "acme"] == [1, 2, 3, 4]
    assert [step for name, step in seen if name == "later"] == [1, 2]
    assert [what for what in seen if what[0] in ("held-out", "later's", "saved", "end")].count(("end", None)) == 1
    assert [step for name, step in seen if name == "saved"] == [2]
    said = warnings(capsys)
    assert [line.partition(" failed")[0] for line in said] == [
        "warning: rlinf_step_finished of later 1.0 (entry point 'later = toy:later')",
        *(f"warning: {name} of {OWNER}" for name in ("rlinf_checkpoint_saved", "rlinf_validation_finished")),
        f"warning: rlinf_train_finished of {OWNER}",
    ]
    assert "left out from now on: UserError: no later (traceback: " in said[0]
    assert trainer.step == 4


def test_what_starts_a_run_may_refuse_it_and_ctrl_c_is_nobodys_failure(train_toy, acme):
    acme.rlinf_step_finished = hookimpl(lambda: signal.raise_signal(signal.SIGINT))
    trainer = train_toy("runner.max_steps=9")
    assert trainer.step < 9
    acme.rlinf_step_finished.__code__ = (lambda: (_ for _ in ()).throw(KeyboardInterrupt)).__code__
    with pytest.raises(KeyboardInterrupt):
        train_toy("runner.max_steps=9", "runner.name=pressed")


def test_a_start_may_be_refused(train_toy, acme):
    def refuse():
        raise UserError("the arm is not calibrated")

    acme.rlinf_train_started = hookimpl(refuse)
    with pytest.raises(PluginError, match=r"the arm is not calibrated \[rlinf_train_started of acme 1\.0"):
        train_toy("runner.max_steps=2")


def test_metrics_of_plugins_come_to_loggers_and_observers_with_the_steps_own(train_toy, acme, later, capsys):
    seen = []

    @hookimpl
    def first(metrics):
        with pytest.raises(TypeError):
            metrics["loss"] = 0.0  # Others read it, too.
        return {"later/half": torch.tensor(metrics["loss"] / 2), "later/nan": np.float32("nan")}

    acme.rlinf_step_metrics = hookimpl(lambda metrics: {"acme/double": 4 * metrics["later/half"], "acme/flag": True})
    later.rlinf_step_metrics = first
    later.rlinf_step_finished = hookimpl(lambda metrics: seen.append(metrics))
    trainer = train_toy("runner.max_steps=2")
    for row, metrics in zip(rows(trainer), seen, strict=True):
        assert (row["later/nan"], math.isnan(metrics["later/nan"])) == (None, True)
        for found in (row, metrics):
            assert found["acme/double"] == pytest.approx(2 * found["loss"])
            assert (found["later/half"], found["acme/flag"]) == (pytest.approx(found["loss"] / 2), 1.0)
    assert warnings(capsys) == []


@pytest.mark.parametrize(
    ("metrics", "complaint"),
    [
        ({"later": 1.0}, "the metric name 'later' is taken"),
        ({"save_stall_seconds": 1.0}, "the metric name 'save_stall_seconds' is taken"),
        ({"x": "high"}, "the metric 'x' must be a number, not str 'high'"),
        ({"x": [1.0, 2.0]}, "the metric 'x' must be a number, not list [1.0, 2.0]"),
        ({"x": None}, "the metric 'x' must be a number, not NoneType None"),
    ],
)
def test_metrics_that_cannot_be_reported_leave_their_observer_out(train_toy, acme, later, capsys, metrics, complaint):
    later.rlinf_step_metrics = hookimpl(lambda: {"later": 2.0})
    acme.rlinf_step_metrics = hookimpl(lambda: metrics)
    trainer = train_toy("runner.max_steps=2")
    [line] = warnings(capsys)
    assert f"warning: rlinf_step_metrics of {OWNER} failed and is left out from now on: UserError: {complaint}" in line
    assert [(row["later"], "x" in row) for row in rows(trainer)] == [(2.0, False)] * 2
