"""Every hook: what calls it hands over and what becomes of its results. The plugin of docs/hook_examples.py is run.

A test named for each hook, an entry in docs/hooks.md and a docstring of the agreed form are required.
"""

import inspect
import signal
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pluggy
import pytest
import torch
from distributions import entry_point
from pydantic import ValidationError
from torch import nn

from rlinf_core import LeRobotDatasetConfig, PluginError, PolicyConfig, Start, TrainedParameter, UserError, hookimpl
from rlinf_core.config.load import load_config
from rlinf_core.contract import hookspecs
from rlinf_core.contract.registered import PLUGINS
from rlinf_core.plugins.calls import check_plugin, specified_hooks
from rlinf_core.plugins.owners import CORE
from rlinf_core.plugins.registry import PLUGIN_GROUP, Plugins
from rlinf_core.rollout.config import RolloutSettings
from rlinf_core.testing import plugins_in_memory
from rlinf_core.triage.chain import registered_tests

DOCS = Path(__file__).parents[2] / "docs"
OWNER = "in-memory 0 (entry point 'plugin0 = hook_examples')"


@pytest.fixture(scope="module")
def examples():
    """The example plugin as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOCS))
        import hook_examples

        yield hook_examples


@pytest.fixture(scope="module")
def plugins(examples):
    return plugins_in_memory(examples, datasets={"made-up": examples.MemoryDataset})


@pytest.fixture
def configure(plugins, tmp_path):
    """A run's config with overrides."""

    def configure(*overrides):
        path = tmp_path / "run.toml"
        path.write_text('[data]\nconfig_name = "made-up"\n[policy]\ntype = "arm"\n')
        return load_config(path, overrides, plugins)

    return configure


@pytest.fixture
def trainer(configure):
    return SimpleNamespace(run=configure("runner.name=demo", "plugins.arm.largest_loss=10"), step=3)


def plugins_of(**named):
    """Plugins by distribution; each is a mapping of hooks to functions, which get their marks here."""
    entries = []
    for distribution, functions in named.items():
        marked = {name: hookimpl(function) for name, function in functions.items()}
        entries.append(entry_point(PLUGIN_GROUP, "p", SimpleNamespace(__name__="toy", **marked), distribution))
    return Plugins(entries, strict=True)


# --- one test for each hook -------------------------------------------------------------------------------------------


def test_rlinf_register_policies(plugins, examples):
    assert plugins.policy("arm") is examples.ArmPolicy


def test_rlinf_register_augmentations(plugins, examples):
    found = plugins.find("augmentation", "dim")
    assert (found.item, str(found.owner)) == (examples.DimAugmentation, OWNER)
    assert [one.name for one in plugins.registered_as("augmentation")] == ["dim", "random_erasing"]
    images, drawn = torch.ones(1, 2, 4, 4, 3), found.item().draw(np.random.default_rng(0), ["base", "wrist"])
    dimmed = found.item().apply(images, {"factor": torch.from_numpy(drawn["factor"])[None]}, ["base", "wrist"])
    assert dimmed[0, :, 0, 0, 0].tolist() == drawn["factor"].tolist()


def test_rlinf_register_trainers(plugins, examples):
    assert plugins.trainer("counting") is examples.CountingTrainer
    assert [one.name for one in plugins.registered_as("trainer")] == ["counting", "fsdp2"]


def test_rlinf_register_optimizers(plugins, examples, configure):
    assert plugins.optimizer("descent") is examples.Descent
    assert [one.name for one in plugins.registered_as("optimizer")] == ["adamw", "descent", "muon"]
    optim = configure("optim.type=descent", "optim.lr=0.5", "optim.min_lr=0.1").optim
    assert (type(optim).optimizer_origin, optim.unused_weight_decay) == (f"Descent of {OWNER}", 0.0)
    parameter = TrainedParameter("w", nn.Parameter(torch.ones(2)))
    assert [group["lr"] for group in optim.build([parameter]).param_groups] == [0.5]


def test_rlinf_register_schedules(plugins, examples, configure):
    assert plugins.schedule("halving") is examples.Halving
    optim = configure("optim.schedule=halving", "optim.lr=0.5", "optim.halve_every=10").optim
    assert [float(optim.lr_at(torch.tensor(step))) for step in (0.0, 9.0, 10.0, 29.0)] == [0.5, 0.5, 0.25, 0.125]


