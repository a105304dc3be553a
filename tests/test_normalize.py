import json
from dataclasses import dataclass

import numpy as np
import pytest
from toy_data import HORIZON, Repack, Rows, Shift

from rlinf_core.data.normalize import (
    Normalize,
    NormStats,
    RunningStats,
    compute_norm_stats,
    load_norm_stats,
    prepare_norm_stats,
    save_norm_stats,
)
from rlinf_core.data.transforms import Transform
from rlinf_core.errors import UserError


def stats_of(width, seed=0):
    mean, low, high = np.random.default_rng(seed).normal(size=(3, width))
    return NormStats(mean, np.abs(mean) + 0.5, np.minimum(low, high), np.maximum(low, high))


@dataclass(frozen=True)
class LookAtCamera(Transform):
    def __call__(self, sample):
        return {**sample, "state": sample["state"] + sample["images"]["base"].mean()}


@pytest.mark.parametrize("mode", ["mean_std", "quantile"])
def test_the_inverse_undoes_it_also_for_padded_actions(mode):
    normalize = Normalize({"state": stats_of(6), "actions": stats_of(3, seed=1)}, mode)
    sample = {"state": np.linspace(-1, 2, 4, dtype=np.float32), "actions": np.ones((HORIZON, 3), np.float32)}
    there = normalize(sample)
    assert there["state"].dtype == np.float64
    assert sample["state"].dtype == np.float32  # Left as it is.
    padded = {**there, "actions": np.pad(there["actions"], [(0, 0), (0, 29)])}
    back = normalize.inverse(padded)
    np.testing.assert_allclose(back["state"], sample["state"], atol=1e-12)
    np.testing.assert_allclose(back["actions"][:, :3], sample["actions"], atol=1e-12)
    np.testing.assert_array_equal(back["actions"][:, 3:], 0)


def test_samples_without_actions_pass():
    normalize = Normalize({"state": stats_of(2), "actions": stats_of(2)}, "mean_std")
    assert normalize({"state": np.zeros(2), "prompt": "go"}).keys() == {"state", "prompt"}


def test_statistics_that_do_not_fit_are_refused():
    normalize = Normalize({"state": stats_of(2)}, "mean_std")
    with pytest.raises(UserError, match=r"'state' have 2 numbers, the data have 3"):
        normalize({"state": np.zeros(3)})
    with pytest.raises(UserError, match="lack 'actions'"):
        normalize({"actions": np.zeros((1, 2))})


def test_statistics_without_quantiles_serve_mean_std_alone(tmp_path):
    table = {"mean": [0.0, 1.0], "std": [1.0, 2.0]}
    (tmp_path / "s.json").write_text(json.dumps({"norm_stats": {"state": table | {"q01": None}}}))
    stats = load_norm_stats(tmp_path / "s.json")
    np.testing.assert_allclose(Normalize(stats, "mean_std")({"state": np.ones(2)})["state"], [1.0, 0.0], atol=1e-5)
    with pytest.raises(UserError, match="no quantiles"):
        Normalize(stats, "quantile")


def test_a_file_holds_what_was_saved(tmp_path):
    stats = {"state": stats_of(3), "actions": stats_of(2)}
    save_norm_stats(tmp_path / "new" / "norm_stats.json", stats, "abc")
    again = load_norm_stats(tmp_path / "new" / "norm_stats.json")
    for key, expected in stats.items():
        for name, value in vars(expected).items():
            np.testing.assert_array_equal(getattr(again[key], name), value)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["norm_stats.json"]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"stats": {}}',
        '{"norm_stats": {"state": {"mean": [1], "std": [1, 2]}}}',
        '{"norm_stats": {"state": 3}}',
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path, text):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(UserError, match=r"s\.json is not a norm_stats\.json"):
        load_norm_stats(tmp_path / "s.json")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.json cannot be read: No such file"):
        load_norm_stats(tmp_path / "none.json")


def test_one_vector_has_no_statistics():
    running = RunningStats()
    running.update(np.ones((1, 2)))
    with pytest.raises(ValueError, match="at least two"):
        running.result()


