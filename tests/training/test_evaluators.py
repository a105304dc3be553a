"""Evaluators of plugins in runs of the toy policy: what they get, what becomes of what they return, and their errors.

`Probe` does what each test sets in `Probe.evaluate_with`; its distribution is "lab" of version 1.0.
"""

import os
import random
import re
import signal
from types import SimpleNamespace
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch
import toy_policy
from distributions import ROOT, entry_point, install, repository_entry_points

from rlinf_core import Evaluation, EvaluatorConfig, Metric, PluginError, UserError, hookimpl
from rlinf_core.config.load import dump_config, load_config
from rlinf_core.loggers.jsonl import read_rows
from rlinf_core.plugins.registry import DATASET_GROUP, PLUGIN_GROUP, Plugins
from rlinf_core.preflight import check_run
from rlinf_core.training.evaluation import cut_back

OWNER = r"evaluator 'probe', rlinf_register_evaluators of lab 1\.0 \(entry point 'lab = toy:lab'\)"
PROBED = ("runner.evaluators=['probe']", "runner.val_check_interval=2", "runner.max_steps=4")


class Probe(EvaluatorConfig):
    """Measures what a test wants."""

    type: Literal["probe"] = "probe"
    names: tuple[str, ...] = ("success",)
    evaluate_with: ClassVar = None
    closed: ClassVar = 0

    def metrics(self, run):
        return [Metric(name, larger_is_better=True) for name in self.names]

    def build(self, run, *, data, group):
        return Running(data, group)


class Running:
    def __init__(self, data, group):
        self.data, self.group = data, group

    def evaluate(self, policy, *, step, interrupted):
        return Probe.evaluate_with(self, policy, step, interrupted)

    def close(self):
        Probe.closed += 1


class NeedsSuite(EvaluatorConfig):
    """Stands for a simulator: it must be told what to simulate."""

    type: Literal["suite"] = "suite"
    suite: str


def seed(value):
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


@pytest.fixture
def toy_plugins():
    def plugin(**hooks):
        return SimpleNamespace(__name__="lab", **{name: hookimpl(function) for name, function in hooks.items()})

    lab = plugin(rlinf_register_evaluators=lambda: [Probe, NeedsSuite], rlinf_train_started=lambda trainer: seed(3))
    return Plugins(
        [
            *repository_entry_points(),
            entry_point(PLUGIN_GROUP, "toy", toy_policy, "toy-policy"),
            entry_point(DATASET_GROUP, "toy", toy_policy.TrainableToyDataset, "toy-policy"),
            entry_point(PLUGIN_GROUP, "lab", lab, "lab"),
        ]
    )


@pytest.fixture
def probe(monkeypatch):
    """Let the probe measure with a function of (evaluator, policy, step, interrupted)."""

    def probe(function):
        monkeypatch.setattr(Probe, "evaluate_with", staticmethod(function))
        monkeypatch.setattr(Probe, "closed", 0)

    probe(lambda *_: Evaluation({"success": 0.5}))
    return probe


def validations(trainer, key="success"):
    return {row["step"]: row[key] for row in read_rows(trainer.run.folder / "metrics.jsonl") if key in row}


def test_metrics_files_and_messages_are_reported(train_toy, probe, tmp_path, capsys):
    (tmp_path / "elsewhere.mp4").write_bytes(b"video")
    seen = []

    def measure(evaluator, policy, step, interrupted):
        assert not policy.training
        assert not torch.is_grad_enabled()
        seen.append(policy.leave.weight.to_local().clone())
        files = {"videos/0.mp4": tmp_path / "elsewhere.mp4", "table.csv": f"step\n{step}\n".encode()}
        return Evaluation({"success": torch.tensor(step / 4)}, files, ["it fell"])

    probe(measure)
    trainer = train_toy(*PROBED, "optim.ema_decay=0.5")
    assert validations(trainer) == validations(trainer, "ema_success") == {2: 0.5, 4: 1.0}
    assert validations(trainer, "val_loss").keys() == {2, 4}  # One row for both evaluators.
    assert not torch.equal(seen[0], seen[1])  # The current weights, then their average.
    for name in ("step_000000004", "ema_step_000000004"):
        folder = trainer.run.folder / "evaluations" / "probe" / name
        assert (folder / "videos" / "0.mp4").read_bytes() == b"video"
        assert (folder / "table.csv").read_text() == "step\n4\n"
    written = (trainer.run.folder / "evaluations" / "probe").rglob("*")
    assert sum(path.is_file() for path in written) == 8  # None is left aside.
    out = capsys.readouterr().out
    assert "step 2: validating (held_out, probe) ..." in out
    assert ", success 0.5, ema_success 0.5" in out
    assert "step 4: it fell" in out
    assert "step 4: EMA weights: it fell" in out
    assert Probe.closed == 1


