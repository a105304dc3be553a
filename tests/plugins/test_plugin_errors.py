"""What users read of broken plugins, word for word: packages are installed into a folder and go wrong in every way."""

import json
import sys
from importlib import metadata

import pytest
from distributions import install

from rlinf_core import PluginError, UserError, cli
from rlinf_core.config.load import dump_config, load_config
from rlinf_core.plugins.observers import Observer
from rlinf_core.plugins.registry import Plugins
from rlinf_core.process.ending import Ending

SOUND = """
    from typing import Literal
    from pydantic import BaseModel
    from rlinf_core import Command, DatasetConfig, PolicyConfig, hookimpl

    class Arm(PolicyConfig):
        type: Literal["arm"]

    class Pick(DatasetConfig):
        run_defaults = {"policy": {"type": "arm"}}

    class Options(BaseModel):
        model_config = {"frozen": True, "extra": "forbid"}
        speed: float = 1.0

    @hookimpl
    def rlinf_register_policies():
        return [Arm]

    @hookimpl
    def rlinf_register_options():
        return {"toy": Options}

    @hookimpl
    def rlinf_register_commands():
        return [Command("rest", "rest the arm", "acme_rest")]
"""


def broken(*body, hook="rlinf_register_policies", arguments=""):
    """A module with one hook implementation."""
    lines = ["from rlinf_core import *", "@hookimpl", f"def {hook}({arguments}):", *(f"    {line}" for line in body)]
    return "\n".join(lines)


def installed(site, **options):
    """The plugins of the site folder alone, whatever the environment has."""
    found = metadata.distributions(path=[str(site)])
    return Plugins([entry for distribution in found for entry in distribution.entry_points], **options)


@pytest.fixture
def sound(site):
    install(site, "acme-arm", plugins={"arm": "acme_arm"}, datasets={"arm_pick": "acme_arm:Pick"}, acme_arm=SOUND)
    return site


