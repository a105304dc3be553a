"""The chunked order (contract 13): which rows it uses, how well it mixes, and that each run is read once."""

import numpy as np
import pytest
import torch
from toy_data import Repack, Rows, ToyDataset, ToyPolicy

from rlinf_core import UserError
from rlinf_core.config.mixture import misplaced_keys
from rlinf_core.data.loading.chunked_batches import HeldRuns, pack, unpack
from rlinf_core.data.loading.chunked_sampling import ChunkedOrder, Chunks, check_streams, chunks_of
from rlinf_core.data.loading.loader import build_train_loader
from rlinf_core.data.loading.mixture import Source
from rlinf_core.data.loading.sampling import Batching, epoch_order
from rlinf_core.data.pipeline import Pipeline
from rlinf_core.loggers.jsonl import read_rows

LENGTH, EPISODES = 150, 200
ORDER = ChunkedOrder(3, np.repeat(np.arange(EPISODES), LENGTH), LENGTH * EPISODES, Chunks(64, 16, 8192))
SMALL, GLOBAL = Chunks(streams=48, frames=4, buffer=48 * 6), 12
ROWS = 1207  # 100 steps an epoch; seven rows are left out of each.


def test_an_epoch_takes_every_row_once_and_the_next_another_order():
    first, second = ORDER.draw(0).rows, ORDER.draw(1).rows
    for rows in (first, second):
        np.testing.assert_array_equal(np.sort(rows), np.arange(LENGTH * EPISODES))
    assert (first == second).mean() < 0.01
    np.testing.assert_array_equal(first, ORDER.draw(0).rows)
    assert (ChunkedOrder(4, ORDER.episodes, ORDER.samples, ORDER.chunks).draw(0).rows == first).mean() < 0.01