def test_rlinf_register_loggers(plugins, examples):
    assert plugins.logger("sheet") is examples.SheetLogger


def test_rlinf_register_evaluators(plugins, examples, configure):
    run = configure("runner.evaluators=['reach']", "evaluators.reach.every=3", "runner.val_check_interval=1")
    [chosen] = plugins.evaluators(run)
    assert (type(chosen.config), chosen.config.every) == (examples.ReachEvaluator, 3)
    assert str(chosen) == f"evaluator 'reach', rlinf_register_evaluators of {OWNER}"


def test_rlinf_register_environments(plugins, examples):
    assert plugins.environment("table") is examples.TableConfig
    config = RolloutSettings.model_validate({"env": {"type": "table", "replan": 2}}, context={PLUGINS: plugins})
    assert config.env == examples.TableConfig(replan=2)
    with pytest.raises(ValidationError, match=r"(?s)unknown environment 'tabel'; did you mean 'table'"):
        RolloutSettings.model_validate({"env": "tabel"}, context={PLUGINS: plugins})
    environment = config.env.build(config.env.tasks()[0])
    environment.reset(Start(seed=1))
    for _ in range(200):
        seen = environment.observe()["observation.state"]
        if solved := environment.step(np.clip(20 * (seen[3:] - seen[:3]), -1, 1)).success:
            break
    assert solved


def test_rlinf_register_triage(plugins, examples):
    *core, (last, owner) = registered_tests(plugins)
    assert last is examples.TemperatureTest
    assert owner.distribution != CORE
    assert {owner.distribution for _, owner in core} == {CORE}

    class Rows(list):
        def without_images(self, indices):
            return [self[index] for index in indices]

    warm, cold = (Rows([{"temperature": degrees}] * 3) for degrees in (45.0, 20.0))
    assert last().run(SimpleNamespace(site=warm, training=warm)).verdict == "fine"
    assert "20 °C, in training 45" in last().run(SimpleNamespace(site=cold, training=warm)).sentence


def test_rlinf_register_commands(plugins):
    [rest] = [one for one in plugins.commands() if one.name == "arm-rest"]
    assert (rest.item, str(rest.owner)) == (plugins.command("arm-rest"), OWNER)
    assert rest.item.module == "acme_arm.rest"
    with pytest.raises(UserError, match="unknown command 'arm-rset'; did you mean 'arm-rest'"):
        plugins.command("arm-rset")


def test_rlinf_register_options(plugins, examples, configure):
    assert plugins.options("arm") is examples.ArmOptions
    assert configure("plugins.arm.freeze=layers.").plugin_options(examples.ArmOptions).freeze == "layers."
    assert configure().plugin_options(examples.ArmOptions) == examples.ArmOptions()
    assert configure().plugins == {}


def test_rlinf_configure(plugins, configure):
    assert plugins.hook.rlinf_configure(run=configure("policy.weights=arm.safetensors")) == []
    with pytest.raises(PluginError) as caught:
        plugins.hook.rlinf_configure(run=configure("policy.weights=random"))
    assert str(caught.value) == (
        "plugins.arm.freeze would freeze random weights: set policy.weights, or freeze nothing "
        f"[rlinf_configure of {OWNER}]"
    )
    assert type(caught.value.__cause__) is UserError


def test_rlinf_launcher_names(plugins):
    assert ["one-process"] in plugins.hook.rlinf_launcher_names()


def test_rlinf_launch(plugins, configure, examples, monkeypatch):
    commands = []
    monkeypatch.setattr(examples.subprocess, "call", lambda command: commands.append(command) or 7)
    run = configure("cluster.launcher=one-process")
    assert plugins.hook.rlinf_launch(run=run, arguments=["run.toml", "seed=3"]) == 7
    assert commands == [[sys.executable, "-m", "rlinf_core.train", "run.toml", "seed=3"]]
    assert plugins.hook.rlinf_launch(run=configure("cluster.launcher=ray"), arguments=["run.toml"]) is None