FAILURES = {
    "missing dependency": (
        "import robot_driver",
        "loading the plugin: No module named 'robot_driver', and broken needs it: pip install robot_driver "
        "(or the package that provides this module)",
    ),
    "missing part of a package": (
        "import email.robots",
        "loading the plugin: No module named 'email.robots' in the installed 'email', and broken needs it: "
        "install the version of 'email' that it requires",
    ),
    "missing name": (
        "from email import robots",
        "loading the plugin: ImportError: cannot import name 'robots' from 'email' ({email})",
    ),
    "syntax": ("def f(:", "loading the plugin: SyntaxError: invalid syntax (broken_plugin.py, line 1)"),
    "misspelt hook": (
        broken("pass", hook="rlinf_step_finish", arguments="step"),
        "loading the plugin: there is no hook 'rlinf_step_finish'; did you mean 'rlinf_step_finished' or "
        "'rlinf_train_finished' or 'rlinf_step_metrics'?",
    ),
    "wrong argument": (
        broken("pass", hook="rlinf_step_finished", arguments="trainer, metric"),
        "loading the plugin: rlinf_step_finished has no argument 'metric' (its arguments are trainer, step, metrics); "
        "did you mean 'metrics'?",
    ),
    "unmarked hook": (
        "def rlinf_configure(run):\n    pass",
        "loading the plugin: rlinf_configure is named like a hook but is not marked with @hookimpl",
    ),
    "no hook": ("answer = 42", "loading the plugin: broken_plugin implements no hook: mark functions with @hookimpl"),
    "wrapper": (
        "from rlinf_core import hookimpl\n@hookimpl(wrapper=True)\ndef rlinf_configure(run):\n    yield",
        "loading the plugin: rlinf_configure is a hook wrapper, which rlinf does not support: "
        "use a plain implementation",
    ),
    "raising registration": (
        broken("raise RuntimeError('the arm is switched off')"),
        "calling rlinf_register_policies: RuntimeError: the arm is switched off",
    ),
    "registration with a missing dependency": (
        broken("import robot_driver"),
        "calling rlinf_register_policies: No module named 'robot_driver', and broken needs it: "
        "pip install robot_driver (or the package that provides this module)",
    ),
    "registration without a result": (
        broken("pass"),
        "calling rlinf_register_policies: TypeError: 'NoneType' object is not iterable",
    ),
    "malformed class": (
        broken("return ['pi0']"),
        "using what rlinf_register_policies returned: expected a subclass of PolicyConfig, found 'pi0'",
    ),
    "nameless class": (
        broken("class Arm(PolicyConfig):", "    type: str = 'arm'", "return [Arm]"),
        "using what rlinf_register_policies returned: rlinf_register_policies.<locals>.Arm must declare its name as "
        'the one value of `type: Literal["name"]`',
    ),
    "malformed command": (
        broken("return ['rest']", hook="rlinf_register_commands"),
        "using what rlinf_register_commands returned: expected a Command, found 'rest'",
    ),
    "malformed command name": (
        broken("return [Command('Go home', 'go', 'home')]", hook="rlinf_register_commands"),
        "using what rlinf_register_commands returned: a command's name has lower-case letters, digits and hyphens "
        "only, not 'Go home'",
    ),
    "malformed options": (
        broken("return [PolicyConfig]", hook="rlinf_register_options"),
        "calling rlinf_register_options: expected a mapping of names to classes, "
        "found [<class 'rlinf_core.contract.policy.PolicyConfig'>]",
    ),
    "options that are no model": (
        broken("return {'toy': dict}", hook="rlinf_register_options"),
        "using what rlinf_register_options returned: expected a pydantic class for the table 'toy', "
        "found <class 'dict'>",
    ),
    "options that ignore keys": (
        broken(
            "from pydantic import BaseModel",
            "class Toy(BaseModel): pass",
            "return {'toy': Toy}",
            hook="rlinf_register_options",
        ),
        "using what rlinf_register_options returned: options class rlinf_register_options.<locals>.Toy must be a "
        "pydantic model that forbids extra keys",
    ),
    "options without a default": (
        broken("return {'toy': PolicyConfig}", hook="rlinf_register_options"),
        "using what rlinf_register_options returned: field 'type' of PolicyConfig has no default",
    ),
    "one class for two tables": (
        broken("return {'a': DatasetConfig, 'b': DatasetConfig}", hook="rlinf_register_options"),
        "using what rlinf_register_options returned: DatasetConfig is used for two tables, 'a' and 'b': derive a class",
    ),
}


@pytest.mark.parametrize(("source", "failure"), FAILURES.values(), ids=FAILURES)
def test_a_broken_plugin_says_what_is_wrong_and_disturbs_nobody(sound, source, failure):
    install(sound, "broken", plugins={"b": "broken_plugin"}, broken_plugin=source)
    plugins = installed(sound)
    assert plugins.policy("arm").__name__ == "Arm"
    assert plugins.options("toy").__name__ == "Options"
    assert plugins.command("rest").module == "acme_rest"
    import email

    expected = failure.replace("{email}", email.__file__)
    assert [str(one) for one in plugins.failures] == [f"broken 1.0 (entry point 'b = broken_plugin'): {expected}"]


@pytest.mark.parametrize(
    ("entry_point", "cause"),
    [
        ("nowhere", "No module named 'nowhere': reinstall broken, or correct its entry point"),
        ("acme_arm:plugin", "AttributeError: module 'acme_arm' has no attribute 'plugin'"),
        ("acme_arm", "this plugin is loaded already, for acme-arm 1.0 (entry point 'arm = acme_arm')"),
    ],
)
def test_wrong_entry_points_are_explained(sound, entry_point, cause):
    install(sound, "broken", plugins={"b": entry_point})
    [failure] = installed(sound).failures
    assert str(failure) == f"broken 1.0 (entry point 'b = {entry_point}'): loading the plugin: {cause}"