@pytest.mark.parametrize(("rows", "streams"), [(1, 1), (3, 8), (27, 48), (100, 48), (1000, 7)])
def test_sizes_that_do_not_divide_lose_no_row(rows, streams):
    for epoch in range(3):
        order = ChunkedOrder(1, np.arange(rows) // 10, rows, Chunks(streams, 4, 4 * streams)).draw(epoch)
        assert sorted(order.rows) == list(range(rows))
        assert {row for start in order.starts for row in order.run_of(start)} == set(range(rows))


def test_runs_stay_within_an_episode_and_are_cut_elsewhere_in_each_epoch():
    lengths = []
    for epoch in range(2):
        order = ORDER.draw(epoch)
        runs = [order.run_of(start) for start in order.starts]
        assert max(map(len, runs)) == 16
        assert all(ORDER.episodes[run[0]] == ORDER.episodes[run[-1]] for run in runs)
        assert np.mean([len(run) for run in runs]) > 12  # Episodes of 150 end within a run, and so do streams.
        lengths.append(set(order.starts.tolist()))
    assert len(lengths[0] & lengths[1]) < 0.3 * len(lengths[0])


def test_each_stream_holds_a_bounded_number_of_rows_of_its_own():
    order, streams = ORDER.draw(0), ORDER.chunks.streams
    for stream in (0, 17, 63):
        held, most, seen = set(), 0, set()
        for row in order.rows[stream::streams].tolist():
            if row not in held:
                assert row not in seen  # A run is read once.
                held |= set(order.run_of(row))
                seen |= held
            most = max(most, len(held))
            held.remove(row)
        assert not held
        assert ORDER.chunks.capacity // 2 < most <= ORDER.chunks.most_held / streams


def test_rows_are_mixed_nearly_as_in_random_order():
    """Numbers of one epoch of 30,000 rows; a step of 256 takes four rows of each stream."""
    size, total = 256, LENGTH * EPISODES
    chunked, random = ORDER.draw(0).rows, epoch_order(3, 0, total)
    # No row comes early or late by where it stands in the data: ranks of places are uncorrelated.
    for rows in (chunked, random):
        assert abs(np.corrcoef(rows, np.arange(total))[0, 1]) < 0.05
        # Uniform places differ from uniform rows by a third of all, on average.
        assert abs(np.abs(rows - np.arange(total)).mean() / total - 1 / 3) < 0.02
    # Neighbours in a step, which come from different streams, have nothing to do with one another.
    for rows in (chunked, random):
        assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.04
    # Of random rows, a thousandth of the pairs in a step are less than 16 frames apart. Chunked adds those of one run:
    # a step takes four from the 128 of a stream's buffer, so 3 / 255 of the pairs share one, 15 / 128 of them a run.
    near = [np.mean([_near(rows[i : i + size]) for i in range(0, total - size, size)]) for rows in (chunked, random)]
    assert near[1] == pytest.approx(31 / total, rel=0.3)
    assert near[0] < 1.6 * near[1]
    # Every step is of nearly as many episodes as random ones are: expected are 200 * (1 - (199 / 200) ** 256) = 145.
    seen = [
        np.mean([len(set(rows[i : i + size] // LENGTH)) for i in range(0, total - size, size)])
        for rows in (chunked, random)
    ]
    assert seen[0] > 0.95 * seen[1]


def _near(rows):
    """Share of pairs that are less than 16 frames apart."""
    apart = np.abs(rows[:, None] - rows)
    return ((apart < 16).sum() - len(rows)) / (len(rows) * (len(rows) - 1))


def test_no_stream_is_favoured():
    """Each row is in each quarter of the epoch equally often."""
    counts = np.zeros((4, 10))
    order = ChunkedOrder(1, np.arange(1000) // 100, 1000, Chunks(8, 8, 256))
    for epoch in range(60):
        quarter = np.empty(1000, int)
        quarter[order.draw(epoch).rows] = np.arange(1000) // 250
        np.add.at(counts, (quarter, np.arange(1000) // 100), 1)
    expected = 60 * 100 / 4
    assert abs(counts - expected).max() < 0.15 * expected


def loader(*, rank=0, ranks=1, micro=2, workers=0, start=98, stop=103, chunks=SMALL, rows=None):
    """The steps around the end of the first epoch, of 100 steps."""
    return build_train_loader(
        [Source(rows or Rows(ROWS), Pipeline(Repack()))],
        ToyPolicy(),
        Batching(GLOBAL, micro, 3, rank, ranks),
        (start, stop),
        num_workers=workers,
        chunks=chunks,
    )


def steps(ranks=1, *, start=98, **options):
    """{step: {row: noise}} over all ranks."""
    seen = {}
    for rank in range(ranks):
        each = GLOBAL // (ranks * options.get("micro", 2))
        for number, batch in enumerate(loader(rank=rank, ranks=ranks, start=start, **options)):
            rows = dict(zip(batch["index"].tolist(), batch["noise"].tolist(), strict=True))
            assert not rows.keys() & seen.setdefault(start + number // each, {}).keys()
            seen[start + number // each] |= rows
    return seen


@pytest.mark.parametrize("chunks", [None, SMALL], ids=["random", "chunked"])
def test_steps_are_the_same_on_any_number_of_ranks_and_workers_and_after_a_resume(chunks):
    whole = steps(chunks=chunks)
    assert [len(step) for step in whole.values()] == [GLOBAL] * 5
    assert all(steps(ranks, chunks=chunks) == whole for ranks in (2, 3))
    assert steps(2, micro=3, chunks=chunks) == whole
    later = {step: rows for step, rows in whole.items() if step >= 101}  # In the middle of the second epoch.
    for ranks, workers in ((1, 2), (2, 1), (3, 0)):
        assert steps(ranks, workers=workers, start=101, chunks=chunks) == later


def test_workers_change_no_batch():
    expected = list(loader())
    for workers in (1, 2):
        for ours, theirs in zip(loader(workers=workers), expected, strict=True):
            for key, value in theirs.items():
                torch.testing.assert_close(ours[key], value, rtol=0, atol=0)


class Counted(Rows):
    """Rows that note which of them are read together."""

    def __getitems__(self, indices):
        self.__dict__.setdefault("reads", []).append(list(indices))
        return super().__getitems__(indices)


@pytest.mark.parametrize("ranks", [1, 3])
def test_each_run_is_read_once_and_what_is_held_is_bounded(ranks):
    read, most = [], 0
    for rank in range(ranks):
        rows = Counted(ROWS)
        batches = loader(rank=rank, ranks=ranks, start=0, stop=100, rows=rows)
        for _ in batches:
            held = batches.dataset.held
            most = max(most, len(held))
            assert len(held) <= SMALL.most_held / ranks
            assert held.bytes == len(held) * (4 * 2 * 4 + 3 * 4 + 2 * 2 * 3)  # actions, state, one picture
        read += rows.reads
    assert most > SMALL.buffer / ranks / 2
    flat = [row for indices in read for row in indices]
    assert len(flat) == len(set(flat))  # Nothing twice ...
    assert all(indices == list(range(indices[0], indices[0] + len(indices))) for indices in read)
    assert len(flat) / len(read) > 2.2  # ... and in runs of four, but for the ends of episodes of ten, and of streams.


def test_a_resume_reads_only_what_was_not_drawn():
    rows = Counted(ROWS)
    before = {row for step in steps(start=0, stop=50).values() for row in step}
    list(loader(start=50, stop=100, rows=rows))
    assert not before & {row for indices in rows.reads for row in indices}


def test_held_samples_keep_no_larger_array_alive():
    frames = np.zeros((16, 8, 8, 3), np.uint8)
    held = HeldRuns()
    order = ChunkedOrder(0, np.zeros(16, int), 16, Chunks(1, 16, 16)).draw(0)
    held.begin(order, 0)
    rows = order.rows.tolist()
    samples = held.take(rows[:1], lambda wanted: [{"images": {"base": frames[row]}} for row in wanted])
    samples += held.take(rows[1:], lambda wanted: [{"images": {"base": frames[row]}} for row in wanted])
    assert len(samples) == 16
    assert all(sample["images"]["base"].base is None for sample in samples)
    assert held.bytes == 0


def test_samples_cross_processes_as_they_are():
    given = [{"state": np.arange(3.0), "images": {"a": np.full((5, 7, 3), 9, np.uint8)}, "prompt": "go"}, {"n": 1}]
    (first, second), whole = unpack(pack([0, 1], given)), unpack(pack([], []))
    np.testing.assert_array_equal(first["state"], given[0]["state"])
    np.testing.assert_array_equal(first["images"]["a"], given[0]["images"]["a"])
    assert (first["prompt"], second, whole) == ("go", {"n": 1}, [])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_row_that_cannot_be_read_is_named(workers):
    broken = Rows(ROWS, broken=13, error=UserError("clip.mp4 has no frame"))
    with pytest.raises(UserError, match=r"^clip.mp4 has no frame \[toy, part-0.parquet, episode 1, frame 3\]$"):
        list(loader(rows=broken, workers=workers, start=0, stop=100))


def test_ranks_must_divide_the_streams():
    check_streams(SMALL, 3)
    with pytest.raises(UserError, match=r"data.streams = 64 is not a multiple of the 3 ranks: set it to 63 or 66"):
        check_streams(Chunks(64, 16, 8192), 3)
    with pytest.raises(UserError, match="not a multiple of the 3 ranks"):
        loader(ranks=3, chunks=Chunks(64, 4, 64 * 6))


def test_settings_that_do_nothing_or_cannot_work_are_refused():
    assert chunks_of(ToyDataset(shuffle="chunked", streams=48)) == Chunks(48, 16, 8192)
    assert chunks_of(ToyDataset()) is None
    with pytest.raises(ValueError, match='streams has no effect without shuffle = "chunked"'):
        ToyDataset(streams=48)
    with pytest.raises(
        ValueError,
        match="shuffle_buffer = 100 is less than streams x chunk_frames = 1024, one run of frames per stream",
    ):
        ToyDataset(shuffle="chunked", shuffle_buffer=100)


def test_a_run_takes_what_its_config_says_and_goes_on_exactly(train_toy):
    """Whose rows are 200, whose steps take 20; the chunked order differs from the random one."""
    chunked = ["data.shuffle=chunked", "data.streams=48", "data.chunk_frames=4", "data.shuffle_buffer=192"]

    def losses(trainer):
        return [row["loss"] for row in read_rows(trainer.run.folder / "metrics.jsonl") if "loss" in row]

    whole = losses(train_toy("runner.name=whole", "runner.max_steps=14", *chunked))
    train_toy("runner.name=parts", "runner.max_steps=4", *chunked)
    assert losses(train_toy("runner.name=parts", "runner.max_steps=14", *chunked)) == whole
    assert losses(train_toy("runner.name=random", "runner.max_steps=1")) != whole[:1]
    with pytest.raises(UserError, match=r"data\.shuffle"):
        train_toy("runner.name=parts", "runner.max_steps=15")


def test_a_mixture_in_chunked_order_is_refused():
    (place, why), *_ = misplaced_keys({"mixture": [{}, {"shuffle": "chunked"}]})
    assert place == ("mixture", 1, "shuffle")
    assert "is for a run of one dataset" in why
    assert (("shuffle",), why) in list(misplaced_keys({"mixture": [{}], "shuffle": "chunked"}))
    assert not list(misplaced_keys({"mixture": [{"shuffle": "random"}]}))
