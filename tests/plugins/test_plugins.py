"""How plugins are found, what they may offer, and what is kept of those that fail."""

import sys
from types import SimpleNamespace

import pytest
from distributions import entry_point, entry_points_of, install

from rlinf_core import DatasetConfig, PluginError, UserError
from rlinf_core.cli import COMMANDS
from rlinf_core.plugins.registry import DATASET_GROUP, PLUGIN_GROUP, Plugins

POLICY = """
    from typing import Literal
    from rlinf_core import PolicyConfig, hookimpl

    class {cls}(PolicyConfig):
        type: Literal["{type}"]

    @hookimpl
    def rlinf_register_policies():
        return [{cls}]
"""
DATASET = """
    from rlinf_core import DatasetConfig

    class Data(DatasetConfig):
        pass
"""


def plugin(*, register=None, **functions):
    """A plugin in memory: `register` becomes `rlinf_register_policies`, other functions keep their names."""
    from rlinf_core import hookimpl

    if register:

        def rlinf_register_policies():
            return register()

        functions["rlinf_register_policies"] = rlinf_register_policies
    return SimpleNamespace(__name__="toy", **{name: hookimpl(function) for name, function in functions.items()})


def plugins_of(*modules, **options):
    entries = [entry_point(PLUGIN_GROUP, f"p{i}", module, f"toy-{i}") for i, module in enumerate(modules)]
    return Plugins(entries, **options)


def test_installed_distributions_are_found(site):
    install(site, "acme-arm", plugins={"arm": "acme_arm"}, acme_arm=POLICY.format(cls="Arm", type="arm"), version="1.2")
    plugins = Plugins.load()
    assert plugins.policy("arm").__name__ == "Arm"
    [arm] = [one for one in plugins.registered if one.name == "arm"]
    assert arm.kind == "policy"
    assert str(arm.owner) == "acme-arm 1.2 (entry point 'arm = acme_arm')"


def test_core_brings_its_trainer_loggers_and_commands():
    plugins = Plugins(entry_points_of("rlinf_core"))
    assert plugins.failures == ()
    assert plugins.trainer("fsdp2").__name__ == "Fsdp2TrainerConfig"
    assert {plugins.logger("console")(type="console").type, plugins.logger("jsonl")(type="jsonl").type} == {
        "console",
        "jsonl",
    }
    assert sorted(one.item.name for one in plugins.commands()) == sorted(one.name for one in COMMANDS)


def test_a_plugin_that_fails_costs_only_itself(site):
    install(site, "broken", plugins={"b": "acme_broken"}, acme_broken="import a_module_that_nobody_has")
    install(site, "raising", plugins={"r": "acme_raising"}, acme_raising="def f(:")
    install(site, "sound", plugins={"s": "acme_sound"}, acme_sound=POLICY.format(cls="Sound", type="sound"))
    plugins = Plugins.load()
    assert plugins.policy("sound").__name__ == "Sound"
    kept = {failure.owner.distribution: failure for failure in plugins.failures}
    assert isinstance(kept["broken"].cause, ModuleNotFoundError)
    assert isinstance(kept["raising"].cause, SyntaxError)
    assert "sound" not in kept
    assert "broken" not in {owner.distribution for owner in plugins.owners}


def test_unknown_names_come_with_near_names_and_failures(site):
    install(site, "sound", plugins={"s": "acme_sound"}, acme_sound=POLICY.format(cls="Sound", type="sound"))
    install(site, "broken", plugins={"b": "acme_broken"}, acme_broken="import a_module_that_nobody_has")
    with pytest.raises(UserError) as caught:
        Plugins.load().policy("sond")
    message = str(caught.value)
    assert "unknown policy 'sond'; did you mean 'sound'?" in message
    assert "broken 1.0 (entry point 'b = acme_broken')" in message
    assert "No module named 'a_module_that_nobody_has', and broken needs it: pip install" in message


def test_nothing_installed_says_what_to_install():
    with pytest.raises(UserError, match="not even rlinf-core's own: install rlinf-core"):
        Plugins().trainer("fsdp2")


