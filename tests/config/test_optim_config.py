"""The class of `[optim]` is made of an optimizer and a schedule: their keys, defaults of others, copies, conflicts."""

import copy
import pickle
import tomllib
from types import SimpleNamespace
from typing import ClassVar, Literal

import pytest
from distributions import entry_point, entry_points_of

from rlinf_core import DatasetConfig, OptimizerConfig, PluginError, PolicyConfig, ScheduleConfig, UserError, hookimpl
from rlinf_core.config.load import dump_config, load_config
from rlinf_core.contract.optim import AdamWConfig, CosineConfig, OptimConfig, compose
from rlinf_core.plugins.registry import DATASET_GROUP, PLUGIN_GROUP, Plugins
from rlinf_core.training.recipes import MuonConfig, WsdConfig
from rlinf_core.training.resume import find_changes


class Clashing(OptimizerConfig):
    type: Literal["clashing"] = "clashing"
    warmup_steps: int = 3


class Plain(OptimizerConfig):
    type: Literal["plain"] = "plain"
    lr: float = 0.25


class Fixed(ScheduleConfig):
    schedule: Literal["fixed"] = "fixed"


class Policy(PolicyConfig):
    run_defaults: ClassVar = {"optim": {"lr": 1e-3, "weight_decay": 0.1, "min_lr": 1e-4, "decay_steps": 5000}}

    type: Literal["toy"] = "toy"


class Data(DatasetConfig):
    run_defaults: ClassVar = {"policy": {"type": "toy"}, "optim": {"betas": (0.9, 0.99), "ema_decay": 0.5}}


class Mistaken(DatasetConfig):
    run_defaults: ClassVar = {"policy": {"type": "toy"}, "optim": {"wieght_decay": 0.5}}


@pytest.fixture(scope="module")
def plugins():
    toy = SimpleNamespace(
        __name__="toy",
        rlinf_register_policies=hookimpl(specname="rlinf_register_policies")(lambda: [Policy]),
        rlinf_register_optimizers=hookimpl(specname="rlinf_register_optimizers")(lambda: [Clashing, Plain]),
        rlinf_register_schedules=hookimpl(specname="rlinf_register_schedules")(lambda: [Fixed]),
    )
    datasets = [entry_point(DATASET_GROUP, "data", Data), entry_point(DATASET_GROUP, "mistaken", Mistaken)]
    return Plugins([*entry_points_of("rlinf_core"), entry_point(PLUGIN_GROUP, "toy", toy, "acme"), *datasets])


@pytest.fixture
def load(tmp_path, plugins):
    def load(text="", *overrides, data="data"):
        path = tmp_path / "run.toml"
        path.write_text(f'[data]\nconfig_name = "{data}"\n{text}')
        return load_config(path, overrides, plugins)

    return load


@pytest.fixture
def mistakes(load):
    def mistakes(*arguments, **options):
        with pytest.raises(UserError) as caught:
            load(*arguments, **options)
        return str(caught.value)

    return mistakes


def test_without_names_it_is_adamw_and_openpis_cosine(load):
    run = load()
    assert type(run.optim) is OptimConfig
    assert (run.optim.type, run.optim.schedule, run.optim.lr, run.optim.decay_steps) == ("adamw", "cosine", 1e-3, 5000)


def test_defaults_for_another_choice_are_dropped_and_others_stay(load):
    optim = load("", "optim.type=plain", "optim.schedule=constant").optim
    assert (optim.lr, optim.ema_decay, optim.warmup_steps) == (1e-3, 0.5, 1000)
    assert not {"min_lr", "decay_steps", "betas", "weight_decay"} & set(type(optim).model_fields)
    assert load("", "optim.type=muon").optim.betas == (0.9, 0.99)
    assert load("[optim]\nschedule = 'wsd'\nstable_steps = 5\nwarmup_steps = 5").optim.decay_steps == 5000


def test_a_default_that_nobody_has_is_a_mistake(mistakes):
    assert "optim.wieght_decay: unknown key; did you mean 'weight_decay' or 'ema_decay'?" in mistakes(data="mistaken")


def test_the_users_own_key_of_another_choice_says_who_has_it(mistakes):
    message = mistakes("[optim]\nmin_lr = 1e-5\nbetas = [0.9, 0.99]", "optim.type=plain", "optim.schedule=fixed")
    assert (
        "optim.min_lr: the schedule 'fixed' (optim.schedule) has no such key, but 'cosine', 'hf_cosine' and 'wsd' "
        "have: leave it out, or choose another [" in message
    )
    assert "optim.betas: the optimizer 'plain' (optim.type) has no such key, but 'adamw' and 'muon' have" in message
    assert "2 mistakes" in message
    assert "optim.lrr: unknown key; did you mean 'lr'?" in mistakes("", "optim.schedule=fixed", "optim.lrr=1")


def test_a_required_key_is_asked_for(mistakes):
    assert "optim.stable_steps: is required" in mistakes("", "optim.schedule=wsd")


def test_two_that_share_a_key_are_refused_with_both_owners(mistakes, load):
    message = mistakes("", "optim.type=clashing")
    assert (
        "optim: the optimizer 'clashing' of acme 1.0 (entry point 'toy = toy:toy') and the schedule 'cosine' of "
        in (message)
    )
    assert "rlinf-core" in message
    assert "cannot be used together: both define warmup_steps" in message
    with pytest.raises(PluginError, match="both define warmup_steps"):
        compose(Clashing, CosineConfig)
    assert load("", "optim.type=clashing", "optim.schedule=fixed").optim.warmup_steps == 3


def test_the_optimizers_learning_rate_is_the_default():
    assert compose(Plain, Fixed)().lr == 0.25


def test_the_class_is_always_the_same_and_its_instances_can_be_copied_and_sent():
    assert compose(AdamWConfig, CosineConfig) is OptimConfig
    assert compose(MuonConfig, WsdConfig) is compose(MuonConfig, WsdConfig)
    optim = compose(MuonConfig, WsdConfig, "acme 1.0")(lr=0.5, stable_steps=4)
    for made in (pickle.loads(pickle.dumps(optim)), copy.deepcopy(optim), optim.model_copy()):
        assert type(made) is type(optim)
        assert made == optim
        assert made.optimizer_origin == "MuonConfig of acme 1.0"


def test_a_written_config_loads_as_an_equal_one(load, tmp_path, plugins):
    for names in (["optim.type=muon", "optim.schedule=constant"], ["optim.schedule=wsd", "optim.stable_steps=0"]):
        run = load("[optim]\nwarmup_steps = 10", *names)
        path = tmp_path / "again.toml"
        path.write_text(dump_config(run))
        assert load_config(path, [], plugins) == run


def test_a_run_of_before_there_was_a_choice_has_not_changed(load):
    run = load()
    saved = tomllib.loads(dump_config(run))
    del saved["optim"]["type"], saved["optim"]["schedule"]
    assert find_changes(run, saved, allow_change=False) == []
    other = load("", "optim.type=muon")
    with pytest.raises(UserError, match=r"optim.type: 'adamw' -> 'muon' \(changes what a step computes\)"):
        find_changes(other, saved, allow_change=False)
    with pytest.raises(UserError, match=r"optim.schedule: 'cosine' -> 'constant' \(changes what a step computes\)"):
        find_changes(load("", "optim.schedule=constant"), saved, allow_change=False)
