import json

import numpy as np
import pytest
from toy_data import HORIZON

from rlinf_core.data.normalize import (
    Normalize,
    NormStats,
    Origin,
    load_norm_stats,
    load_with_origin,
    save_norm_stats,
)
from rlinf_core.errors import UserError


def stats_of(width, seed=0):
    mean, low, high = np.random.default_rng(seed).normal(size=(3, width))
    return NormStats(mean, np.abs(mean) + 0.5, np.minimum(low, high), np.maximum(low, high))


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
    save_norm_stats(tmp_path / "new" / "norm_stats.json", stats, Origin("abc", rows=7))
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


def test_a_floor_widens_what_has_less_spread_about_its_middle():
    stats = NormStats(*map(np.array, ([0.0, 5.0], [1.0, 1e-9], [-2.0, 5.0], [2.0, 5.0])))
    for mode in ("mean_std", "quantile"):
        floored = stats.floored(0.01)
        assert floored.spread(mode).round(12).tolist() == [stats.spread(mode)[0], 0.01]
        normalize = Normalize({"state": floored}, mode)
        np.testing.assert_allclose(normalize({"state": np.array([0.0, 5.01])})["state"], [0.0, 1.0], atol=2e-4)
        back = normalize.inverse(normalize({"state": np.array([1.0, 5.01])}))["state"]
        np.testing.assert_allclose(back, [1.0, 5.01], atol=1e-12)
        assert (stats.floored(0.0).spread(mode) == stats.spread(mode)).all()


def test_unknown_quantiles_are_null_in_a_file(tmp_path):
    stats = NormStats(np.zeros(2), np.ones(2), np.full(2, np.nan), np.full(2, np.nan))
    save_norm_stats(tmp_path / "s.json", {"state": stats})
    assert json.loads((tmp_path / "s.json").read_text())["norm_stats"]["state"]["q01"] is None
    assert np.isnan(load_norm_stats(tmp_path / "s.json")["state"].q99).all()


def test_a_file_tells_its_origin(tmp_path):
    origin = Origin("abc", dataset="me/data", rows=7, episodes=2, horizon=4, norm_floor=0.01)
    save_norm_stats(tmp_path / "s.json", {"state": stats_of(3)}, origin)
    assert load_with_origin(tmp_path / "s.json")[1] == origin
