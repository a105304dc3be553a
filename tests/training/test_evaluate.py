"""Validation: errors in the data's units against an oracle that knows the answer, and baselines worked out by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toy_data import HORIZON, Rows, ToyDataset, ToyPolicy

from rlinf_core.contract.module import PolicyOutput
from rlinf_core.data.loading.mixture import Source
from rlinf_core.data.pipeline import build_pipeline
from rlinf_core.data.statistics.compute import compute_norm_stats
from rlinf_core.evaluators.action_error import mean_action
from rlinf_core.evaluators.validation import Validation
from rlinf_core.training.data import EvaluatedSource


class Held(Rows):
    """Rows whose last two steps of each chunk lie past the end of the episode."""

    def without_images(self, indices):
        pad = np.arange(HORIZON) >= HORIZON - 2
        return [row | {"is_pad": pad} for row in super().without_images(indices)]


class Dataset(ToyDataset):
    def repack(self):
        repack = super().repack()
        return lambda row: repack(row) | {"actions_is_pad": row.get("is_pad", np.zeros(HORIZON, bool))}


class Policy(ToyPolicy):
    def chunk_length(self):
        return HORIZON


class Oracle(torch.nn.Module):
    """Answers with the batch's own actions, off by `offset` where the chunk is within the episode, far off beyond."""

    def __init__(self, offset=0.0):
        super().__init__()
        self.offset = offset

    def forward(self, batch):
        return PolicyOutput(batch["actions"].sum() * 0 + 3.0 * len(batch["state"]), torch.tensor(2.0), {})

    def sample_actions(self, batch, noise):
        assert noise is batch["noise"]
        actions = batch["actions"] + self.offset
        actions[:, -2:] += 1e6
        return actions


@pytest.fixture
def validate():
    training, held_out, dataset, policy = Rows(40), Held(20), Dataset(), Policy()
    stats = compute_norm_stats(training, [dataset.repack(), *dataset.transforms()])
    pipeline = build_pipeline(dataset, policy, stats)
    run = SimpleNamespace(
        policy=policy, seed=0, runner=SimpleNamespace(val_samples=20), trainer=SimpleNamespace(micro_batch_size=8)
    )
    group = SimpleNamespace(device=torch.device("cpu"), rank=0, size=1, sum=lambda tensor: tensor)
    source = EvaluatedSource(SimpleNamespace(run=run), Source(training, pipeline), held_out, policy, group)
    return Validation(run, source, held_out, group), pipeline, stats


def test_an_oracle_has_no_error_and_what_lies_past_the_episode_does_not_count(validate):
    validation, *_ = validate
    assert validation(Oracle())["val_action_mse"] < 1e-8


def test_the_error_is_in_the_units_of_the_data(validate):
    validation, _, stats = validate
    # Off by 0.1 after normalising: times half the quantiles' distance, and the toy's relative actions are scaled by 3.
    per_number = 0.1 * (stats["actions"].q99 - stats["actions"].q01 + 1e-6) / 2 / 3
    assert validation(Oracle(0.1))["val_action_mse"] == pytest.approx(np.mean(per_number**2), rel=1e-4)


def test_baselines(validate):
    validation, pipeline, _ = validate
    mean = mean_action(Rows(40), pipeline)
    np.testing.assert_allclose(mean, [19.5, 9.75])
    squared = {"mean": [], "repeat": []}
    for row in range(20):
        target = np.arange(HORIZON - 2)[:, None] + np.array([row, 0.5 * row])
        last = mean if row % 10 == 0 else np.array([row - 1, 0.5 * (row - 1)])
        squared["mean"].append((mean - target) ** 2)
        squared["repeat"].append((last - target) ** 2)
    result = validation(Oracle())
    assert result["val_action_mse_mean"] == pytest.approx(np.mean(squared["mean"]))
    assert result["val_action_mse_repeat"] == pytest.approx(np.mean(squared["repeat"]))


def test_the_loss_is_a_quotient_of_sums(validate):
    validation, *_ = validate
    # 20 rows in three batches: loss_sum is 3 a row, the weight 2 a batch.
    assert validation(Oracle())["val_loss"] == pytest.approx(3 * 20 / (2 * 3))