def test_training_is_the_same_to_the_bit_with_an_evaluator(train_toy, probe, monkeypatch):
    """Although it draws from every global generator, seeds them, and leaves the policy in training mode."""
    actions = toy_policy.ToyModule._actions
    dropped = torch.nn.functional.dropout
    monkeypatch.setattr(
        toy_policy.ToyModule, "_actions", lambda self, batch: dropped(actions(self, batch), 0.5, self.training)
    )
    drawn = []

    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def measure(evaluator, policy, step, interrupted):
        drawn.append(draw())
        seed(step)
        policy.train()
        return Evaluation({"success": drawn[-1][0]})

    probe(measure)

    def weights(*overrides):
        trainer = train_toy("runner.max_steps=6", *overrides)
        return [p.detach().to_local().clone() for p in trainer.policy.parameters()], draw()

    plain, numbers = weights("runner.name=plain")
    probed, after = weights(*PROBED[:2], "runner.val_at_start=true")
    assert all(torch.equal(one, other) for one, other in zip(plain, probed, strict=True))
    assert numbers == after
    assert len(drawn) == 4
    assert len(set(drawn)) == 1  # Each evaluation begins with the same numbers: they can be compared.


def test_the_best_success_rate_is_saved_and_ends_a_run_early(train_toy, probe):
    """Larger is better, and a rate that stays at 1 no longer improves."""
    rates = {2: 0.2, 4: 1.0, 6: 1.0, 8: 0.6}
    probe(lambda evaluator, policy, step, _: Evaluation({"success": rates[step]}))
    best = ("runner.best_metric=success", "runner.save_best=true", "runner.early_stop_patience=2")
    trainer = train_toy(*PROBED[:2], *best, "runner.max_steps=20", "runner.save_interval=0", "runner.keep_last=1")
    assert trainer.step == 8
    assert (trainer.run.folder / "best").read_text() == "step_000000004"
    assert (trainer._best.value, trainer._best.metric) == (1.0, "success")


def test_an_expensive_evaluator_runs_less_often_and_on_averaged_weights_only(train_toy, probe):
    settings = ["evaluators.probe.every=2", "evaluators.probe.weights=ema", "optim.ema_decay=0.5"]
    best = ["runner.best_metric=ema_success", "runner.early_stop_patience=2", "runner.max_steps=7"]
    trainer = train_toy("runner.val_check_interval=1", PROBED[0], *settings, *best, "runner.val_at_start=true")
    assert list(validations(trainer, "ema_success")) == [0, 2, 4, 6]
    assert validations(trainer, "success") == {}
    assert list(validations(trainer, "val_loss")) == list(range(7))
    assert (trainer.step, trainer._best.step) == (6, 2)  # Compared when measured: the start is not, 4 and 6 are.


def test_what_a_signal_interrupted_is_evaluated_after_resuming(train_toy, probe):
    def measure(evaluator, policy, step, interrupted):
        if not stopped:
            stopped.append(step)
            os.kill(os.getpid(), signal.SIGTERM)
        return None if interrupted() else Evaluation({"success": 1.0})

    probe(measure)
    stopped = []
    trainer = train_toy(*PROBED)
    assert (trainer.step, validations(trainer), validations(trainer, "val_loss")) == (2, {}, {})
    trainer = train_toy(*PROBED)
    assert stopped == [2]
    assert list(validations(trainer)) == list(validations(trainer, "val_loss")) == [2, 4]


def test_a_simulator_needs_no_held_out_episodes_and_acts_in_the_data_s_units(train_toy, probe):
    rows = []

    def measure(evaluator, policy, step, interrupted):
        [source] = evaluator.data.sources
        assert source.held_out is None
        assert list(source.batches(8)) == []
        rows[:] = source.rows.__getitems__([3, 30])
        first = source.act(policy, rows, [np.random.default_rng(seed) for seed in (0, 1)])
        assert [chunk.shape for chunk in first] == [rows[0]["actions"].shape] * 2
        again = source.act(policy, rows[1:], [np.random.default_rng(1)])
        np.testing.assert_allclose(again[0], first[1], rtol=1e-5)
        target = source.pipeline.target(rows[1])["actions"]
        return Evaluation({"success": -float(np.abs(first[1] - target).mean())})

    probe(measure)
    trainer = train_toy(*PROBED[:2], "runner.max_steps=60", "data.validation_fraction=0.0", "runner.save_best=true")
    errors = validations(trainer)
    assert errors[60] > errors[2]
    assert errors[60] > -20  # Actions of row 30 are around 30; those of the policy itself are normalised.
    assert trainer._best.metric == "success"  # The only metric there is.