def test_a_registration_that_raises_does_not_lose_the_others():
    def refuse():
        raise RuntimeError("no robot here")

    plugins = plugins_of(plugin(register=refuse), plugin(register=lambda: [_policy("b")]))
    assert plugins.policy("b")
    [failure] = plugins.failures
    assert (failure.owner.distribution, str(failure.cause)) == ("toy-0", "no robot here")
    assert "rlinf_register_policies" in str(failure)


@pytest.mark.parametrize(
    ("offered", "complaint"),
    [
        (DatasetConfig, "expected a subclass of PolicyConfig"),
        ("pi05", "expected a subclass of PolicyConfig, found 'pi05'"),
        ("unnamed", "must declare its name"),
    ],
)
def test_malformed_registrations_are_kept_and_the_rest_is_used(offered, complaint):
    offered = _policy(None) if offered == "unnamed" else offered
    plugins = plugins_of(plugin(register=lambda: [offered, _policy("good")]))
    assert plugins.policy("good")
    [failure] = plugins.failures
    assert isinstance(failure.cause, PluginError)
    assert complaint in str(failure)


def test_a_registration_without_a_result_is_kept():
    plugins = plugins_of(plugin(register=lambda: None))
    assert plugins.registered_as("policy") == ()
    [failure] = plugins.failures
    assert "rlinf_register_policies" in str(failure)
    assert isinstance(failure.cause, TypeError)


def test_one_type_twice_names_both_owners_when_it_is_used():
    plugins = plugins_of(
        plugin(register=lambda: [_policy("twin")]), plugin(register=lambda: [_policy("twin"), _policy("other")])
    )
    assert plugins.policy("other")
    assert plugins.failures == ()
    with pytest.raises(PluginError, match=r"'twin' is registered by toy-0 1\.0 .* and by toy-1 1\.0 .*DISABLE_PLUGINS"):
        plugins.policy("twin")


def test_misspelt_hooks_are_refused():
    [failure] = plugins_of(plugin(rlinf_configur=lambda run: None)).failures
    assert "there is no hook 'rlinf_configur'; did you mean 'rlinf_configure'" in str(failure)


def test_wrong_arguments_are_refused_and_leave_nothing_behind():
    calls = []
    bad = plugin(rlinf_configure=lambda run: calls.append("bad"), rlinf_train_started=lambda trayner: None)
    plugins = plugins_of(bad, plugin(rlinf_configure=lambda run: calls.append(run)))
    plugins.hook.rlinf_configure(run="run")
    assert calls == ["run"]
    [failure] = plugins.failures
    assert failure.owner.distribution == "toy-0"
    assert "trayner" in str(failure)


def test_hooks_without_a_mark_are_refused(site):
    install(site, "unmarked", plugins={"u": "acme_unmarked"}, acme_unmarked="def rlinf_configure(run): ...")
    failures = [failure for failure in Plugins.load().failures if failure.owner.distribution == "unmarked"]
    assert "not marked with @hookimpl" in str(failures[0])


def test_plugins_without_hooks_are_refused():
    [failure] = plugins_of(SimpleNamespace(__name__="empty")).failures
    assert "implements no hook" in str(failure)


def test_strict_mode_raises_at_once(site, monkeypatch):
    monkeypatch.setenv("RLINF_STRICT_PLUGINS", "1")
    install(site, "broken", plugins={"b": "acme_broken"}, acme_broken="import a_module_that_nobody_has")
    with pytest.raises(PluginError, match=r"broken 1\.0") as caught:
        _ = Plugins.load().hook
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_strict_mode_is_on_or_off(monkeypatch):
    monkeypatch.setenv("RLINF_STRICT_PLUGINS", "yes")
    with pytest.raises(UserError, match="RLINF_STRICT_PLUGINS is 'yes'"):
        Plugins.load()


def test_disabled_distributions_are_out_of_both_groups(site, monkeypatch):
    monkeypatch.setenv("RLINF_DISABLE_PLUGINS", "Acme.Arm")
    install(
        site,
        "acme-arm",
        plugins={"arm": "acme_arm"},
        datasets={"arm_pick": "acme_arm:Data"},
        acme_arm=POLICY.format(cls="Arm", type="arm"),
    )
    plugins = Plugins.load()
    assert plugins.blocked == ("acme-arm",)
    assert "arm_pick" not in [entry.name for entry in plugins.datasets()]
    with pytest.raises(UserError, match="disabled by RLINF_DISABLE_PLUGINS: acme-arm"):
        plugins.policy("arm")
    assert "acme_arm" not in sys.modules


