"""Running statistics and normalisation against recorded numbers (golden README, sections 2 and 4)."""

import json

import numpy as np
import pytest
from golden import GOLDEN

from rlinf_core.data.normalize import Normalize, load_norm_stats
from rlinf_core.data.statistics.compute import RunningStats

RECORDED = GOLDEN / "norm_stats" / "running_stats.npz"
CASES = sorted({key.split("|")[0] for key in np.load(RECORDED)}) if RECORDED.is_file() else []
TRANSFORMS = sorted(path.parent.name for path in (GOLDEN / "transforms").glob("*/norm_stats.json"))


@pytest.fixture(scope="module")
def recorded():
    with np.load(RECORDED) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("case", CASES)
def test_running_statistics(case, recorded, report):
    running = RunningStats()
    batches = sorted(
        (key for key in recorded if key.startswith(f"{case}|batch")), key=lambda key: int(key.split("batch")[1])
    )
    assert batches
    for key in batches:
        running.update(recorded[key])
    stats = running.result()
    rounding = 1e-6 if recorded[batches[0]].dtype == np.float32 else 1e-12
    for name, tolerance in (("mean", rounding), ("std", rounding), ("q01", 0.0), ("q99", 0.0)):
        ours, expected = getattr(stats, name), recorded[f"{case}|{name}"]
        assert ours.dtype == expected.dtype
        distance = np.abs(ours - expected).max() / max(np.abs(expected).max(), np.finfo(np.float64).tiny)
        report("norm_stats", f"{case}: {name}", distance, tolerance)


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


EXAMPLES = sorted((GOLDEN / "norm_stats").glob("*/norm_stats.json"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.parent.name)
def test_the_layout_is_read(path):
    stats = load_norm_stats(path)
    assert set(stats) == {"state", "actions"}
    assert stats["state"].mean.dtype == np.float64