def test_unknown_names_come_with_the_failures_that_may_be_why(sound):
    install(sound, "broken", plugins={"b": "broken_plugin"}, broken_plugin="import robot_driver")
    install(sound, "raising", plugins={"r": "raising_plugin"}, raising_plugin=broken("raise OSError('no bus')"))
    install(sound, "other", plugins={"o": "other"}, other=broken("return [3]", hook="rlinf_register_commands"))
    plugins = installed(sound)
    assert len(plugins.registered) == 3  # All kinds were asked for, so that all failures are known.
    with pytest.raises(UserError) as caught:
        plugins.policy("amr")
    assert str(caught.value) == (
        "unknown policy 'amr'; did you mean 'arm'?\n"
        "  available: arm\n"
        "  failed: broken 1.0 (entry point 'b = broken_plugin'): loading the plugin: No module named 'robot_driver', "
        "and broken needs it: pip install robot_driver (or the package that provides this module)\n"
        "  failed: raising 1.0 (entry point 'r = raising_plugin'): calling rlinf_register_policies: OSError: no bus"
    )


def test_an_exit_at_import_leaves_that_plugin_out(sound):
    install(sound, "leaving", plugins={"l": "leaving"}, datasets={"l": "leaving:L"}, leaving="import sys\nsys.exit(0)")
    registering = broken("raise SystemExit", hook="rlinf_register_commands")
    install(sound, "registering", plugins={"r": "registering"}, registering=registering)
    plugins = installed(sound)
    assert [one.name for one in plugins.commands()] == ["rest"]
    assert list(map(str, plugins.failures)) == [
        "leaving 1.0 (entry point 'l = leaving'): loading the plugin: "
        "it called sys.exit(0) instead of raising an error",
        "registering 1.0 (entry point 'r = registering'): calling rlinf_register_commands: "
        "it called sys.exit() instead of raising an error",
    ]
    with pytest.raises(PluginError, match=r"dataset 'l' of leaving 1.0 .* it called sys.exit\(0\) instead"):
        plugins.dataset("l")


def test_an_exit_in_a_hook_is_that_plugins_error(sound, tmp_path, capsys):
    for hook, argument in (("rlinf_configure", "run"), ("rlinf_step_finished", "step")):
        source = broken("raise SystemExit(0)", hook=hook, arguments=argument)
        install(sound, f"leaving-{argument}", plugins={"l": f"leaving_{argument}"}, **{f"leaving_{argument}": source})
    plugins = installed(sound)
    with pytest.raises(PluginError) as caught:
        plugins.hook.rlinf_configure(run=None)
    assert str(caught.value) == (
        "it called sys.exit(0) instead of raising an error "
        "[rlinf_configure of leaving-run 1.0 (entry point 'l = leaving_run')]"
    )
    [step] = plugins.implementations("rlinf_step_finished")
    observer = Observer(str(step), tmp_path)
    observer.attempt(lambda: step.call(trainer=None, step=1, metrics={}))
    assert observer.left_out
    assert "leaving-step 1.0 (entry point 'l = leaving_step') failed and is left out" in capsys.readouterr().err


def test_ctrl_c_in_a_plugin_stays_ctrl_c(sound):
    source = broken("raise KeyboardInterrupt", hook="rlinf_configure", arguments="run")
    install(sound, "stopped", plugins={"s": "stopped"}, stopped=source)
    with pytest.raises(KeyboardInterrupt):
        installed(sound).hook.rlinf_configure(run=None)


def test_a_run_never_ends_well_because_its_code_exits(tmp_path, monkeypatch, own_signals):
    """In code that is no hook, such as a policy's."""
    monkeypatch.setattr("rlinf_core.process.ending.SIGNALS_APART", 0.0)

    def main(ending):
        ending.belongs_to(tmp_path, 3)
        raise SystemExit(0)

    with pytest.raises(RuntimeError, match=r"sys.exit\(0\) instead of raising an error"):
        Ending().follow(main)
    end = json.loads((tmp_path / "exit.json").read_text())
    assert (end["code"], end["reason"], end["step"]) == (1, "defect", 3)


def test_a_command_never_ends_well_because_other_code_exits(monkeypatch):
    monkeypatch.setattr("rlinf_core.commands.validate.run", lambda _: sys.exit())
    with pytest.raises(RuntimeError, match=r"sys.exit instead of raising an error"):
        cli.main(["validate", "run.toml"])


