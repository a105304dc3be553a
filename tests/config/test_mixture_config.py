"""`[[data.mixture]]`: what it accepts, what it says of mistakes, and that it survives being written and read."""

from typing import ClassVar

import pytest
from toy_data import ToyDataset
from toy_mixture import NarrowDataset, toy_plugins
from toy_policy import TrainableToyDataset

from rlinf_core import UserError
from rlinf_core.config.load import diff_tables, dump_config, load_config, read_toml

TWO = '[[data.mixture]]\nconfig_name = "toy"\nweight = 3\n[[data.mixture]]\nconfig_name = "narrow"\n'


class OtherPolicyDataset(ToyDataset):
    run_defaults: ClassVar = {"policy": {"type": "pi05"}}
    compatible_policies: ClassVar = ("trainable_toy",)


class FasterDataset(ToyDataset):
    run_defaults: ClassVar = {
        "policy": {"type": "trainable_toy", "seconds_a_step": 0.5},
        "optim": {"lr": 1e-3, "warmup_steps": 3},
    }


class WarmDataset(ToyDataset):
    run_defaults: ClassVar = {
        "policy": {"type": "trainable_toy", "seconds_a_step": 0.25},
        "optim": {"warmup_steps": 3},
    }


class DecayingDataset(ToyDataset):
    run_defaults: ClassVar = {"policy": {"type": "trainable_toy"}, "optim": {"warmup_steps": 3, "min_lr": 1e-7}}


class WeighedDataset(ToyDataset):
    weight: float = 80.0


@pytest.fixture(scope="module")
def plugins():
    return toy_plugins(
        other=OtherPolicyDataset,
        faster=FasterDataset,
        warm=WarmDataset,
        weighed=WeighedDataset,
        decaying=DecayingDataset,
    )


@pytest.fixture
def load(tmp_path, plugins):
    def load(text, *overrides):
        path = tmp_path / "run.toml"
        path.write_text(text)
        return load_config(path, overrides, plugins)

    return load


@pytest.fixture
def mistakes(load):
    def mistakes(text, *overrides):
        with pytest.raises(UserError) as caught:
            load(text, *overrides)
        return str(caught.value)

    return mistakes


def test_each_entry_is_a_dataset_of_its_own(load):
    run = load(TWO + "rows = 7\n")
    first, second = run.sources
    assert (first.name, second.name) == ("toy", "narrow")
    assert (first.weight, first.share, second.share) == (3.0, 0.75, 0.25)
    assert (type(first.run.data), type(second.run.data)) == (TrainableToyDataset, NarrowDataset)
    assert (first.run.data.rows, second.run.data.rows) == (200, 7)
    assert (first.run.policy, second.run.seed) == (run.policy, run.seed)
    assert (first.statistics, second.statistics) == ("norm_stats/toy.json", "norm_stats/narrow.json")


def test_a_run_of_one_dataset_is_its_own_source(load):
    run = load('[data]\nconfig_name = "toy"\n')
    (source,) = run.sources
    assert (source.name, source.share, source.statistics) == ("", 1.0, "norm_stats.json")
    assert source.run is run


def test_sources_of_one_format_are_told_apart(load):
    entry = '[[data.mixture]]\nconfig_name = "{}"\n'
    text = entry.format("toy-arm:toy") + entry.format("toy") + entry.format("narrow") + 'name = "toy_2"\n'
    assert [source.name for source in load(text).sources] == ["toy", "toy_3", "toy_2"]


@pytest.mark.parametrize("text", [TWO, "[data]\nnum_workers = 5\n" + TWO + 'name = "n.1"\nnorm_floor = 0.5\n'])
def test_a_mixture_survives_being_written_and_read(load, text):
    run = load(text)
    written = dump_config(run)
    again = load(written)
    assert again == run
    assert again.sources == run.sources
    assert dump_config(again) == written
    assert written.count("num_workers") == 1


def test_an_override_may_change_one_entry(load):
    run = load(TWO, "data.mixture.1.weight=1.5", "data.mixture.0.rows=9", "data.num_workers=0")
    assert [source.weight for source in run.sources] == [3.0, 1.5]
    assert run.sources[0].run.data.rows == 9
    assert run.data.num_workers == 0
    one = load(TWO, 'data.mixture=[{config_name="toy"}]')
    assert [source.name for source in one.sources] == ["toy"]


def test_a_changed_entry_is_named_when_a_run_goes_on(load):
    old, new = (read_toml(dump_config(load(TWO, *more))) for more in ((), ("data.mixture.1.weight=2.0",)))
    assert diff_tables(old, new) == [("data.mixture[1].weight", 1.0, 2.0)]