def test_an_observation_without_a_column_is_named(train_toy, probe, monkeypatch):
    monkeypatch.setattr(toy_policy.TrainableToyDataset, "observation_columns", lambda self: ("state", "camera"))
    probe(lambda one, policy, *_: one.data.sources[0].act(policy, [{"state": [0.0], "cam": 0}], [random]))
    with pytest.raises(PluginError, match=rf"lacks 'camera'; it has state, cam; .* \[evaluate\(\) of {OWNER}\]"):
        train_toy(*PROBED)


def raising(error):
    def measure(*_):
        raise error

    return measure


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raising(UserError("no EGL device: set MUJOCO_GL")), "no EGL device: set MUJOCO_GL"),
        (lambda *_: {"success": 1.0}, "must return an Evaluation, or None if it was interrupted, not {'success': 1.0}"),
        (
            lambda *_: Evaluation({"sucess": 1.0}),
            "does not declare; did you mean 'success'.* \\(it declares success\\)",
        ),
        (lambda *_: Evaluation({"success": torch.ones(2)}), "its metric 'success' must be a number"),
        (lambda *_: Evaluation(files={"../../best": b""}), "'../../best' is outside the folder"),
        (lambda *_: Evaluation(files={"/tmp/x": b""}), "'/tmp/x' is outside the folder"),
        (
            lambda *_: Evaluation(files={"a.txt": "text"}),
            r"files\['a.txt'\] must be bytes or the path of a file, not str",
        ),
    ],
)
def test_mistakes_of_an_evaluator_name_it(train_toy, probe, function, message):
    probe(function)
    with pytest.raises(PluginError, match=rf"{message}.* \[evaluate\(\) of {OWNER}\]$"):
        train_toy(*PROBED)
    assert Probe.closed == 1


def test_another_error_keeps_its_type_and_gets_a_note(train_toy, probe):
    probe(raising(ZeroDivisionError("no episodes")))
    with pytest.raises(ZeroDivisionError) as caught:
        train_toy(*PROBED)
    assert caught.value.__notes__ == [
        "in evaluate() of evaluator 'probe', rlinf_register_evaluators of lab 1.0 (entry point 'lab = toy:lab')"
    ]


def test_a_file_that_cannot_be_written_costs_only_itself(train_toy, probe, tmp_path, capsys):
    def measure(evaluator, policy, step, interrupted):
        if step == 2:  # Where the folder should be. A test may run as root, whom permissions do not stop.
            (tmp_path / "run" / "evaluations" / "probe").write_text("")
        return Evaluation({"success": 0.5}, {"table.csv": b""})

    probe(measure)
    assert validations(train_toy(*PROBED)).keys() == {2, 4}
    out = capsys.readouterr().out
    assert re.search(r"step 2: warning: \S+/probe/step_000000002/table\.csv cannot be written: .*Not a directory", out)


def test_an_evaluator_that_cannot_be_closed_does_not_hide_the_error(train_toy, probe, monkeypatch):
    monkeypatch.setattr(Running, "close", lambda self: raising(OSError("no such process"))())
    with pytest.raises(OSError, match="no such process") as caught:
        train_toy(*PROBED)
    assert caught.value.__notes__[0].startswith("in close() of evaluator 'probe'")
    probe(raising(ZeroDivisionError("no episodes")))
    with pytest.raises(ZeroDivisionError) as caught:
        train_toy(*PROBED, "runner.name=other")
    assert caught.value.__notes__[-1] == "an evaluator could not be closed: no such process"


def test_metrics_of_the_same_name_are_refused_before_training(configure_toy, toy_plugins):
    run = configure_toy(*PROBED, "evaluators.probe.names=['val_loss']")
    report = check_run(run, toy_plugins, ranks=1)
    [finding] = report.findings
    assert "evaluator 'held_out', rlinf_register_evaluators of rlinf-core" in finding
    assert "evaluator 'probe', rlinf_register_evaluators of lab 1.0" in finding
    assert "both report 'val_loss': leave one of them out of runner.evaluators" in finding
    [finding] = check_run(configure_toy(*PROBED, "evaluators.probe.names=['step']"), toy_plugins, ranks=1).findings
    assert "reports 'step', which is a key of the run's own rows" in finding


