"""A full disk: the last good checkpoint stays, the run continues until the next save, and then ends or recovers."""

import subprocess

import pytest
from faulty import Runs, assert_same, lines

WAITING = "runner.async_save=false"
"""The first checkpoint is then complete before the disk is full, however slow the machine is."""


@pytest.fixture
def small_disk(tmp_path):
    """A file system of two megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if mounted.returncode:
        pytest.skip(f"only the superuser may mount a small disk: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_a_disk_that_stays_full_ends_the_run_at_the_save_after(runs, left_alone):
    """Files of rank 1 may not grow beyond 100 bytes from step 5 on; saves are due after 3, 6 and 9."""
    ended = runs.start(12, WAITING, faults=[{"kind": "limit", "rank": 1, "step": 5, "size": 100}])
    assert ended.returncode == 2
    assert "step 6: THE CHECKPOINT WAS NOT SAVED: rank 1: File too large" in ended.stdout
    assert ended.stderr.count("step_000000003 is the last good one. Make room there. It failed twice in a row") == 1
    assert "Traceback" not in ended.stderr
    assert (runs.step, runs.end()["reason"], runs.end()["step"]) == (3, "mistake", 9)
    assert [path.name for path in (runs.folder / "checkpoints").iterdir()] == ["step_000000003"]
    before = lines(runs.folder)
    again = runs.start(12)
    assert again.returncode == 0, again.stderr
    assert lines(runs.folder)[:3] == before[:3]
    assert_same(runs.folder, left_alone(12), 12)


def test_a_disk_that_is_full_for_a_while_costs_one_checkpoint(small_disk, faulty_site, start_ranks, left_alone):
    """The whole run is on the small disk, so that rows of the metrics do not fit either."""
    runs = Runs(faulty_site, small_disk, start_ranks)
    faults = [
        {"kind": "fill", "rank": 0, "step": step, "folder": str(small_disk), "full": full}
        for step, full in ((5, True), (8, False))
    ]
    ended = runs.start(12, WAITING, faults=faults)
    assert ended.returncode == 0, ended.stderr
    assert "step 6: THE CHECKPOINT WAS NOT SAVED: " in ended.stdout
    assert "No space left on device" in ended.stdout
    assert [step for step in (3, 6, 9, 12) if f"step {step}: saved" in ended.stdout] == [3, 9, 12]
    assert_same(runs.folder, left_alone(12), 12)


@pytest.mark.slow
def test_where_even_the_end_does_not_fit_it_is_told(small_disk, faulty_site, start_ranks, left_alone):
    """The whole disk is full from step 5 on, `exit.json` and rows of the metrics included."""
    runs = Runs(faulty_site, small_disk, start_ranks)
    fill = {"kind": "fill", "rank": 0, "step": 5, "folder": str(small_disk), "full": True}
    ended = runs.start(12, WAITING, faults=[fill])
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("step_000000003 is the last good one. Make room there. It failed twice in a row") == 1
    assert "warning: exit.json could not be written to " in ended.stderr
    assert "Traceback" not in ended.stderr
    (small_disk / "ballast").unlink()
    again = runs.start(12)
    assert again.returncode == 0, again.stderr
    assert_same(runs.folder, left_alone(12), 12)
