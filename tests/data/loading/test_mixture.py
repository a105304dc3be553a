"""Training on several datasets: which rows are used, the metrics of each source, and exact resumes."""

import json
from itertools import count

import numpy as np
import pytest
import torch
import toy_mixture
from safetensors.torch import load_file
from toy_data import Repack, Rows, ToyPolicy
from toy_policy import ToyModule

from rlinf_core import UserError
from rlinf_core.config.load import load_config
from rlinf_core.data.loading.loader import build_train_loader
from rlinf_core.data.loading.micro_batches import SOURCE
from rlinf_core.data.loading.mixture import Order, Source
from rlinf_core.data.loading.sampling import Batching, epoch_order, sample_generator
from rlinf_core.data.normalize import load_norm_stats
from rlinf_core.data.pipeline import Pipeline
from rlinf_core.loggers.jsonl import read_rows
from rlinf_core.preflight import check_run
from rlinf_core.training.distributed.processes import processes
from rlinf_core.training.run_folder import prepare_folder

ROWS, SHARES = (1000, 300, 7), (0.5, 0.45, 0.05)
ORDER = Order(seed=5, rows=ROWS, shares=SHARES, samples=1200)


def test_empirical_shares_are_those_of_independent_draws():
    epochs = [ORDER.epoch(epoch)[0] for epoch in range(40)]
    for source, share in enumerate(SHARES):
        counts = np.array([(epoch == source).sum() for epoch in epochs])
        deviation = (1200 * share * (1 - share)) ** 0.5
        assert abs(counts - 1200 * share).max() < 4.5 * deviation
        assert 0.6 * deviation < counts.std() < 1.4 * deviation  # Nor are they more even than draws are.
        halves = [(epoch[:600] == source).mean() for epoch in epochs]
        assert abs(np.mean(halves) - share) < 4 * (share * (1 - share) / (600 * 40)) ** 0.5


def test_a_source_is_visited_by_one_permutation_after_another_across_epochs():
    visits = [np.concatenate([rows[sources == s] for sources, rows in map(ORDER.epoch, range(12))]) for s in range(3)]
    for seen, rows in zip(visits, ROWS, strict=True):
        passes = len(seen) // rows
        assert passes >= 4
        for number in range(passes):
            assert sorted(seen[number * rows : (number + 1) * rows]) == list(range(rows))
        assert not np.array_equal(seen[:rows], seen[rows : 2 * rows])
    # No row is starved: whatever its weight, a source is seen wholly.
    assert set(visits[2]) == set(range(7))


def test_an_epoch_is_a_function_of_seed_and_epoch_alone():
    later, (sources, rows) = ORDER.epoch(9), ORDER.epoch(9)
    np.testing.assert_array_equal(later, (sources, rows))
    assert (Order(6, ROWS, SHARES, 1200).epoch(9)[0] != sources).any()
    assert (ORDER.epoch(8)[0] != sources).any()
    assert (rows < np.array(ROWS)[sources]).all()


def test_one_dataset_is_taken_as_before():
    sources, rows = Order(3, (50,), (1.0,), 48).epoch(2)
    np.testing.assert_array_equal(rows, epoch_order(3, 2, 50)[:48])
    assert not sources.any()


def loader(*, rank=0, ranks=1, micro=3, workers=0, start=0, stop=9, sources=None):
    default = [
        Source(Rows(20), Pipeline(Repack()), "wide", 0.7),
        Source(toy_mixture.NarrowRows(10), Pipeline(toy_mixture.RepackNarrow()), "narrow", 0.3),
    ]

    class Collating(ToyPolicy):
        def collate(self, samples):
            assert all(len(sample) for sample in samples)
            keys = ("state", "noise")
            return {key: torch.from_numpy(np.stack([s[key] for s in samples])) for key in keys}

    return list(
        build_train_loader(
            sources or default,
            Collating(),
            Batching(12, micro, 3, rank, ranks),
            (start, stop),
            num_workers=workers,
        )
    )


def together(batches):
    """[samples, numbers] of batches of one rank each, in the order of positions."""
    flat = [
        torch.cat([batch[SOURCE][:, None].double(), batch["state"].double(), batch["noise"].double()], 1)
        for same in zip(*batches, strict=True)
        for batch in same
    ]
    return torch.cat(flat)


def test_sources_samples_and_draws_do_not_depend_on_ranks_or_resumes():
    whole = together([loader()])
    assert len(whole) == 9 * 12
    assert torch.equal(together([loader(rank=rank, ranks=2) for rank in range(2)]), whole)
    assert torch.equal(together([loader(micro=12)]), whole)
    assert torch.equal(together([loader(start=5)]), whole[5 * 12 :])