def test_statistics_are_those_of_all_transformed_rows(monkeypatch):
    monkeypatch.setattr("rlinf_core.data.normalize.ROWS_AT_A_TIME", 300)
    rows = Rows(2000)
    stats = compute_norm_stats(rows, [Repack(), Shift(scale=3.0)])
    everything = rows.without_images(range(2000))
    states = np.stack([row["state"] for row in everything]).astype(np.float64)
    actions = np.concatenate([(row["actions"] - row["state"][0]) * 3.0 for row in everything]).astype(np.float64)
    for key, values in (("state", states), ("actions", actions)):
        np.testing.assert_allclose(stats[key].mean, values.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(stats[key].std, values.std(axis=0), rtol=1e-6, atol=1e-12)
        blur = (
            np.ptp(values, axis=0) * 8 / 5000 + 1e-9
        )  # A bin for each time that a batch can have stretched the range.
        for name, q in (("q01", 0.01), ("q99", 0.99)):
            exact = np.quantile(values, q, axis=0, method="inverted_cdf")
            assert (np.abs(getattr(stats[key], name) - exact) <= blur).all()


def test_a_transform_that_looks_at_images_is_told_what_to_set():
    with pytest.raises(UserError, match=r"LookAtCamera asks for 'base'.*data\.stats_need_images = true"):
        compute_norm_stats(Rows(20), [Repack(), LookAtCamera()])
    stats = compute_norm_stats(Rows(20), [Repack(), LookAtCamera()], read_images=True)
    np.testing.assert_allclose(stats["state"].mean, [19.0, -9.5, 10.5])


def test_computed_statistics_are_kept_while_data_transforms_and_horizon_stay(tmp_path, monkeypatch):
    path, before = tmp_path / "norm_stats.json", [Repack(), Shift(scale=3.0)]
    computed = []
    compute = compute_norm_stats
    monkeypatch.setattr(
        "rlinf_core.data.normalize.compute_norm_stats", lambda *a, **k: computed.append(1) or compute(*a, **k)
    )
    first = prepare_norm_stats(path, Rows(30), before, horizon=HORIZON)
    again = prepare_norm_stats(path, Rows(30), before, horizon=HORIZON)
    np.testing.assert_array_equal(first["state"].q99, again["state"].q99)
    assert len(computed) == 1
    prepare_norm_stats(path, Rows(31), before, horizon=HORIZON)
    prepare_norm_stats(path, Rows(31), [Repack(), Shift(scale=2.0)], horizon=HORIZON)
    prepare_norm_stats(path, Rows(31), [Repack(), Shift(scale=2.0)], horizon=HORIZON + 1)
    assert len(computed) == 4


def test_given_statistics_are_used_as_they_are_and_kept_with_the_run(tmp_path, caplog):
    given, path = tmp_path / "given.json", tmp_path / "norm_stats.json"
    save_norm_stats(given, {"state": stats_of(3), "actions": stats_of(2)})
    stats = prepare_norm_stats(path, Rows(9), [Repack()], horizon=HORIZON, given=str(given))
    np.testing.assert_array_equal(stats["state"].mean, stats_of(3).mean)
    assert path.read_text() == given.read_text()
    assert not caplog.records
    save_norm_stats(given, stats, "of other data")
    prepare_norm_stats(path, Rows(9), [Repack()], horizon=HORIZON, given=str(given))
    assert "was computed from other rows" in caplog.text


def test_a_run_continues_only_on_the_statistics_it_began_with(tmp_path):
    path = tmp_path / "norm_stats.json"
    began = prepare_norm_stats(path, Rows(30), [Repack()], horizon=HORIZON)
    again = prepare_norm_stats(path, Rows(30), [Repack()], horizon=HORIZON, resuming=True)
    np.testing.assert_array_equal(again["actions"].q99, began["actions"].q99)
    with pytest.raises(UserError, match="cannot continue"):
        prepare_norm_stats(path, Rows(30), [Repack(), Shift(scale=2.0)], horizon=HORIZON, resuming=True)
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        prepare_norm_stats(path, Rows(30), [Repack()], horizon=HORIZON, resuming=True)


def test_a_run_on_given_statistics_continues_on_them_whatever_became_of_the_file(tmp_path):
    given, path = tmp_path / "given.json", tmp_path / "norm_stats.json"
    save_norm_stats(given, {"state": stats_of(3), "actions": stats_of(2)})
    prepare_norm_stats(path, Rows(9), [Repack()], horizon=HORIZON, given=str(given))
    given.unlink()
    stats = prepare_norm_stats(path, Rows(9), [Repack()], horizon=HORIZON, given=str(given), resuming=True)
    np.testing.assert_array_equal(stats["state"].mean, stats_of(3).mean)
