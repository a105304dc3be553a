"""Samples with NaN: their step is skipped on all ranks alike, and they are named."""

import json
from itertools import accumulate

import pytest
from faulty import assert_same, numbers

LENGTHS = (9, 7, 12, 8)
"""Frames of the tiny dataset's episodes."""


def where(row):
    """Episode and frame of a row."""
    starts = [0, *accumulate(LENGTHS)]
    episode = max(number for number, start in enumerate(starts) if start <= row)
    return f"episode {episode}, frame {row - starts[episode]}"


@pytest.mark.slow
def test_samples_that_are_not_numbers_skip_one_step_on_all_ranks_and_are_named(runs):
    """Only rank 1 reads them. Weights that differed between ranks would show in every loss after that."""
    broken = {"kind": "nan", "rank": 1, "step": 4, "number": 0}
    ended = runs.start(6, faults=[broken])
    assert ended.returncode == 0, ended.stderr
    assert [row["skipped"] for row in numbers(runs.folder)] == [0, 0, 0, 1, 0, 0]
    (anomaly,) = [json.loads(line) for line in (runs.folder / "anomalies.jsonl").read_text().splitlines()]
    assert (anomaly["step"], anomaly["kind"]) == (4, "skipped")
    assert [(sample["rank"], sample["micro_batch"]) for sample in anomaly["samples"]] == [(1, 0), (1, 1), (1, 2)]
    for sample in anomaly["samples"]:
        assert "image" in sample["where"]
        assert ".parquet" in sample["where"]
        assert sample["where"].endswith(where(sample["row"]))
    again = runs.next()
    assert again.start(5, faults=[broken]).returncode == 0
    assert again.start(6).returncode == 0  # Continued after the step that was skipped.
    assert_same(again.folder, runs.folder, 6)