def test_each_sample_comes_from_its_source_with_its_own_pipeline():
    whole = together([loader()])
    order = Order(3, (20, 10), (0.7, 0.3), 24)
    for epoch in range(2):
        sources, rows = order.epoch(epoch)
        taken = whole[epoch * 24 : (epoch + 1) * 24]
        assert taken[:, 0].tolist() == sources.tolist()
        for position, (source, row) in enumerate(zip(sources, rows, strict=True)):
            data = (Rows(20), toy_mixture.NarrowRows(10))[source]
            np.testing.assert_array_equal(taken[position, 1:4], toy_mixture.states_of(data, [row])[0])
            noise = sample_generator(3, epoch, position).standard_normal(3, np.float32)
            np.testing.assert_array_equal(taken[position, 4:], noise)


def test_a_row_that_cannot_be_read_is_named_with_its_dataset():
    broken = Source(Rows(20, broken=13, error=UserError("no frame")), Pipeline(Repack()), "wide", 0.7)
    other = Source(Rows(20), Pipeline(Repack()), "other", 0.3)
    with pytest.raises(UserError, match=r"no frame \[toy, part-0\.parquet, episode 1, frame 3\]"):
        loader(sources=[other, broken])


@pytest.fixture(scope="module")
def plugins():
    return toy_mixture.toy_plugins()


@pytest.fixture
def train(tmp_path, plugins, monkeypatch):
    """Train the two toys from wherever the run stands; returns the trainer."""
    monkeypatch.delenv("RANK", raising=False)
    (tmp_path / "toy.toml").write_text(toy_mixture.CONFIG)

    def train(*overrides, watch=lambda trainer: None):
        run = load_config(tmp_path / "toy.toml", [f"runner.output_dir={tmp_path}", *overrides], plugins)
        with processes("cpu") as group:
            start = prepare_folder(run, overwrite=False)
            trainer = run.trainer.build(run, start=start, group=group, plugins=plugins)
            watch(trainer)
            trainer.train()
        return trainer

    return train


def steps(trainer):
    return [row for row in read_rows(trainer.run.folder / "metrics.jsonl") if "loss" in row]


def weights(trainer):
    return {name: p.detach().full_tensor().clone() for name, p in trainer.policy.named_parameters()}


def test_the_loss_of_each_source_is_that_of_its_samples(train):
    """Held against the policy run by hand on the samples of each source, before the step changes it."""
    expected: list[dict[int, list[float]]] = []  # Of each step: source -> loss sum and weight.

    def watch(trainer):
        loader = trainer.data.loader(trainer._group, trainer.step)
        forward, batches, calls = trainer.policy.forward, iter(loader), count()

        def by_hand(batch):
            assert SOURCE not in batch
            if next(calls) % 2 == 0:  # The first of the step's two micro batches.
                expected.append({})
            numbers = next(batches)[SOURCE]
            for number in numbers.unique().tolist():
                one = forward({key: value[numbers == number] for key, value in batch.items()})
                loss, weight = expected[-1].get(number, (0.0, 0.0))
                expected[-1][number] = (loss + float(one.loss_sum.detach()), weight + float(one.weight))
            return forward(batch)

        trainer.policy.forward = by_hand

    found = steps(train(watch=watch))
    assert len(found) == len(expected) == 12
    for row, sums in zip(found, expected, strict=True):
        want = {f"loss/{('toy', 'narrow')[number]}": loss / weight for number, (loss, weight) in sums.items()}
        assert {key: row[key] for key in row if key.startswith("loss/")} == pytest.approx(want, rel=1e-5)
    assert any("loss/narrow" in row for row in found)


def test_a_resumed_mixture_goes_on_to_the_bit(train):
    whole = train("runner.name=whole", "optim.ema_decay=0.9")
    train("runner.name=halves", "optim.ema_decay=0.9", "runner.max_steps=5")
    halves = train("runner.name=halves", "optim.ema_decay=0.9", "runner.max_steps=12")
    keys = [key for key in steps(whole)[0] if key.startswith(("loss", "grad"))]
    assert len(keys) >= 3
    for one, other in zip(steps(whole), steps(halves), strict=True):
        assert {key: one.get(key) for key in keys} == {key: other.get(key) for key in keys}
    theirs = weights(halves)
    assert all(torch.equal(value, theirs[name]) for name, value in weights(whole).items())


def test_each_source_has_its_own_statistics_and_a_run_goes_on_only_with_them(train, monkeypatch):
    trainer = train("runner.max_steps=2")
    folder = trainer.run.folder
    assert not (folder / "norm_stats.json").exists()
    wide, narrow = (load_norm_stats(folder / source.statistics) for source in trainer.run.sources)
    assert (len(wide["actions"].mean), len(narrow["actions"].mean)) == (2, 1)
    assert [len(source.pipeline.normalize.stats["actions"].mean) for source in trainer.data.sources] == [2, 1]
    monkeypatch.setattr(toy_mixture.NarrowRows, "fingerprint", lambda self: "other rows")
    with pytest.raises(UserError, match=r"narrow\.json was computed from other rows"):
        train("runner.max_steps=3")


