import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toy_data import Repack, Rows, ToyPolicy

from rlinf_core.contract.datasets import LeRobotDatasetConfig
from rlinf_core.data.lerobot.source import open_lerobot
from rlinf_core.data.loading.loader import build_train_loader
from rlinf_core.data.loading.mixture import Source
from rlinf_core.data.loading.sampling import (
    TRAINING,
    Batching,
    check_batch,
    epoch_order,
    sample_generator,
    steps_per_epoch,
)
from rlinf_core.data.loading.validation import build_validation_batches
from rlinf_core.data.pipeline import Pipeline
from rlinf_core.errors import PluginError, RunError, UserError
from rlinf_core.testing.lerobot import CAMERAS

ROWS, GLOBAL = 27, 12  # Two steps an epoch; three rows are left out of each.


def loader(source=None, *, rank=0, ranks=1, micro=2, workers=0, start=0, stop=5, seed=3, pipeline=None):
    return build_train_loader(
        [Source(source or Rows(ROWS), pipeline or Pipeline(Repack()))],
        ToyPolicy(),
        Batching(GLOBAL, micro, seed, rank, ranks),
        (start, stop),
        num_workers=workers,
    )


def batches(*args, **kwargs):
    return list(loader(*args, **kwargs))


def steps(ranks, **kwargs):
    """{step: {index: noise}} over all ranks."""
    seen = {}
    for rank in range(ranks):
        found = batches(rank=rank, ranks=ranks, **kwargs)
        each = GLOBAL // (ranks * kwargs.get("micro", 2))
        for number, batch in enumerate(found):
            step = kwargs.get("start", 0) + number // each
            pairs = zip(batch["index"].tolist(), batch["noise"].tolist(), strict=True)
            for index, noise in pairs:
                assert index not in seen.setdefault(step, {})
                seen[step][index] = noise
    return seen


def test_samples_and_draws_do_not_depend_on_ranks_or_micro_batches():
    one = steps(1)
    assert [len(step) for step in one.values()] == [GLOBAL] * 5
    assert steps(2) == one
    assert steps(3) == one
    assert steps(2, micro=3) == one


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers):
    for ours, expected in zip(batches(workers=workers), batches(), strict=True):
        for key, value in expected.items():
            torch.testing.assert_close(ours[key], value, rtol=0, atol=0)


@pytest.mark.parametrize("start", [2, 3], ids=["at the start of an epoch", "within one"])
def test_a_resume_continues_as_if_uninterrupted(start):
    whole = batches()
    for ours, expected in zip(batches(start=start), whole[start * 6 :], strict=True):
        for key, value in expected.items():
            torch.testing.assert_close(ours[key], value, rtol=0, atol=0)


def test_a_resume_with_another_micro_batch_takes_the_same_samples():
    assert steps(2, start=3, micro=3) == {step: seen for step, seen in steps(1).items() if step >= 3}


def test_the_loader_leaves_the_random_numbers_of_the_process_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    batches()
    torch.testing.assert_close(torch.rand(3), expected)


def test_an_epoch_takes_every_row_once_and_the_next_another_order():
    order = epoch_order(5, 0, 1000)
    assert sorted(order) == list(range(1000))
    assert (order == epoch_order(5, 0, 1000)).all()
    for other in (epoch_order(5, 1, 1000), epoch_order(6, 0, 1000)):
        assert (order == other).sum() < 20
    seen = steps(1, stop=4)
    assert not seen[0].keys() & seen[1].keys()
    assert list(seen[0].items()) != list(seen[2].items())


def test_draws_differ_between_positions_epochs_and_seeds():
    keys = [(1, 0, 0), (1, 0, 1), (1, 1, 0), (2, 0, 0), (2**63 - 1, 0, 0)]
    draws = [sample_generator(*key).standard_normal(4).tolist() for key in keys]
    assert len({tuple(draw) for draw in draws}) == len(keys)
    long = sample_generator(1, 0, 0).standard_normal(10_000)
    assert not np.isin(sample_generator(1, 0, 1).standard_normal(100), long).any()


@pytest.mark.parametrize(("seed", "epoch", "position"), [(0, 0, 0), (42, 3, 2**40), (2**63 - 1, 2**31, 7)])
def test_draws_are_those_of_philox_with_seed_and_epoch_as_its_key(seed, epoch, position):
    philox = np.random.Philox(key=[seed, epoch], counter=[0, position, TRAINING, 0])
    expected = np.random.Generator(philox).standard_normal(1000)
    assert (sample_generator(seed, epoch, position).standard_normal(1000) == expected).all()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((100, 32, 2), "global_batch_size to 64 or 128, or micro_batch_size to 25"),
        ((10, 4, 3), "global_batch_size to 12"),
        ((7, 8, 1), "global_batch_size to 8, or micro_batch_size to 7"),
    ],
)
def test_batches_that_do_not_divide_are_told_what_would(sizes, message):
    with pytest.raises(UserError, match=message):
        check_batch(*sizes)


