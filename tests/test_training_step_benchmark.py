"""`benchmarks/training_step.py` at a minimal size: that it measures what it says, not how fast anything is."""

import json
import os
import sys
from pathlib import Path

import pytest
from policy_step import on_card, on_cpu
from policy_step.cases import CASES, dimensions, make_samples, padded
from policy_step.on_card import Row, measure, rows
from policy_step.table import RATIOS, markdown
from policy_step.worker import Job

ROOT = Path(__file__).parents[1]
RECIPE = on_cpu.Against("vs_recipe", "two_of_three", checkpointing=True)
NO_EMPTY = on_cpu.Against("no_empty", "two_of_three", empty_cameras=0)
LIBERO = CASES["two_of_three"]


def one_case(ways):
    return on_cpu.one_case(LIBERO, dimensions("minimal", LIBERO), ways, 1, 1, compiled=False)


def test_both_sides_compute_the_same_and_are_timed():
    pytest.importorskip("lerobot")
    pytest.importorskip("transformers", reason="lerobot's policies need it: uv sync --group test")
    found = one_case([RECIPE, NO_EMPTY])
    assert found["loss_difference"] <= on_cpu.TOLERANCE
    assert found["seconds"].keys() == {"ours", "vs_recipe", "no_empty"}
    for against in found["times_as_fast"].values():
        assert 0 < against["least"] == against["greatest"]


def test_sides_that_differ_are_not_timed(monkeypatch):
    pytest.importorskip("lerobot")
    pytest.importorskip("transformers", reason="lerobot's policies need it: uv sync --group test")
    monkeypatch.setattr(on_cpu, "copy_weights", lambda theirs, ours, sized: on_cpu.randomize(ours))
    with pytest.raises(on_cpu.DifferentLossesError, match=r"LIBERO: our loss .* Nothing is timed"):
        one_case([NO_EMPTY])


def test_ours_alone_needs_no_peer():
    assert one_case([])["times_as_fast"] == {}


def test_peers_get_the_same_samples_filled_up():
    sized = dimensions("minimal", LIBERO)
    samples = make_samples(LIBERO, sized, 3, spread=4.0)
    batch = padded(samples, 3)
    assert [mask.tolist() for mask in batch["image_masks"]] == [[True] * 3, [True] * 3, [False] * 3]
    assert batch["tokens"].shape == (3, 200)
    assert len(set(batch["token_mask"].sum(1).tolist())) > 1
    picture = samples[1]["images"]["left_wrist_0_rgb"]
    assert (batch["images"][1][1].transpose(1, 2, 0) + 1) * 127.5 == pytest.approx(picture, abs=1e-3)
    assert (batch["images"][2] == -1).all()


def test_no_more_is_computed_than_reaches_the_loss():
    over = on_cpu.flops_over_useful(["small"])
    assert over.keys() == {f"{case}, small" for case in CASES}
    assert min(over.values()) >= 0.99
    assert max(over.values()) <= 1.05


@pytest.fixture
def plain_files(tmp_path, monkeypatch):
    """Processes see torch, NumPy and the source folders, and nothing that an installation brings besides."""
    missing = ("pydantic", "pluggy", "lerobot", "transformers", "safetensors", "PIL", "sentencepiece", "rich")
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules |= dict.fromkeys({missing!r})\n")
    sources = [ROOT / "rlinf_core" / "src", ROOT / "rlinf_plugins_openpi" / "src"]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, [tmp_path, *sources])))
    return tmp_path


@pytest.mark.slow
def test_a_row_is_measured_from_plain_files(plain_files):
    first, *others = rows("minimal", "cpu", 2, 1, steps=1)
    found = measure(
        [first, others[0]], {"ours": sys.executable}, plain_files, minutes=4, changes={"compiled": False, "warm_up": 0}
    )
    row = found["rows"][first.name]
    assert row["samples_per_second"] > 0
    assert row["with_ema"]["samples_per_second"] > 0
    assert row["recompiled_when_warm"] == 0
    assert found["not_measured"] == {others[0].name: "no environment for openpi: --peer-python"}
    assert json.loads((plain_files / "training_step.json").read_text()) == found
    assert f"| {first.name} | {row['samples_per_second']} |" in (plain_files / "training_step.md").read_text()


def test_a_smaller_micro_batch_is_taken_where_memory_is_short(monkeypatch, tmp_path):
    tried = []

    def process(job, *_):
        tried.append(job.micro_batch)
        return {"error": "out of memory"} if job.micro_batch > 4 else {"error": "ended otherwise"}

    monkeypatch.setattr(on_card, "_process", process)
    job = Job("ours", "two_of_three", "minimal", "cpu", samples=16, micro_batch=16)
    found = measure([Row("big", job, (8, 4, 2))], {"ours": "python"}, tmp_path, minutes=1, changes={})
    assert tried == [16, 8, 4]
    assert found["not_measured"] == {"big": "ended otherwise"}


def test_when_the_time_is_over_it_is_said(tmp_path):
    job = Job("ours", "two_of_three", "minimal", "cpu", samples=16, micro_batch=16)
    found = measure([Row("late", job)], {"ours": "python"}, tmp_path, minutes=0, changes={})
    assert found["not_measured"] == {"late": "the 0 minutes were over"}


def test_the_table_has_shares_of_the_peak_and_ratios():
    def row(side, speed):
        return {
            "job": {"side": side, "micro_batch": 16},
            "samples_per_second": speed,
            "useful_tflops_per_second": 7.87 * speed,
            "peak_memory_gb": 70.0,
            "first_step_seconds": 50.0,
            "host_waits": None,
            "recompiled_when_warm": 0,
            "card": "NVIDIA H100 80GB HBM3",
            "versions": {"torch": "2.11.0"},
        }

    ours, peer = RATIOS["against openpi as shipped"]
    text = markdown({"rows": {ours: row("ours", 50.0), peer: row("openpi", 20.0)}, "not_measured": {}})
    assert f"| {ours} | 50.0 | 62 | 39.8 % | 70.0 |" in text
    assert "against openpi as shipped: 2.50 times as fast" in text


def test_all_rows_that_ratios_name_are_measured():
    names = [row.name for row in rows("base", "cuda", 32, 16, steps=10)]
    assert len(set(names)) == len(names)
    assert {name for pair in RATIOS.values() for name in pair} <= set(names)