def test_all_mistakes_of_all_entries_are_reported_together(mistakes):
    text = """
        [data]
        repo_id = "somewhere"
        [[data.mixture]]
        config_name = "toy"
        weight = 0
        rows = "many"
        [[data.mixture]]
        config_name = "narow"
        [[data.mixture]]
        config_name = "narrow"
        repo = "x"
        num_workers = 3
        name = "a/b"
        [[data.mixture]]
        weight = 1
        [optim]
        lr = -1
    """
    said = mistakes(text)
    assert "8 mistakes" in said or "9 mistakes" in said
    for expected in (
        "data.repo_id: belongs in the entries of data.mixture (only num_workers goes beside them)",
        "data.mixture[0].weight: Input should be greater than 0 (got 0)",
        "data.mixture[0].rows: Input should be a valid integer",
        "table of toy-arm 1.0]",
        "data.mixture[1].config_name: unknown dataset 'narow'; did you mean 'narrow'?",
        "data.mixture[2].repo: unknown key; did you mean 'repo_id'?",
        "table of narrow-arm 1.0]",
        "data.mixture[2].num_workers: applies to all sources: set data.num_workers",
        "data.mixture[2].name: String should match",
        "data.mixture[3].config_name: is required",
        "optim.lr",
    ):
        assert expected in said, said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[data]\nconfig_name = "toy"\n' + TWO,
            "data.config_name: is for a run of one dataset, data.mixture for several",
        ),
        ("[data]\nmixture = []\n", "data.mixture: must be a list of tables"),
        ('[data]\nmixture = ["toy"]\n', "data.mixture: must be a list of tables"),
        ("[data]\nnum_workers = -1\n" + TWO, "data.num_workers: Input should be greater than or equal to 0"),
        (TWO + 'name = "x"\n' + TWO + 'name = "x"\n', "data: two entries of data.mixture have the name 'x'"),
        (
            '[[data.mixture]]\nconfig_name = "weighed"\n',
            "WeighedDataset cannot be mixed: its key weight is a key of the entry",
        ),
        (TWO + "[runner]\nval_check_interval = 5\n", "no episode is held out"),
        (TWO + "weight = inf\n", "data.mixture[1].weight: Input should be a finite number"),
    ],
)
def test_single_mistakes(mistakes, text, message):
    assert message in mistakes(text)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.mixture.5.weight=2", "data.mixture.0.weight=2: there are 2 entries, numbered 0 and 1 [command line]"),
        ("data.mixture.weight=2", "there are 2 entries, numbered 0 and 1"),
        ("data.mixture.0.wheight=2", "data.mixture[0].wheight: unknown key; did you mean 'weight'?"),
    ],
)
def test_an_override_that_misses_an_entry_is_told_what_there_is(mistakes, override, message):
    text = '[[data.mixture]]\nconfig_name = "toy"\n[[data.mixture]]\nconfig_name = "narrow"\n'
    said = mistakes(text, override)
    assert message in said
    assert "1 mistake " in said


def test_datasets_for_different_policies_do_not_mix(mistakes, load):
    text = TWO + '[[data.mixture]]\nconfig_name = "other"\n'
    said = mistakes(text)
    assert "policy.type: a run trains one policy, but the datasets of data.mixture set different values" in said
    assert "toy 'trainable_toy', narrow 'trainable_toy', other 'pi05'" in said
    assert "1 mistake " in said
    # Chosen, it is held against what each of them accepts.
    assert load(text, "policy.type=trainable_toy").policy.type == "trainable_toy"
    assert "'pi05' is not compatible with dataset 'toy', which is for trainable_toy" in mistakes(
        text, "policy.type=pi05"
    )


def test_defaults_that_differ_must_be_said(mistakes, load):
    text = '[[data.mixture]]\nconfig_name = "faster"\n[[data.mixture]]\nconfig_name = "warm"\n'
    said = mistakes(text)
    assert "2 mistakes" in said
    assert (
        "policy.seconds_a_step: the datasets of data.mixture set different values (faster 0.5, warm 0.25): set it"
        in said
    )
    assert "optim.lr: the datasets of data.mixture set different values (faster 0.001, warm sets none): set it" in said
    run = load(text, "policy.seconds_a_step=0.125", "optim.lr=0.5")
    assert (run.policy.seconds_a_step, run.optim.lr, run.optim.warmup_steps) == (0.125, 0.5, 3)


def test_defaults_that_differ_need_not_be_said_where_the_schedule_has_no_such_key(mistakes, load):
    text = '[[data.mixture]]\nconfig_name = "decaying"\n[[data.mixture]]\nconfig_name = "warm"\n'
    given = "policy.seconds_a_step=0.125"
    assert "optim.min_lr: the datasets of data.mixture set different values (decaying 1e-07, warm sets" in mistakes(
        text, given
    )
    assert load(text, given, "optim.schedule=constant").optim.warmup_steps == 3
