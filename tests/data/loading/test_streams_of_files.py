"""Streams with files of their own (`data.stream_of = "files"`): what each node opens, counted."""

from functools import cache

import numpy as np
import pytest
from field_datasets import CAMERA, write_dataset
from toy_data import Repack, Rows, ToyDataset, ToyPolicy

from rlinf_core import UserError
from rlinf_core.contract.datasets import LeRobotDatasetConfig
from rlinf_core.data.images.video import VideoReader
from rlinf_core.data.lerobot.source import open_lerobot
from rlinf_core.data.loading.chunked_sampling import ChunkedOrder, Chunks, chunks_of, spans_dealt
from rlinf_core.data.loading.loader import build_train_loader
from rlinf_core.data.loading.mixture import Source
from rlinf_core.data.loading.sampling import Batching
from rlinf_core.data.pipeline import Pipeline
from rlinf_core.data.transforms import Transform

FRAMES, EPISODES, FILES = 150, 200, 40
ROWS = FRAMES * EPISODES
STARTS = np.arange(FILES) * (ROWS // FILES)
FILE = np.searchsorted(STARTS, np.arange(ROWS), side="right") - 1
CHUNKS = Chunks(32, 16, 8192, by_file=True)
ORDER = ChunkedOrder(3, np.repeat(np.arange(EPISODES), FRAMES), ROWS, CHUNKS, STARTS)
OF_RUNS = ChunkedOrder(3, ORDER.episodes, ROWS, Chunks(32, 16, 8192))


@cache
def drawn(order, epoch):
    return order.draw(epoch)


def files_of(rows):
    return set(FILE[rows].tolist())


def test_an_epoch_takes_every_row_once_and_the_next_another_order():
    first, second = drawn(ORDER, 0), drawn(ORDER, 1)
    for epoch in (first, second):
        np.testing.assert_array_equal(np.sort(epoch.rows), np.arange(ROWS))
        runs = [epoch.run_of(start) for start in epoch.starts.tolist()]
        assert max(map(len, runs)) == 16
        assert all(FILE[run[0]] == FILE[run[-1]] and run[0] // FRAMES == run[-1] // FRAMES for run in runs)
    assert (first.rows == second.rows).mean() < 0.01
    np.testing.assert_array_equal(first.rows, ORDER.draw(0).rows)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16, 32])
def test_ranks_share_at_most_as_many_files_as_there_are_borders_in_every_epoch(ranks):
    once = [files_of(drawn(ORDER, 0).rows[rank::ranks]) for rank in range(ranks)]
    again = [files_of(drawn(ORDER, 1).rows[rank::ranks]) for rank in range(ranks)]
    assert once == again
    assert sum(map(len, once)) <= FILES + ranks - 1
    # Streams that are made of runs need nearly all files everywhere.
    mixed = [files_of(drawn(OF_RUNS, 0).rows[rank::ranks]) for rank in range(ranks)]
    assert sum(map(len, mixed)) > 0.8 * ranks * FILES