def test_rlinf_describe_launch(plugins, configure):
    run = configure("cluster.launcher=one-process")
    text = plugins.hook.rlinf_describe_launch(run=run, arguments=["my run.toml", "seed=3"])
    assert text == f"{sys.executable} -m rlinf_core.train 'my run.toml' seed=3"
    assert plugins.hook.rlinf_describe_launch(run=configure("cluster.launcher=ray"), arguments=["run.toml"]) is None


def test_rlinf_open_dataset(plugins, configure):
    run = configure("data.rows=5")
    rows = plugins.hook.rlinf_open_dataset(dataset=run.data, policy=run.policy, split="train")
    assert (len(rows), rows.describe(4)) == (5, "synthetic row 4")
    nobody = PolicyConfig(type="arm")
    # Core's own reader answers last, and its errors stay as they are: the folder is the user's mistake, not a plugin's.
    with pytest.raises(UserError) as caught:
        plugins.hook.rlinf_open_dataset(
            dataset=LeRobotDatasetConfig(repo_id="/nowhere"), policy=nobody, split="validation"
        )
    assert type(caught.value) is UserError
    assert "rlinf_open_dataset" not in str(caught.value)


def test_rlinf_policy_built(plugins, configure):
    with torch.device("meta"):
        policy = nn.ModuleDict({"vision": nn.Linear(2, 2), "leave": nn.Linear(2, 2)})
    plugins.hook.rlinf_policy_built(policy=policy, run=configure())
    assert [name for name, parameter in policy.named_parameters() if parameter.requires_grad] == [
        "leave.weight",
        "leave.bias",
    ]


def test_rlinf_train_started(plugins, trainer, capsys):
    assert plugins.hook.rlinf_train_started(trainer=trainer) == []
    assert capsys.readouterr().out.startswith("demo trains on ")


def test_rlinf_gradients_ready(plugins, trainer):
    policy = nn.ModuleDict({"arm": nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)]), "leave": nn.Linear(2, 1)})
    policy["leave"].requires_grad_(False)
    first, second = policy["arm"]
    (first(torch.tensor([3.0, 4.0])) + 0 * second.weight.sum()).sum().backward()
    [norms] = plugins.hook.rlinf_gradients_ready(trainer=trainer, policy=policy, step=4, scale=torch.tensor(0.5))
    assert {name: float(norm) for name, norm in norms.items()} == {
        "grad_norm/arm.0": pytest.approx(26**0.5 / 2),  # 3, 4 and the bias's 1
        "grad_norm/arm.1": 0.0,
    }


def test_rlinf_step_metrics(plugins, trainer):
    [added] = plugins.hook.rlinf_step_metrics(trainer=trainer, step=4, metrics={"loss": 9.0})
    assert added["arm/host_load"] >= 0


def test_rlinf_step_finished(plugins, trainer, examples, monkeypatch, capsys):
    signals = []
    monkeypatch.setattr(examples.signal, "raise_signal", signals.append)
    plugins.hook.rlinf_step_finished(trainer=trainer, step=4, metrics={"loss": 9.0})
    assert signals == []
    plugins.hook.rlinf_step_finished(trainer=trainer, step=5, metrics={"loss": 11.0})
    assert signals == [signal.SIGTERM]
    assert capsys.readouterr().out == "the run has diverged: its loss is 11 after step 5\n"


def test_rlinf_validation_finished(plugins, trainer, capsys):
    plugins.hook.rlinf_validation_finished(trainer=trainer, step=4, metrics={"val_loss": 0.5})
    assert capsys.readouterr().out == "held-out loss after step 4: 0.5000\n"


def test_rlinf_checkpoint_saved(plugins, trainer, capsys):
    plugins.hook.rlinf_checkpoint_saved(trainer=trainer, step=4, path=Path("checkpoints/step_000000004"))
    assert capsys.readouterr().out == "to be uploaded: checkpoints/step_000000004, of step 4\n"


def test_rlinf_train_finished(plugins, trainer, capsys):
    plugins.hook.rlinf_train_finished(trainer=trainer, error=None)
    plugins.hook.rlinf_train_finished(trainer=trainer, error=KeyboardInterrupt("stopped by SIGINT"))
    assert capsys.readouterr().out.splitlines() == [
        "demo ended after step 3: done",
        "demo ended after step 3: stopped by SIGINT",
    ]