def test_a_run_does_not_go_on_with_other_weights(train):
    train("runner.max_steps=2")
    with pytest.raises(UserError, match=r"data\.mixture\[1\]\.weight: 1\.0 -> 2\.0"):
        train("runner.max_steps=3", "data.mixture.1.weight=2.0")


def test_each_source_is_validated_in_its_own_units(train):
    trainer = train("runner.val_check_interval=6", "optim.ema_decay=0.9")
    last = [row for row in read_rows(trainer.run.folder / "metrics.jsonl") if "val_loss" in row][-1]
    assert last["val_loss"] == pytest.approx(0.75 * last["val_loss/toy"] + 0.25 * last["val_loss/narrow"])
    assert last["ema_val_loss"] == pytest.approx(0.75 * last["ema_val_loss/toy"] + 0.25 * last["ema_val_loss/narrow"])
    assert "val_action_mse" not in last
    # The narrow robot's numbers are 50 times as large.
    assert last["val_action_mse_mean/narrow"] > 100 * last["val_action_mse_mean/toy"]
    assert {"val_action_mse/toy", "ema_val_action_mse/narrow", "val_action_mse_repeat/toy"} <= last.keys()
    assert trainer._best.metric == "ema_val_loss"


def test_a_source_alone_may_be_validated_and_compared_by(train):
    settings = ["runner.val_check_interval=6", "data.mixture.0.validation_fraction=0.0"]
    trainer = train(*settings, "runner.best_metric=val_action_mse/narrow", "runner.save_best=true")
    last = [row for row in read_rows(trainer.run.folder / "metrics.jsonl") if "val_loss" in row][-1]
    assert last["val_loss"] == last["val_loss/narrow"]
    assert "val_loss/toy" not in last
    assert trainer._best.metric == "val_action_mse/narrow"
    with pytest.raises(UserError, match=r"no 'val_loss/toy'"):
        train(*settings, "runner.best_metric=val_loss/toy", "runner.name=other")


def test_a_run_tells_what_it_mixes(train, capsys):
    train("runner.max_steps=1")
    out = capsys.readouterr().out
    assert "trainable_toy on toy + narrow" in out
    assert "toy: data: 6 episodes, 60 rows; weight 3, 75.0% of the samples, 1 passes an epoch" in out
    assert "narrow: data: 2 episodes, 20 rows; weight 1, 25.0% of the samples, 1 passes an epoch" in out


def test_a_policy_that_does_not_tell_the_losses_of_samples_is_named(train, monkeypatch, capsys):
    forward = ToyModule.forward
    monkeypatch.setattr(ToyModule, "forward", lambda self, batch: forward(self, batch)._replace(sample_losses=None))
    found = steps(train("runner.max_steps=2"))
    assert not any(key.startswith("loss/") for row in found for key in row)
    assert capsys.readouterr().out.count("no loss/<source> is measured") == 1


def test_validate_tells_and_finds_by_source(plugins, tmp_path):
    def check(*overrides):
        path = tmp_path / "toy.toml"
        path.write_text(toy_mixture.CONFIG)
        return check_run(load_config(path, [f"runner.output_dir={tmp_path}", *overrides], plugins), plugins, ranks=1)

    report = check()
    assert report.findings == []
    assert report.facts["toy: training_rows"] == 60
    assert report.facts["narrow: training_rows"] == 20
    assert report.facts["narrow: drawn"] == "weight 1, 25.0% of the samples, 1 passes an epoch"
    assert report.facts["steps_an_epoch"] == 10
    assert "actions [4, 5]" in report.facts["toy: sample"]
    (tmp_path / "bad.json").write_text("{}")
    (finding,) = check(f"data.mixture.1.norm_stats={tmp_path / 'bad.json'}").findings
    assert finding.startswith("narrow: ")
    assert "is not a norm_stats.json" in finding


def test_a_mixture_is_the_same_on_two_ranks_to_rounding(start_ranks, tmp_path, train):
    narrow = "data.mixture.1.config_name=toy"  # `option_runs` knows this format alone.
    (tmp_path / "two").mkdir()
    (tmp_path / "toy.toml").write_text(toy_mixture.CONFIG)
    result = start_ranks("option_runs:main", 2, tmp_path / "two", tmp_path / "toy.toml", f"run:{narrow}")
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
    begun = {}
    one = train(narrow, watch=lambda trainer: begun.update(weights(trainer)))
    two = json.loads((tmp_path / "two" / "run" / "rows.json").read_text())
    for key in ("loss", "loss/toy", "loss/toy_2"):
        assert [row.get(key) for row in two] == pytest.approx([row.get(key) for row in steps(one)], rel=1e-4)
    start, other = (load_file(tmp_path / "two" / "run" / f"{when}.safetensors") for when in ("start", "end"))
    assert all(torch.equal(value, start[name]) for name, value in begun.items())
    end = weights(one)
    off = sum(float((other[name] - end[name]).square().sum()) for name in start) ** 0.5
    assert off / sum(float((end[name] - start[name]).square().sum()) for name in start) ** 0.5 <= 5e-3