def test_a_disabled_distribution_that_is_not_there_is_a_misspelling(site, monkeypatch):
    install(site, "acme-arm", datasets={"arm_pick": "acme_arm:Data"})
    monkeypatch.setenv("RLINF_DISABLE_PLUGINS", "acme-amr")
    with pytest.raises(UserError, match=r"names 'acme-amr', but no installed .* did you mean 'acme-arm'"):
        Plugins.load()


def test_a_dataset_is_imported_alone(site):
    install(
        site,
        "acme-data",
        plugins={"acme": "acme_plugin"},
        datasets={"one": "acme_one:Data", "two": "acme_two:Data"},
        acme_one=DATASET,
        acme_two=DATASET,
        acme_plugin="raise RuntimeError('a dataset needs no hook')",
    )
    plugins = Plugins.load()
    assert {"one", "two"} <= {entry.name for entry in plugins.datasets()}
    assert "acme_one" not in sys.modules
    assert issubclass(plugins.dataset("one"), DatasetConfig)
    assert "acme_two" not in sys.modules
    assert "acme_plugin" not in sys.modules


def test_datasets_of_one_name_are_told_apart_by_distribution():
    entries = [entry_point(DATASET_GROUP, "pick", _dataset(name), f"lab-{name}") for name in ("a", "b")]
    plugins = Plugins(entries)
    assert [entry.qualified_name for entry in plugins.datasets()] == ["lab-a:pick", "lab-b:pick"]
    with pytest.raises(PluginError, match=r"offered by lab-a 1\.0 .* and by lab-b 1\.0 .*config_name = \"lab-a:pick\""):
        plugins.dataset("pick")
    assert plugins.dataset("Lab_B:pick").__name__ == "b"
    with pytest.raises(UserError, match="unknown dataset 'lab-c:pick'"):
        plugins.dataset("lab-c:pick")


@pytest.mark.parametrize(
    ("value", "complaint"),
    [("a_module_that_nobody_has:Data", "cannot be loaded: No module named"), (dict, "not a DatasetConfig")],
)
def test_datasets_that_cannot_be_used_name_their_owner(value, complaint):
    plugins = Plugins([entry_point(DATASET_GROUP, "odd", value, "lab", "2.0")])
    with pytest.raises(PluginError, match=rf"dataset 'odd' of lab 2\.0 .*{complaint}"):
        plugins.dataset("odd")


def test_hooks_are_called_in_one_order_whatever_the_order_of_discovery():
    def order(entries):
        calls = []
        named = {
            "a": plugin(rlinf_configure=lambda run: calls.append("a")),
            "b": plugin(rlinf_configure=lambda run: calls.append("b")),
        }
        Plugins([entry_point(PLUGIN_GROUP, name, named[name], name) for name in entries]).hook.rlinf_configure(run=None)
        return calls

    assert order("ab") == order("ba")


def test_core_opens_lerobot_datasets_after_other_plugins_and_no_others():
    from rlinf_core import LeRobotDatasetConfig

    mine = plugin(rlinf_open_dataset=lambda dataset: "mine" if dataset.repo_id == "mine" else None)
    plugins = Plugins([*entry_points_of("rlinf_core"), entry_point(PLUGIN_GROUP, "mine", mine, "a-plugin")])

    def open_(dataset):
        return plugins.hook.rlinf_open_dataset(dataset=dataset, policy=_policy("toy")(type="toy"), split="train")

    assert open_(LeRobotDatasetConfig(repo_id="mine")) == "mine"
    assert open_(DatasetConfig(repo_id="yours")) is None
    with pytest.raises(UserError, match="/nowhere"):
        open_(LeRobotDatasetConfig(repo_id="/nowhere/at/all"))


def _policy(type_):
    """A policy config that declares its name, or (None) forgets to."""
    from typing import Literal

    from pydantic import create_model

    from rlinf_core import PolicyConfig

    fields = {"type": (Literal[type_], type_)} if type_ else {}
    return create_model("Toy", __base__=PolicyConfig, **fields)


def _dataset(name):
    return type(name, (DatasetConfig,), {"__module__": __name__})