# --- calling ----------------------------------------------------------------------------------------------------------


def test_implementations_run_last_registered_first_unless_they_say_otherwise():
    calls = []

    def note(name):
        return lambda: calls.append(name) or name

    named = {name: {"rlinf_configure": note(name)} for name in "abcd"}
    entries = []
    for name, functions in named.items():
        options = {"b": {"tryfirst": True}, "c": {"trylast": True}}.get(name, {})
        marked = hookimpl(**options)(functions["rlinf_configure"])
        entries.append(entry_point(PLUGIN_GROUP, "p", SimpleNamespace(__name__="toy", rlinf_configure=marked), name))
    assert Plugins(entries).hook.rlinf_configure(run=None) == ["b", "d", "a", "c"]
    assert calls == ["b", "d", "a", "c"]


def test_the_first_result_ends_a_call():
    plugins = plugins_of(
        first={"rlinf_launch": lambda: 1}, second={"rlinf_launch": lambda: 0}, third={"rlinf_launch": lambda: None}
    )
    assert plugins.hook.rlinf_launch(run=None, arguments=[]) == 0


def test_defects_keep_their_type_and_name_the_plugin():
    def fail(run):
        raise KeyError("arm")

    with pytest.raises(KeyError) as caught:
        plugins_of(acme={"rlinf_configure": fail}).hook.rlinf_configure(run=None)
    assert caught.value.__notes__ == ["in rlinf_configure of acme 1.0 (entry point 'p = toy:toy')"]
    assert caught.traceback[-1].name == "fail"


def test_cores_own_errors_stay_as_they_are():
    def refuse(run):
        raise UserError("no such file")

    with pytest.raises(UserError) as caught:
        plugins_of(**{CORE: {"rlinf_configure": refuse}}).hook.rlinf_configure(run=None)
    assert (type(caught.value), str(caught.value)) == (UserError, "no such file")


def test_calls_are_checked():
    plugins = plugins_of(acme={"rlinf_configure": lambda run: None})
    with pytest.raises(TypeError, match="rlinf_configure has no argument 'config'; it has: run"):
        plugins.hook.rlinf_configure(run=None, config=None)
    with (
        pytest.warns(UserWarning, match="'run'"),  # pluggy's own.
        pytest.raises(TypeError, match=r"rlinf_configure was called without 'run', which acme 1\.0 .* needs"),
    ):
        plugins.hook.rlinf_configure()
    with pytest.raises(AttributeError) as caught:
        plugins.hook.rlinf_configur(run=None)
    assert "Did you mean: 'rlinf_configure'" in "".join(traceback.format_exception(caught.value))


def test_an_implementation_can_be_called_alone():
    class Acme:  # An object: its hooks are bound methods.
        @hookimpl
        def rlinf_configure(self, run):
            return f"{run} of acme"

        @hookimpl(specname="rlinf_launch")
        def start(self, run):
            raise UserError("no such machine")

    quiet = SimpleNamespace(__name__="toy", rlinf_configure=hookimpl(lambda: None))
    entries = [entry_point(PLUGIN_GROUP, "p", one, name) for name, one in (("acme", Acme()), ("quiet", quiet))]
    plugins = Plugins(entries, strict=True)
    assert plugins.hook.rlinf_configure(run="run") == ["run of acme"]
    alone = plugins.implementations("rlinf_configure")
    assert [(one.owner.distribution, one.call(run="run")) for one in alone] == [
        ("quiet", None),
        ("acme", "run of acme"),
    ]
    [launch] = plugins.implementations("rlinf_launch")
    assert str(launch).startswith("rlinf_launch of acme 1.0")
    with pytest.raises(PluginError, match=r"no such machine \[rlinf_launch of acme 1\.0"):
        launch.call(run=None, arguments=[])
    assert plugins.implementations("rlinf_train_finished") == []


def test_a_registration_that_refuses_names_its_owner_once():
    def refuse():
        raise UserError("no arm is connected")

    entry = entry_point(PLUGIN_GROUP, "p", SimpleNamespace(rlinf_register_policies=hookimpl(refuse)), "acme")
    plugins = Plugins([entry])
    assert plugins.registered_as("policy") == ()
    assert [str(one) for one in plugins.failures] == [
        "acme 1.0 (entry point 'p = toy:p'): calling rlinf_register_policies: no arm is connected"
    ]