@pytest.mark.parametrize(("rows", "streams"), [(1, 1), (3, 8), (27, 48), (100, 48), (1000, 7), (1000, 12)])
def test_sizes_that_do_not_divide_lose_no_row(rows, streams):
    starts = np.unique(np.array([0, *(s for s in (1, 40, 41, 500) if s < rows)]))
    for epoch in range(3):
        chunks = Chunks(streams, 4, 4 * streams, by_file=True)
        order = ChunkedOrder(1, np.arange(rows) // 10, rows, chunks, starts).draw(epoch)
        assert sorted(order.rows) == list(range(rows))
        assert {row for start in order.starts for row in order.run_of(start)} == set(range(rows))


@pytest.mark.parametrize("streams", [1, 7, 12, 48, 64])
def test_neighbouring_spans_go_to_the_same_rank(streams):
    dealt = spans_dealt(streams)
    assert sorted(dealt.tolist()) == list(range(streams))
    for ranks in (n for n in (2, 4, 8, 16) if streams % n == 0):
        assert (np.diff(dealt % ranks) != 0).sum() == ranks - 1


def test_a_stream_reads_file_by_file_and_steps_are_of_as_many_files_as_there_are_streams():
    rows = drawn(ORDER, 0).rows
    # A span of 937 rows is in two or three files of 750; the buffer holds the last 256 rows of the one before.
    for stream in range(32):
        files = FILE[rows[stream::32]]
        assert 1 <= len(set(files.tolist())) <= 3
    seen = [len(files_of(rows[start : start + 256])) for start in range(0, ROWS - 256, 256)]
    assert np.mean(seen) > 0.7 * FILES
    assert abs(np.corrcoef(rows, np.arange(ROWS))[0, 1]) < 0.05  # Steps are spread over the dataset.


def test_small_files_are_mixed():
    """Files of one episode: otherwise a stream's buffer would hold little more than one episode."""
    starts = np.arange(EPISODES) * FRAMES
    chunks = Chunks(4, 16, 4 * 64, by_file=True)
    rows = ChunkedOrder(3, ORDER.episodes, ROWS, chunks, starts).draw(0).rows
    seen = [len(set((rows[at : at + 256] // FRAMES).tolist())) for at in range(0, ROWS - 256, 256)]
    assert np.mean(seen) > 12  # Of 4 streams, each with 64 rows of its 3 or 4 episodes at a time.


class Images(Transform):
    """The only camera's image, and the row's number."""

    def __call__(self, row):
        return {"images": {"base": row[CAMERA]}, "state": row["observation.state"], "actions": row["action"]} | {
            "index": row["index"]
        }


def played(source, ranks, steps, opened, *, rank, batch=16):
    """The rows of a rank; `opened` gets the files that it opens."""
    batching = Batching(batch, batch // ranks, 3, rank, ranks)
    chunks = Chunks(8, 4, 8 * 8, by_file=True)
    batches = build_train_loader([Source(source, Pipeline(Images()))], ToyPolicy(), batching, steps, chunks=chunks)
    VideoReader._opened, before = lambda self, path: opened.append(path) or before(self, path), VideoReader._opened
    try:
        return [row for one in batches for row in one["index"].tolist()]
    finally:
        VideoReader._opened = before
        source.close()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = write_dataset(tmp_path_factory.mktemp("streams") / "d", [12] * 24, version="v2.1")
    config = LeRobotDatasetConfig(repo_id=str(root), images={"base": CAMERA})
    return open_lerobot(config, 1, "train")


def test_two_nodes_of_two_ranks_open_disjoint_files_and_read_the_dataset_once(dataset):
    """An epoch of 288 rows in 24 files; a node is two ranks, whose streams are in two places each."""
    assert dataset.file_starts().tolist() == list(range(0, 288, 12))
    opened = {rank: [] for rank in range(4)}
    rows = [played(dataset, 4, (0, 18), opened[rank], rank=rank) for rank in range(4)]
    assert sorted(row for some in rows for row in some) == list(range(288))
    nodes = [{*opened[0], *opened[1]}, {*opened[2], *opened[3]}]
    assert len(nodes[0] | nodes[1]) == 24
    assert len(nodes[0] & nodes[1]) <= 3
    whole = sum(path.stat().st_size for path in nodes[0] | nodes[1])
    assert sum(path.stat().st_size for node in nodes for path in node) <= 1.15 * whole
    for files in opened.values():  # No rank opens a file again, though each keeps open what it has.
        assert len(files) == len(set(files)) <= 7


def test_a_resume_in_an_epoch_opens_only_what_is_left(dataset):
    rest, before, all_files = [], [], []
    done = played(dataset, 1, (0, 12), before, rank=0)
    left = played(dataset, 1, (12, 18), rest, rank=0)
    assert sorted(done + left) == list(range(288))
    # The rows that are left are in as many files; 8 streams hold at most 8 rows and a run each of earlier files.
    needed = {row // 12 for row in left}
    assert {int(path.stem[-6:]) for path in rest} == needed
    assert len(rest) == len(needed) < 24
    again = played(dataset, 2, (12, 18), all_files, rank=0) + played(dataset, 2, (12, 18), all_files, rank=1)
    assert sorted(again) == sorted(left)


def test_settings_and_sources():
    assert chunks_of(ToyDataset(shuffle="chunked", streams=48, stream_of="files")) == Chunks(48, 16, 8192, by_file=True)
    with pytest.raises(ValueError, match='stream_of has no effect without shuffle = "chunked"'):
        ToyDataset(stream_of="files")
    with pytest.raises(ValueError, match='stream_of = "files" is for reading the dataset\'s own files'):
        LeRobotDatasetConfig(shuffle="chunked", stream_of="files", cache="raw")
    with pytest.raises(UserError, match=r'data\.stream_of = "files": Rows does not say which rows share a file'):
        build_train_loader(
            [Source(Rows(100), Pipeline(Repack()))], ToyPolicy(), Batching(4, 4, 0), (0, 1), chunks=CHUNKS
        )
