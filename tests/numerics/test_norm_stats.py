"""Running statistics and normalisation against recorded numbers (golden README, sections 2 and 4)."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from rlinf_core.data.normalize import Normalize, RunningStats, load_norm_stats

GOLDEN = Path(os.environ.get("RLINF_GOLDEN_DIR", Path(__file__).parents[1] / "golden"))
CASES = sorted(json.loads((GOLDEN / "norm_stats" / "meta.json").read_text()))
TRANSFORMS = sorted(path.parent.name for path in (GOLDEN / "transforms").glob("*/norm_stats.json"))


@pytest.fixture(scope="module")
def recorded():
    with np.load(GOLDEN / "norm_stats" / "running_stats.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize("case", CASES)
def test_running_statistics(case, recorded):
    running = RunningStats()
    batches = sorted(
        (key for key in recorded if key.startswith(f"{case}|batch")), key=lambda key: int(key.split("batch")[1])
    )
    assert batches
    for key in batches:
        running.update(recorded[key])
    stats = running.result()
    rtol = 1e-6 if recorded[batches[0]].dtype == np.float32 else 1e-12
    for name in ("mean", "std"):
        expected = recorded[f"{case}|{name}"]
        assert getattr(stats, name).dtype == expected.dtype
        np.testing.assert_allclose(getattr(stats, name), expected, rtol=rtol)
    for name in ("q01", "q99"):
        np.testing.assert_array_equal(getattr(stats, name), recorded[f"{case}|{name}"])


@pytest.mark.parametrize("config", TRANSFORMS)
def test_normalize_and_its_inverse(config):
    folder = GOLDEN / "transforms" / config
    mode = "quantile" if json.loads((folder / "meta.json").read_text())["use_quantile_norm"] else "mean_std"
    normalize = Normalize(load_norm_stats(folder / "norm_stats.json"), mode)
    with np.load(folder / "data.npz") as arrays:
        stage = {
            name: {key: arrays[f"{name}|{key}"] for key in ("state", "actions")}
            for name in ("data_transforms", "normalize", "output_in", "output_unnormalized")
        }
    normalized, restored = normalize(stage["data_transforms"]), normalize.inverse(stage["output_in"])
    for key in ("state", "actions"):
        for ours, expected in ((normalized, stage["normalize"]), (restored, stage["output_unnormalized"])):
            assert ours[key].dtype == expected[key].dtype
            np.testing.assert_allclose(ours[key], expected[key], rtol=1e-12, atol=1e-12)


def test_the_layout_is_read():
    stats = load_norm_stats(GOLDEN / "norm_stats" / "json_layout_example" / "norm_stats.json")
    assert set(stats) == {"state", "actions"}
    assert stats["state"].mean.dtype == np.float64