def test_unknown_names_say_what_was_left_out(sound):
    with pytest.raises(UserError) as caught:
        installed(sound, disabled=["acme-arm"]).dataset("arm_pick")
    assert str(caught.value) == (
        "unknown dataset 'arm_pick'\n  no installed plugin provides one\n  disabled by RLINF_DISABLE_PLUGINS: acme-arm"
    )


@pytest.mark.parametrize(
    ("noun", "look_up", "name"),
    [
        ("policy", Plugins.policy, "arm"),
        ("plugin table", Plugins.options, "toy"),
        ("command", Plugins.command, "rest"),
    ],
)
def test_one_name_from_two_plugins_names_both(sound, noun, look_up, name):
    install(sound, "bmce-arm", plugins={"arm": "bmce_arm"}, bmce_arm=SOUND)
    with pytest.raises(PluginError) as caught:
        look_up(installed(sound), name)
    assert str(caught.value) == (
        f"{noun} '{name}' is registered by acme-arm 1.0 (entry point 'arm = acme_arm') "
        "and by bmce-arm 1.0 (entry point 'arm = bmce_arm'). "
        "Uninstall one, or disable it: RLINF_DISABLE_PLUGINS=bmce-arm"
    )


def test_one_dataset_name_from_two_distributions_names_both(sound):
    install(sound, "bmce-arm", datasets={"arm_pick": "bmce_arm:Pick"}, bmce_arm=SOUND)
    with pytest.raises(PluginError) as caught:
        installed(sound).dataset("arm_pick")
    assert str(caught.value) == (
        "dataset 'arm_pick' is offered by acme-arm 1.0 (entry point 'arm_pick = acme_arm:Pick') "
        "and by bmce-arm 1.0 (entry point 'arm_pick = bmce_arm:Pick'). "
        'Choose one: config_name = "acme-arm:arm_pick" or config_name = "bmce-arm:arm_pick"'
    )


def test_only_the_registrations_that_are_asked_for_are_called(sound):
    install(sound, "raising", plugins={"r": "raising_plugin"}, raising_plugin=broken("raise OSError('no bus')"))
    plugins = installed(sound)
    assert [one.name for one in plugins.commands()] == ["rest"]
    assert plugins.failures == ()


# --- in a config ------------------------------------------------------------------------------------------------------


@pytest.fixture
def load(sound, tmp_path):
    """Load a config of the sound plugin, with the plugins of the environment and whatever else the site folder has."""

    def load(text="", *overrides):
        path = tmp_path / "run.toml"
        path.write_text(f'[data]\nconfig_name = "arm_pick"\n{text}')
        return load_config(path, overrides, Plugins.load())

    return load


def test_an_unrelated_broken_plugin_does_not_stop_a_run(sound, load):
    for i, (source, _) in enumerate(FAILURES.values()):
        install(sound, f"broken-{i}", plugins={"b": f"broken_{i}"}, **{f"broken_{i}": source})
    run = load("[plugins.toy]\nspeed = 2")
    assert (run.policy.type, run.plugins["toy"].speed) == ("arm", 2.0)


def test_strict_mode_raises_the_failure(sound, monkeypatch):
    install(sound, "broken", plugins={"b": "broken_plugin"}, broken_plugin="import robot_driver")
    monkeypatch.setenv("RLINF_STRICT_PLUGINS", "1")
    with pytest.raises(PluginError) as caught:
        Plugins.load().policy("arm")
    assert str(caught.value) == (
        "broken 1.0 (entry point 'b = broken_plugin'): loading the plugin: No module named 'robot_driver', "
        "and broken needs it: pip install robot_driver (or the package that provides this module)"
    )


def test_plugin_tables_survive_being_written_and_read(load, tmp_path):
    run = load("[plugins.toy]\nspeed = 2", "plugins.toy.speed=3")
    assert run.plugin_options(type(run.plugins["toy"])).speed == 3.0
    (tmp_path / "again.toml").write_text(dump_config(run))
    assert load_config(tmp_path / "again.toml", [], Plugins.load()) == run
    assert load() == load_config(tmp_path / "run.toml", [], Plugins.load())


