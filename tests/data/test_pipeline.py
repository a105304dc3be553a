import subprocess
import sys

import numpy as np
import pytest
from toy_data import HORIZON, Repack, Rows, Shift, ToyDataset, ToyPolicy

from rlinf_core.data.pipeline import Pipeline, build_pipeline
from rlinf_core.data.statistics.compute import compute_norm_stats
from rlinf_core.errors import UserError


@pytest.fixture(scope="module")
def pipeline():
    dataset = ToyDataset()
    return build_pipeline(dataset, ToyPolicy(), compute_norm_stats(Rows(40), [dataset.repack(), *dataset.transforms()]))


def test_encoding_follows_the_order_and_ends_in_float32(pipeline):
    row = Rows(40).__getitems__([7])[0]
    sample = pipeline.encode(row)
    assert sample["actions"].shape == (HORIZON, 5)
    assert {sample[key].dtype for key in ("state", "actions")} == {np.dtype(np.float32)}
    assert sample["images"]["base"].dtype == np.uint8
    stats = pipeline.normalize.stats["actions"]
    shifted = (row["actions"].astype(np.float64) - row["state"][0]) * 3.0
    expected = (shifted - stats.q01) / (stats.q99 - stats.q01 + 1e-6) * 2 - 1
    np.testing.assert_allclose(sample["actions"][:, :2], expected, rtol=1e-6)


def test_decoding_gives_back_the_targets(pipeline):
    row = Rows(40).__getitems__([23])[0]
    sample, target = pipeline.encode(row), pipeline.target(row)
    np.testing.assert_array_equal(target["actions"], row["actions"])
    decoded = pipeline.decode(sample["actions"], sample)
    np.testing.assert_allclose(decoded[:, :2], target["actions"], atol=1e-4)
    several = pipeline.decode(np.stack([sample["actions"], 0 * sample["actions"]]), sample)
    assert several.shape == (2, *decoded.shape)
    np.testing.assert_array_equal(several[0], decoded)
    assert np.abs(several[1] - decoded).max() > 0.1


def test_observations_without_actions_can_be_encoded():
    class StateOnly(Repack):
        def __call__(self, row):
            return {"state": row["state"], "images": {}}

    assert Pipeline(StateOnly()).encode(Rows(3).without_images([1])[0])["state"].tolist() == [1.0, -2.0, 1.0]


def test_inverses_run_in_reverse():
    first, second = Shift(scale=3.0), Shift(scale=0.5)
    pipeline = Pipeline(Repack(), dataset=(first,), policy=(second,))
    row = Rows(9).without_images([4])[0]
    sample = pipeline.encode(row)
    np.testing.assert_allclose(pipeline.decode(sample["actions"], sample), row["actions"], atol=1e-6)


def test_a_normalising_policy_needs_statistics():
    with pytest.raises(UserError, match="'toy' normalises by quantile, but there are no statistics"):
        build_pipeline(ToyDataset(), ToyPolicy(), None)


def test_the_data_path_leaves_torch_and_lerobot_unloaded():
    code = (
        "import sys, rlinf_core.data.pipeline, rlinf_core.data.normalize, rlinf_core.data.lerobot.source\n"
        "print(sorted({'torch', 'lerobot', 'datasets', 'pandas'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