# --- what is refused --------------------------------------------------------------------------------------------------


async def awaited(run): ...


def yielding(run):
    yield


@pytest.mark.parametrize(
    ("name", "function", "options", "complaint"),
    [
        ("rlinf_configur", lambda run: None, {}, "there is no hook 'rlinf_configur'; did you mean 'rlinf_configure'?"),
        (
            "rlinf_step_finished",
            lambda trayner, step: None,
            {},
            "rlinf_step_finished has no argument 'trayner' (its arguments are trainer, step, metrics); "
            "did you mean 'trainer'?",
        ),
        (
            "rlinf_register_policies",
            lambda run: None,
            {},
            "rlinf_register_policies has no argument 'run' (it takes none)",
        ),
        (
            "rlinf_configure",
            lambda run=None: None,
            {},
            "rlinf_configure gives its argument 'run' a default, which would always be used: remove it",
        ),
        (
            "rlinf_configure",
            lambda **rest: None,
            {},
            "rlinf_configure takes **rest, which is never passed: name the arguments it needs (its arguments are run)",
        ),
        ("rlinf_configure", awaited, {}, "rlinf_configure is async: hooks are called, not awaited"),
        ("rlinf_configure", yielding, {}, "rlinf_configure contains yield: its body would never run"),
        *(
            (
                "rlinf_configure",
                yielding,
                {kind: True},
                "rlinf_configure is a hook wrapper, which rlinf does not support: use a plain implementation",
            )
            for kind in ("wrapper", "hookwrapper")
        ),
    ],
)
def test_implementations_that_would_be_misunderstood_are_refused(name, function, options, complaint):
    def copy():  # A mark stays on the function.
        return type(function)(function.__code__, function.__globals__, name, function.__defaults__)

    plugin = SimpleNamespace(__name__="toy", **{name: hookimpl(**options)(copy())})
    with pytest.raises(PluginError) as caught:
        check_plugin(pluggy.PluginManager(hookspecs.PROJECT), plugin)
    assert str(caught.value) == complaint


def test_hooks_of_a_later_release_may_be_optional():
    plugin = SimpleNamespace(
        rlinf_configure=hookimpl(lambda: None), rlinf_not_yet=hookimpl(optionalhook=True)(lambda anything: None)
    )
    check_plugin(pluggy.PluginManager(hookspecs.PROJECT), plugin)


def test_registrations_may_be_generators():
    class Arm(PolicyConfig):
        type: Literal["arm"]

    def register():
        yield Arm

    assert plugins_of(acme={"rlinf_register_policies": register}).policy("arm") is Arm


# --- documentation ----------------------------------------------------------------------------------------------------


def test_the_page_is_what_the_sources_say(examples):
    import render_hooks  # beside the examples

    assert render_hooks.PAGE.read_text(encoding="utf-8") == render_hooks.render(), "run docs/render_hooks.py"


@pytest.mark.parametrize("name", specified_hooks())
def test_every_hook_has_a_test_an_entry_and_a_docstring_of_the_agreed_form(name):
    assert callable(globals().get(f"test_{name}")), "a test must be named for the hook"
    assert f"\n## {name}\n" in (DOCS / "hooks.md").read_text(encoding="utf-8")
    spec = specified_hooks()[name]
    doc = inspect.getdoc(spec)
    first, *_, last = doc.split("\n\n")
    assert first[0].isupper()
    assert last.startswith("Called on: ")
    assert last.endswith("Since 0.1.")
    documented = [line.split(":")[0].strip() for line in doc.splitlines() if line.startswith("    ") and ": " in line]
    assert set(inspect.signature(spec).parameters) <= set(documented)
    assert ("The first result counts." in " ".join(doc.split())) == spec.rlinf_spec["firstresult"]
    assert ("results are collected" in " ".join(doc.split())) == name.startswith("rlinf_register_")


def test_the_example_plugin_implements_every_hook(examples):
    assert [name for name in specified_hooks() if not hasattr(examples, name)] == []