def mistakes(load, *arguments):
    with pytest.raises(UserError) as caught:
        load(*arguments)
    file, _, rest = str(caught.value).partition(": ")
    return rest.replace(file, "run.toml")


def test_mistakes_in_plugin_tables_are_reported_with_all_others(load):
    assert mistakes(
        load,
        "[optim]\nlearning_rte = 1\n[plugins.toy]\nspee = 3\n[plugins.tyo]\nspeed = 3",
        "plugins.toy.speed=fast",
    ) == (
        "4 mistakes in the config:\n"
        "  plugins.tyo: unknown plugin table 'tyo'; did you mean 'toy'? [run.toml]\n"
        "    available: toy\n"
        "  optim.learning_rte: unknown key [run.toml]\n"
        "  plugins.toy.speed: Input should be a valid number, unable to parse string as a number (got 'fast') "
        "[command line; table of acme-arm 1.0]\n"
        "  plugins.toy.spee: unknown key; did you mean 'speed'? [run.toml; table of acme-arm 1.0]"
    )


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("[plugins]\ntoy = 3", "plugins.toy: Input should be a valid dictionary or instance of Options (got 3)"),
        ("plugins.toy = 3", "data.plugins: unknown key"),
    ],
)
def test_plugin_tables_are_tables(load, text, mistake):
    assert mistake in mistakes(load, text)


def test_plugins_is_a_table(load):
    assert mistakes(load, "", "plugins=3") == (
        "1 mistake in the config:\n  plugins: must have one table per plugin, [plugins.<name>] (got 3) [command line]"
    )


VALIDATOR = """
    from typing import Literal
    from pydantic import BaseModel, model_validator
    from rlinf_core import DatasetConfig, PolicyConfig, UserError, hookimpl

    class Options(BaseModel):
        model_config = {{"extra": "forbid"}}

        @model_validator(mode="after")
        def check(self):
            raise {error}

    @hookimpl
    def rlinf_register_options():
        return {{"bus": Options}}
"""


def test_an_exit_of_a_plugins_validator_names_the_plugin(sound, load):
    install(sound, "acme-bus", plugins={"bus": "acme_bus"}, acme_bus=VALIDATOR.format(error="SystemExit(0)"))
    with pytest.raises(PluginError, match=r"sys.exit\(0\) .* \[while Options of acme-bus 1.0 .* \[plugins.bus\]\]"):
        load("[plugins.bus]")


@pytest.mark.parametrize("error", ["ValueError('the bus is too slow')", "UserError('the bus is too slow')"])
def test_what_a_plugins_validator_refuses_is_a_mistake(sound, load, error):
    install(sound, "acme-bus", plugins={"bus": "acme_bus"}, acme_bus=VALIDATOR.format(error=error))
    assert mistakes(load, "[plugins.bus]") == (
        "1 mistake in the config:\n  plugins.bus: the bus is too slow [run.toml; table of acme-bus 1.0]"
    )


def test_a_defect_of_a_plugins_validator_names_the_plugin(sound, load):
    install(sound, "acme-bus", plugins={"bus": "acme_bus"}, acme_bus=VALIDATOR.format(error="KeyError('speed')"))
    with pytest.raises(KeyError) as caught:
        load("[plugins.bus]")
    assert caught.value.__notes__ == [
        "while Options of acme-bus 1.0 (entry point 'bus = acme_bus') validated [plugins.bus]"
    ]


def test_a_defect_of_a_dataset_class_names_its_distribution(sound, load):
    source = VALIDATOR.format(error="KeyError('speed')").replace("BaseModel)", "DatasetConfig)")
    install(sound, "acme-bus", datasets={"bus": "acme_bus:Options"}, acme_bus=source)
    with pytest.raises(KeyError) as caught:
        load("", "data.config_name=bus", "policy.type=arm")
    assert caught.value.__notes__ == [
        "while Options of acme-bus 1.0 (entry point 'bus = acme_bus:Options') validated [data]"
    ]