def test_validate_knows_the_metrics_of_all_evaluators(configure_toy, toy_plugins):
    given = (*PROBED, "optim.ema_decay=0.9", "evaluators.probe.names=['success', 'success/left']")
    for name in ("ema_success/left", "success", "val_action_mse_mean"):
        report = check_run(configure_toy(*given, f"runner.best_metric={name}"), toy_plugins, ranks=1)
        assert (report.findings, report.facts["evaluators"]) == ([], "held_out, probe")
    [finding] = check_run(configure_toy(*given, "runner.best_metric=sucess"), toy_plugins, ranks=1).findings
    assert "validation reports no 'sucess'; did you mean 'success'" in finding
    without = ("evaluators.probe.names=[]", "data.validation_fraction=0.0", "runner.save_best=true")
    [finding] = check_run(configure_toy(*PROBED, *without), toy_plugins, ranks=1).findings
    assert finding.startswith("runner.save_best compares validations, but no evaluator of this run reports a metric")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["evaluators.probe.every=2"],
            "evaluators.probe: does nothing: the evaluator 'probe' does not run. Add it to runner.evaluators",
        ),
        (["runner.evaluators=['prob']"], "runner.evaluators: unknown evaluator 'prob'; did you mean 'probe'?"),
        (["runner.evaluators=['suite']"], "evaluators.suite.suite: is required"),
        ([*PROBED, "evaluators.probe.evry=2"], "evaluators.probe.evry: unknown key; did you mean 'every'?"),
        ([*PROBED, "evaluators.probe.weights=ema"], 'evaluators.probe.weights: "ema" does nothing without optim.ema_d'),
        (["evaluators=3"], r"evaluators: must have one table per evaluator, [evaluators.<type>] (got 3)"),
        (["runner.val_at_start=true"], "runner.val_at_start needs validations: set runner.val_check_interval"),
        (
            ["data.validation_fraction=0.0", "runner.val_check_interval=2"],
            "no episode is held out: set data.validation",
        ),
    ],
)
def test_mistakes_in_a_config_are_found(configure_toy, given, message):
    with pytest.raises(UserError) as caught:
        configure_toy(*given)
    assert message in str(caught.value)


def test_a_config_that_is_written_is_the_same(configure_toy, toy_plugins, tmp_path):
    run = configure_toy(
        "runner.evaluators=['probe']", "evaluators.probe.every=3", "evaluators.held_out.weights=current"
    )
    (tmp_path / "again.toml").write_text(dump_config(run))
    assert load_config(tmp_path / "again.toml", [], toy_plugins) == run
    assert {name: table.every for name, table in run.evaluators.items()} == {"probe": 3, "held_out": 1}
    assert configure_toy("runner.evaluators=['probe']").evaluators == {}


def test_files_of_evaluations_after_the_checkpoint_are_removed(tmp_path):
    for name in ("probe/step_000000002", "probe/ema_step_000000004", "other/step_000000004", "probe/notes"):
        (tmp_path / "evaluations" / name).mkdir(parents=True)
    cut_back(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.glob("evaluations/*/*")) == ["notes", "step_000000002"]


def example():
    """The evaluator of docs/training.md."""
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (source,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "ActionErrors" in block]
    return source


def test_the_example_of_the_docs_is_short_and_made_of_public_names():
    lines = [line for line in example().splitlines() if line]
    assert len(lines) < 60
    assert [line for line in lines if "import" in line and "rlinf" in line] == [
        "from rlinf_core import Evaluation, EvaluatorConfig, Metric, hookimpl"
    ]


@pytest.mark.slow
def test_the_example_of_the_docs_measures_the_same_on_any_number_of_ranks(toy_site, tmp_path, start_ranks):
    """Installed as users do, on two ranks of which one has a filler batch, and on one."""
    install(tmp_path / "site", "errors", plugins={"errors": "action_errors"}, action_errors=example())
    given = ["runner.max_steps=2", "runner.val_check_interval=2", "runner.evaluators=['action_errors']"]
    given += ["evaluators.action_errors.samples=5", "evaluators.action_errors.tolerance=57", "optim.ema_decay=0.5"]
    given += ["runner.best_metric=ema_within_tolerance", "trainer.micro_batch_size=1"]
    toml, paths = str(toy_site / "toy.toml"), [toy_site, tmp_path / "site"]
    found = {}
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        result = start_ranks("rlinf_core.train:main", ranks, toml, f"runner.output_dir={folder}", *given, paths=paths)
        assert result.returncode == 0, result.stderr[-3000:]
        row = read_rows(folder / "run" / "metrics.jsonl")[-1]
        rates = row["within_tolerance"], row["ema_within_tolerance"]
        tables = folder / "run" / "evaluations" / "action_errors"
        names = ("step_000000002", "ema_step_000000002")
        found[ranks] = rates, [np.loadtxt(tables / name / "errors.csv", skiprows=1, delimiter=",") for name in names]
    assert found[1][0] == found[2][0]
    assert 0 < found[1][0][0] < 1
    np.testing.assert_allclose(found[1][1], found[2][1], rtol=1e-4)
    assert found[1][1][0].shape == (2, 2)
    assert not np.array_equal(*found[1][1])
