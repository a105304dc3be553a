"""Statistics of rows: openpi's histogram, batches of rows, and the statistics that a run begins and resumes with."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
from toy_data import HORIZON, Repack, Rows, Shift, ToyDataset, ToyPolicy

from rlinf_core.data.normalize import NormStats, load_with_origin, save_norm_stats
from rlinf_core.data.statistics.compute import (
    RunningStats,
    compute_norm_stats,
    count_in_bins,
    outputs,
    summarize,
    takes_batches,
)
from rlinf_core.data.statistics.run import diagnose, resumed_statistics
from rlinf_core.data.transforms import Concatenate, RelativeActions, SliceActions, Transform
from rlinf_core.errors import UserError


@dataclass
class Padded(Rows):
    """With the flags that a repacking transform takes along."""

    def without_images(self, indices):
        return [row | {"actions_is_pad": np.zeros(HORIZON, bool)} for row in super().without_images(indices)]


@dataclass
class Columns(Padded):
    """The same rows as columns."""

    def columns(self, indices):
        rows = self.without_images(indices)
        batch = {key: np.stack([row[key] for row in rows]) for key in rows[0].keys() - {"task"}}
        return batch | {"task": [row["task"] for row in rows]}


@dataclass(frozen=True)
class LookAtCamera(Transform):
    def __call__(self, sample):
        return {**sample, "state": sample["state"] + sample["images"]["base"].mean()}


@dataclass(frozen=True)
class Flipped(RelativeActions):
    """Overrides a transform that takes batches, and does not itself."""

    def __call__(self, sample):
        assert sample["state"].ndim == 1
        return super().__call__({**sample, "state": sample["state"][::-1]})


TRANSFORMS = (Concatenate({}, ("state",), ("actions",)), SliceActions(2), RelativeActions((True, False)))


def edges_of(values):
    return np.linspace(values.min() - 1e-10, values.max() + 1e-10, 5001)


@pytest.mark.parametrize(
    "values",
    [
        np.random.default_rng(0).normal(size=100_000),
        np.random.default_rng(1).normal(size=50_000).astype(np.float32),
        np.random.default_rng(2).standard_cauchy(size=50_000),
        np.arange(5001) / 5000,
        np.full(10, 3.0),
        np.full(10, 1e6),
        1e9 + np.arange(100) * 1e-6,
        np.array([-1e300, 0.0, 1e300]),
        np.array([0.0, 1.0] * 50),
        np.array([5e-324, 0.0]),
    ],
    ids=str,
)
def test_bins_are_those_of_numpys_histogram(values):
    first = edges_of(values.astype(np.float64))
    for edges in (first, np.linspace(values.min(), values.max(), 5001, dtype=np.float64), first[::50]):
        inside = values[(values >= edges[0]) & (values <= edges[-1])]
        np.testing.assert_array_equal(count_in_bins(inside, edges), np.histogram(inside, edges)[0])


def test_values_on_edges_belong_to_the_bin_that_numpy_says():
    edges = np.linspace(-0.3, 0.7, 5001)
    for values in (edges, np.nextafter(edges, 9)[:-1], np.nextafter(edges, -9)[1:]):
        np.testing.assert_array_equal(count_in_bins(values, edges), np.histogram(values, edges)[0])


def test_one_vector_has_no_statistics():
    running = RunningStats()
    running.update(np.ones((1, 2)))
    with pytest.raises(ValueError, match="at least two"):
        running.result()


def test_statistics_are_those_of_all_transformed_rows(monkeypatch):
    monkeypatch.setattr("rlinf_core.data.statistics.compute.ROWS_AT_A_TIME", 300)
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
    with pytest.raises(UserError, match=r"LookAtCamera needs 'base'.*data\.stats_need_images = true"):
        compute_norm_stats(Rows(20), [Repack(), LookAtCamera()])
    stats = compute_norm_stats(Rows(20), [Repack(), LookAtCamera()], read_images=True)
    np.testing.assert_allclose(stats["state"].mean, [19.0, -9.5, 10.5])


@pytest.mark.parametrize("transforms", [TRANSFORMS[:1], TRANSFORMS[:2], TRANSFORMS], ids=len)
def test_a_batch_of_rows_gives_the_numbers_of_its_rows(transforms):
    assert all(map(takes_batches, transforms))
    one_by_one, at_once = (outputs(source, transforms, [3, 0, 77, 5]) for source in (Padded(100), Columns(100)))
    for key, values in one_by_one.items():
        np.testing.assert_array_equal(at_once[key], values)
        assert at_once[key].dtype == values.dtype


def test_a_class_that_overrides_a_transform_gets_rows():
    flipped = (TRANSFORMS[0], Flipped((True, False)))
    assert not takes_batches(flipped[1])
    assert outputs(Columns(9), flipped, [1, 2])["actions"].shape == (2, HORIZON, 2)


def test_a_survey_knows_the_range_of_each_episode():
    found = summarize(Columns(35), TRANSFORMS)["state"]
    assert found.episodes.tolist() == [0, 1, 2, 3]
    assert found.episode_low[:, 0].tolist() == [0, 10, 20, 30]
    assert found.episode_high[:, 1].tolist() == [0, -20, -40, -60]
    assert (found.rows, found.running.low[0], found.running.high[0]) == (35, 0, 34)
    some = summarize(Columns(35), TRANSFORMS, rows=4)["state"]
    assert (some.rows, some.episodes.tolist()) == (4, [0, 1, 2])


def test_a_number_that_is_none_names_its_row():
    class Divide(Transform):
        def __call__(self, sample):
            with np.errstate(divide="ignore", invalid="ignore"):
                return {**sample, "state": sample["state"] / (sample["state"] - 17)}

    with pytest.raises(
        UserError, match=r"data-not-finite: state .* in dimensions \[0\], first in toy, .* episode 1, frame 7"
    ):
        summarize(Rows(30), [Repack(), Divide()])


class ToyRun(SimpleNamespace):
    """What `diagnose` asks of a run."""

    def __init__(self, **data):
        super().__init__(policy=ToyPolicy(), data=ToyDataset(repo_id="toy", **data))


def stats_of(width):
    return NormStats(np.zeros(width), np.ones(width), np.full(width, -1.0), np.full(width, 1.0))


def test_a_runs_statistics_tell_what_they_were_made_of(tmp_path):
    found = diagnose(ToyRun(), Rows(30))
    expected = compute_norm_stats(Rows(30), [Repack(), Shift(scale=3.0)])
    np.testing.assert_array_equal(found.stats["actions"].q99, expected["actions"].q99)
    origin = found.origin
    assert (origin.dataset, origin.rows, origin.episodes, origin.horizon, origin.norm_floor) == ("toy", 30, 3, 0, 0.0)
    fingerprints = {
        origin.fingerprint,
        diagnose(ToyRun(), Rows(31)).origin.fingerprint,
        diagnose(SimpleNamespace(policy=ToyPolicy(), data=Twice(repo_id="toy")), Rows(30)).origin.fingerprint,
    }
    assert len(fingerprints) == 3


class Twice(ToyDataset):
    def transforms(self):
        return (Shift(scale=6.0),)


def test_given_statistics_are_used_as_they_are(tmp_path):
    given = {"state": stats_of(3), "actions": stats_of(2)}
    save_norm_stats(tmp_path / "given.json", given)
    found = diagnose(ToyRun(norm_stats=str(tmp_path / "given.json")), Rows(9))
    np.testing.assert_array_equal(found.stats["state"].q99, given["state"].q99)
    assert found.origin.fingerprint == ""


def test_a_floor_is_kept_with_the_statistics(tmp_path):
    found = diagnose(ToyRun(norm_floor=0.5), Rows(30))
    assert found.stats["state"].q99[2] - found.stats["state"].q01[2] == pytest.approx(1.0)  # Constant in the data.
    save_norm_stats(tmp_path / "s.json", found.stats, found.origin)
    assert load_with_origin(tmp_path / "s.json")[1].norm_floor == 0.5
    again = diagnose(ToyRun(norm_stats=str(tmp_path / "s.json")), Rows(30))
    assert again.origin == found.origin


def test_a_run_continues_only_on_the_statistics_it_began_with(tmp_path):
    path = tmp_path / "norm_stats.json"
    began = diagnose(ToyRun(), Rows(30))
    save_norm_stats(path, began.stats, began.origin)
    again = resumed_statistics(ToyRun(), Rows(30), path)
    np.testing.assert_array_equal(again["actions"].q99, began.stats["actions"].q99)
    with pytest.raises(UserError, match="cannot continue"):
        resumed_statistics(ToyRun(), Rows(31), path)
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        resumed_statistics(ToyRun(), Rows(30), path)


def test_a_run_on_given_statistics_continues_on_them_whatever_became_of_the_file(tmp_path):
    save_norm_stats(tmp_path / "norm_stats.json", {"state": stats_of(3), "actions": stats_of(2)})
    stats = resumed_statistics(ToyRun(norm_stats="gone.json"), Rows(9), tmp_path / "norm_stats.json")
    np.testing.assert_array_equal(stats["state"].mean, np.zeros(3))


def test_images_are_not_decoded_again_for_the_same_statistics(tmp_path, monkeypatch):
    monkeypatch.setattr("rlinf_core.data.statistics.run.ROWS_WITH_IMAGES", 100)
    run, path = ToyRun(stats_need_images=True), tmp_path / "norm_stats.json"
    first = diagnose(run, Rows(250), computed=path)
    save_norm_stats(path, first.stats, first.origin)
    assert (
        diagnose(run, Rows(250), computed=path).distributions["state"].rows < first.distributions["state"].rows == 250
    )
    save_norm_stats(path, first.stats, replace(first.origin, fingerprint="of other data"))
    assert diagnose(run, Rows(250), computed=path).distributions["state"].rows == 250
