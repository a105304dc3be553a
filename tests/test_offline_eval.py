"""Offline judgement: errors and intervals against numbers worked out by hand and SciPy's bootstrap."""

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from toy_data import HORIZON, Rows, ToyDataset, ToyPolicy

from rlinf_core import UserError
from rlinf_core.data.pipeline import build_pipeline
from rlinf_core.data.statistics.compute import compute_norm_stats
from rlinf_core.evaluators.action_error import ActionSums
from rlinf_core.offline_eval import Judged, choose_rows, judge, other_dataset
from rlinf_core.sampling import Sampler


class Dataset(ToyDataset):
    def repack(self):
        repack = super().repack()
        return lambda row: repack(row) | {"actions_is_pad": np.arange(HORIZON) >= HORIZON - 1}


class Policy(ToyPolicy):
    def chunk_length(self):
        return HORIZON


class Module:
    """Answers with the recorded actions, off by a tenth (normalised) in the rows of the first episode."""

    def sample_actions(self, batch, noise):
        return batch["actions"] + 0.1 * (batch["index"] < 10)[:, None, None]


@pytest.fixture
def policy():
    dataset, config = Dataset(config_name="toy", repo_id="toy"), Policy()
    stats = compute_norm_stats(Rows(40), [dataset.repack(), *dataset.transforms()])
    pipeline = build_pipeline(dataset, config, stats)
    module = Module()
    sample = Sampler(config, module)
    return SimpleNamespace(
        config=config, data=dataset, pipeline=pipeline, module=module, sample=sample, device=torch.device("cpu")
    )


def test_errors_per_episode_task_dimension_and_step(policy):
    seen = []
    judged = judge(
        policy, Rows(40), Rows(40), samples=0, batch_size=7, seed=0, progress=lambda done, all: seen.append((done, all))
    )
    assert (seen[0], seen[-1]) == ((0, 40), (40, 40))
    assert judged.errors.counts == (40, 40, 40, 0)
    assert judged.errors.rmse[3] == [None, None]
    table = {row[0]: row for row in judged.tables["episodes"].rows}
    assert table.keys() == {0, 1, 2, 3}
    assert table[0][2] > 0.01 > 1e-6 > table[1][2]
    assert judged.tables["episodes"].rows[0][0] == 0  # The worst episode is first.
    [task] = judged.tables["tasks"].rows
    assert (task[0], task[-1]) == ("do it", 4)
    assert len(judged.tables["steps"].rows) == 3
    # The mean action of all rows, by hand.
    target = np.arange(HORIZON - 1)[None, :, None] + np.arange(40)[:, None, None] * np.array([1.0, 0.5])
    by_hand = np.mean((np.array([19.5, 9.75]) - target) ** 2)
    assert judged.mean_squared()["mean action"].value == pytest.approx(by_hand)
    per_dimension = np.sqrt(np.mean((np.array([19.5, 9.75]) - target) ** 2, (0, 1)))
    assert [row[2].value for row in judged.tables["dimensions"].rows] == pytest.approx(per_dimension, rel=1e-5)


def test_intervals_are_those_of_scipys_bootstrap():
    """The percentile interval of a ratio of sums over episodes."""
    generator = np.random.default_rng(1)
    totals, counts = generator.gamma(2.0, 1.0, 60), generator.integers(5, 20, 60).astype(float)
    sums = []
    for total, count in zip(totals, counts, strict=True):
        squared = np.zeros((3, 1, 1))
        squared[:, 0, 0] = total, 2 * total, 3 * total
        sums.append(ActionSums(squared, squared, np.array([count]), 1.0))
    judged = Judged(("x",), None, tuple(range(60)), ("",) * 60, tuple(sums))
    found = judged.mean_squared()
    expected = scipy.stats.bootstrap(
        (totals, counts), lambda t, n, axis=-1: t.sum(axis) / n.sum(axis), paired=True, vectorized=True,
        n_resamples=20_000, method="percentile", rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    assert found["policy"].value == pytest.approx(totals.sum() / counts.sum())
    assert found["policy"].low == pytest.approx(expected.low, rel=0.03)
    assert found["policy"].high == pytest.approx(expected.high, rel=0.03)
    # The baseline is wrong on the same episodes: the quotient is certain.
    assert list(found["relative"].model_dump().values()) == pytest.approx([0.5, 0.5, 0.5])
    few = Judged(("x",), None, (0, 1), ("", ""), tuple(sums[:2]))
    assert few.mean_squared()["policy"] == pytest.approx(totals[:2].sum() / counts[:2].sum())
    assert "No intervals" in few.tables["overall"].note


def test_rows_are_spread_over_the_chosen_episodes():
    episodes = np.repeat([3, 5, 9], 10)
    assert choose_rows(episodes, 4).tolist() == [0, 10, 19, 29]
    assert choose_rows(episodes, 0, [5]).tolist() == list(range(10, 20))
    with pytest.raises(UserError, match="no episode 4 among these rows, which are of 3 episodes from 3 to 9"):
        choose_rows(episodes, 4, [5, 4])


def test_what_cannot_be_judged(policy):
    with pytest.raises(UserError, match="'toy' has no actions"):
        judge(SimpleNamespace(config=ToyPolicy()), Rows(10), Rows(10), samples=1, batch_size=1, seed=0)
    policy.module.sample_actions = lambda batch, noise: batch["actions"] * float("nan")
    with pytest.raises(UserError, match="NaN or infinite"):
        judge(policy, Rows(10), Rows(10), samples=0, batch_size=4, seed=0)


def test_another_dataset_keeps_the_format_alone(policy):
    data = policy.data.model_copy(update={"validation_fraction": 0.5, "revision": "v1"})
    other = other_dataset(data, "elsewhere")
    assert (other.repo_id, other.validation_fraction, other.has_validation) == ("elsewhere", 0.0, False)
