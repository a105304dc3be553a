"""Evenly spread rows, encoded lazily."""

import numpy as np
import pytest
from toy_data import Rows, ToyDataset

from rlinf_core.data.pipeline import Pipeline
from rlinf_core.data.statistics.preview import encode_without_images, preview_samples, spread_rows
from rlinf_core.errors import UserError


def test_few_rows_are_all_taken():
    assert spread_rows(np.repeat([4, 2], 3), 6).tolist() == [0, 1, 2, 3, 4, 5]


def test_every_episode_is_seen_and_the_rest_is_spread():
    episodes = np.repeat(np.arange(10)[::-1], 100)
    rows = spread_rows(episodes, 40)
    assert 30 < len(rows) <= 40
    assert set(range(0, 1000, 100)) <= set(rows.tolist())
    assert np.diff(rows).max() < 60
    assert rows[-1] == 999


def test_more_episodes_than_rows_are_spread():
    rows = spread_rows(np.repeat(np.arange(1000), 5), 100)
    assert len(rows) == 100
    assert (rows % 5 == 0).all()
    assert (rows[0], rows[-1]) == (0, 4995)


def test_nothing_is_read_before_it_is_asked_for():
    read = []

    class Counted(Rows):
        def without_images(self, indices):
            read.extend(indices)
            return super().without_images(indices)

    samples = preview_samples(Counted(1000), Pipeline(ToyDataset(config_name="toy").repack()), most=600)
    assert read == []
    first = next(samples)
    assert (first["index"], first["images"]) == (0, {})
    assert len(read) < 600
    assert 500 <= 1 + sum(1 for _ in samples) <= 600


def test_an_error_names_the_row():
    def refuse(row):
        raise UserError("no prompt")

    with pytest.raises(UserError, match=r"no prompt \[toy, part-0\.parquet, episode 1, frame 7\]"):
        next(encode_without_images(Rows(20), Pipeline(refuse), [17]))