def test_batches_that_divide():
    assert check_batch(96, 16, 3) == 2
    assert steps_per_epoch(27, 12) == 2
    with pytest.raises(UserError, match=r"has 11 rows, fewer than trainer\.global_batch_size = 12"):
        steps_per_epoch(11, 12)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_that_cannot_be_read_is_named(workers):
    with pytest.raises(UserError) as caught:
        batches(Rows(ROWS, broken=13, error=UserError("clip.mp4 has no frame")), workers=workers)
    assert str(caught.value) == "clip.mp4 has no frame [toy, part-0.parquet, episode 1, frame 3]"
    with pytest.raises(RuntimeError) as broken:
        batches(Rows(ROWS, broken=13, error=RuntimeError("a defect")), workers=workers)
    shown = str(broken.value) + "".join(getattr(broken.value, "__notes__", ()))
    assert "a defect" in shown
    assert "toy, part-0.parquet, episode 1, frame 3" in shown


class Ending(Rows):
    """Reading a row ends the process, or tries to."""

    def __getitems__(self, indices):
        if self.broken in indices and self.error == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.broken in indices:
            sys.exit(0)
        return super().__getitems__(indices)


@pytest.mark.parametrize("workers", [0, 1])
def test_data_code_that_calls_exit_is_named(workers):
    with pytest.raises(PluginError, match=r"^test_loader: it called sys.exit\(0\) .* \(.*test_loader\.py:\d+\)$"):
        batches(Ending(ROWS, broken=13), workers=workers)


def test_a_worker_that_is_killed_is_one_message():
    with pytest.raises(
        RunError, match=r"^worker process \d+ of the loader, one of 1, was killed \(SIGKILL\), .* memory"
    ):
        batches(Ending(ROWS, broken=13, error="killed"), workers=1)


@pytest.mark.parametrize(
    ("code", "how"), [(-signal.SIGSEGV, r"crashed \(SIGSEGV\)"), (3, "has ended with exit code 3")]
)
def test_a_worker_that_crashes_is_one_message(code, how):
    batches = loader()
    batches._processes = [SimpleNamespace(pid=pid, exitcode=code) for pid, code in enumerate((None, -15, code))]
    assert re.search(
        f"^worker process 2 of the loader, one of 3, {how}, .* data.num_workers = 0", str(batches._dead_worker())
    )


KILLED = """
import multiprocessing, time
from test_loader import loader
if __name__ == "__main__":
    batches = iter(loader(workers=2))
    next(batches)
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
    time.sleep(60)
"""


def test_workers_of_a_run_that_is_killed_end(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    with subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as run:
        workers = [int(pid) for pid in run.stdout.readline().split()]
        run.send_signal(signal.SIGKILL)
    assert len(workers) == 2
    until = time.monotonic() + 30
    while any(map(running, workers)):
        assert time.monotonic() < until
        time.sleep(0.1)


def running(pid):
    """Whether a process is there, and not only waits to be forgotten."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_decode_videos(video_dataset):
    dataset = LeRobotDatasetConfig(
        repo_id=str(video_dataset.root), images={"base": CAMERAS[0]}, state=("observation.state",)
    )
    source = open_lerobot(dataset, 3, "train")
    source.__getitems__([0])  # A decoder that is open here does not come along.
    found = batches(source, workers=1, stop=3, pipeline=Pipeline(AddIndex(dataset.repack())))
    indices = torch.cat([batch["index"] for batch in found]).tolist()
    states = np.concatenate(video_dataset.states)
    assert sorted(indices) == list(range(36))
    np.testing.assert_array_equal(torch.cat([batch["state"] for batch in found]), states[indices])


class AddIndex(Repack):
    """The dataset's own repacking, and the row's number for `ToyPolicy.collate`."""

    def __init__(self, repack):
        object.__setattr__(self, "repack", repack)

    def __call__(self, row):
        return self.repack(row) | {"index": row["index"]}


def validation(ranks, *, rows=30, samples=13, micro=3):
    return [
        list(
            build_validation_batches(
                Source(Rows(rows), Pipeline(Repack())),
                ToyPolicy(),
                seed=3,
                val_samples=samples,
                micro_batch_size=micro,
                rank=rank,
                world_size=ranks,
            )
        )
        for rank in range(ranks)
    ]


@pytest.mark.parametrize(("ranks", "samples"), [(1, 13), (2, 13), (3, 13), (3, 2), (4, 1), (2, 500)])
def test_validation_looks_at_the_same_rows_on_any_number_of_ranks(ranks, samples):
    expected = {
        row.row: row.sample["noise"].tolist() for batch in validation(1, samples=samples)[0] for row in batch.rows
    }
    shares = validation(ranks, samples=samples)
    assert len({len(share) for share in shares}) == 1
    counted = [row for share in shares for batch in share for row in batch.rows]
    assert len(counted) == min(samples, 30)
    assert {row.row: row.sample["noise"].tolist() for row in counted} == expected
    for batch in (batch for share in shares for batch in share):
        assert 1 <= len(batch.batch["index"]) <= 3
        assert not batch.rows or [row.row for row in batch.rows] == batch.batch["index"].tolist()


def test_validation_rows_hold_the_datas_own_actions():
    row = validation(1)[0][0].rows[0]
    np.testing.assert_array_equal(row.target["actions"], Rows(30).without_images([row.row])[0]["actions"])
