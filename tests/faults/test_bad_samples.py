"""A corrupt image has a way on: skip it, the same on any ranks and after a resume, or leave its episode out."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faulty import assert_same, shards_of

CAMERA = "observation.images.front"


@pytest.fixture
def damaged(image_dataset, tmp_path):
    """A copy of the dataset in which two images, both of episode 1, are no images."""
    root = shutil.copytree(image_dataset.root, tmp_path / "damaged")
    path = sorted((root / "data").rglob("*.parquet"))[1]
    table = pq.read_table(path)
    images = table[CAMERA].to_pylist()
    for row in (2, 5):
        images[row] = {"bytes": b"no image", "path": None}
    at = table.schema.get_field_index(CAMERA)
    pq.write_table(table.set_column(at, table.schema.field(at), pa.array(images, table.schema.field(at).type)), path)
    return f"data.repo_id={root}"


def bad(runs):
    rows = [json.loads(line) for line in (runs.folder / "anomalies.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "bad_sample"]


@pytest.mark.slow
def test_bad_samples_are_skipped_alike_on_all_ranks_and_after_a_resume(runs, damaged):
    skip = (damaged, 'data.on_bad_sample="skip"')
    ended = runs.start(18, *skip)
    assert ended.returncode == 0, ended.stderr
    found = bad(runs)
    assert len(found) >= 4  # Three epochs of six steps.
    for row in found:
        for sample in row["samples"]:
            assert "episode 1, frame" in sample["where"]
            assert "contains a damaged image" in sample["error"]
            assert sample["replaced_by_row"] != sample["row"]
    assert ended.stdout.count("a bad sample was replaced by") == 2  # Each once.
    other = runs.next()
    assert other.start(7, *skip).returncode == 0
    assert other.start(18, *skip).returncode == 0
    assert bad(other) == found
    assert_same(other.folder, runs.folder, 18)


@pytest.mark.slow
def test_too_many_bad_samples_end_the_run_with_all_of_them(runs, damaged):
    ended = runs.start(18, damaged, 'data.on_bad_sample="skip"', "data.max_bad_samples=1")
    assert ended.returncode == 2
    assert "2 rows could not be read, more than data.max_bad_samples = 1" in ended.stderr
    assert ended.stderr.count("[tests/tiny") + ended.stderr.count("episode 1, frame") >= 2
    assert "Traceback" not in ended.stderr
    again = runs.start(18, damaged, 'data.on_bad_sample="skip"', "data.max_bad_samples=2")
    assert again.returncode == 0, again.stderr


@pytest.mark.slow
def test_a_run_that_a_bad_sample_has_stopped_goes_on_without_its_episode(runs, damaged):
    stopped = runs.start(18, damaged, "runner.save_interval=1")
    assert stopped.returncode == 2
    assert "contains a damaged image" in stopped.stderr
    step = runs.step
    assert step
    statistics = json.loads((runs.folder / "norm_stats.json").read_text())["norm_stats"]
    without = (damaged, "runner.save_interval=1", "data.exclude_episodes=[1]")
    refused = runs.start(18, *without)
    assert refused.returncode == 2
    assert "--allow-change" in refused.stderr
    gone_on = runs.start(step + 1, *without, "--allow-change")
    assert gone_on.returncode == 0, gone_on.stderr
    assert "the training rows have changed" in gone_on.stderr
    ended = runs.start(18, *without)
    assert ended.returncode == 0, ended.stderr
    assert json.loads((runs.folder / "norm_stats.json").read_text())["norm_stats"] == statistics
    rows = [json.loads(line)["step"] for line in (runs.folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(1, 19))
    assert shards_of(runs.folder, 18)
