"""Datasets in object storage: what is downloaded when, how much of it stays, and what is said when storage fails."""

import os
import pickle
import shutil
import subprocess
import sys
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from field_datasets import CAMERA, number_of, of_frame, write_dataset
from fsspec.implementations.local import LocalFileSystem
from toy_data import ToyPolicy

from rlinf_core import UserError
from rlinf_core.contract.datasets import LeRobotDatasetConfig
from rlinf_core.data import storage
from rlinf_core.data.lerobot.files import find_dataset
from rlinf_core.data.lerobot.source import open_lerobot
from rlinf_core.data.loading.chunked_sampling import chunks_of
from rlinf_core.data.loading.encoding import read_rows
from rlinf_core.data.loading.loader import build_train_loader
from rlinf_core.data.loading.mixture import Source
from rlinf_core.data.loading.sampling import Batching
from rlinf_core.data.pipeline import Pipeline
from rlinf_core.data.remote import address, dataset
from rlinf_core.data.remote.address import parse_address
from rlinf_core.data.remote.dataset import RemoteDataset, open_remote
from rlinf_core.data.remote.download_cache import KIND, DownloadCache, RemoteFile, StorageError
from rlinf_core.data.transforms import Transform
from rlinf_core.errors import RunError
from rlinf_core.hub import local_path
from rlinf_core.training.checkpoint.image_files import record_images

EPISODES, FRAMES = 24, 12
CHUNKED = {"shuffle": "chunked", "stream_of": "files", "streams": 8, "chunk_frames": 4, "shuffle_buffer": 64}


class Storage(LocalFileSystem):
    """Object storage in a folder, which counts what is asked for, and fails as it is told to."""

    cachable = False

    def __init__(self):
        super().__init__()
        self.listed, self.got, self.failing = 0, [], {}

    def find(self, *arguments, **options):
        self.listed += 1
        return super().find(*arguments, **options)

    def get_file(self, there, here, **options):
        self.got.append(Path(there).name)
        for part, error in self.failing.items():
            if part in there:
                raise error
        return super().get_file(there, here, **options)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("bucket") / "arm", [FRAMES] * EPISODES, version="v2.1")


@pytest.fixture
def bucket(original, tmp_path, monkeypatch):
    """The address of a copy of the dataset, and its storage; an empty cache."""
    root = tmp_path / "bucket/arm"
    shutil.copytree(original, root)
    monkeypatch.setenv("RLINF_CACHE", str(tmp_path / "cache"))
    served = Storage()
    monkeypatch.setattr(dataset, "open_filesystem", lambda address, setting: served)
    dataset._listed.cache_clear()
    yield root, served
    dataset._listed.cache_clear()


def config(root, **options):
    return LeRobotDatasetConfig(repo_id=f"file://{root}", images={"base": CAMERA}, **options)


def downloaded(tmp_path):
    return [path for path in (tmp_path / "cache" / KIND).rglob("files/**/*") if path.is_file()]


def used_bytes(tmp_path):
    with suppress(FileNotFoundError):  # Room is being made in the background.
        return sum(path.stat().st_size for path in downloaded(tmp_path))
    return 0


class Images(Transform):
    """The camera's image, and the row's number."""

    def __call__(self, row):
        return {"images": {"base": row[CAMERA]}, "state": row["observation.state"], "actions": row["action"]} | {
            "index": row["index"]
        }


def loader(source, data, *, rank=0, ranks=1, steps=(0, 18), workers=0):
    batching = Batching(16, 16 // ranks, 3, rank, ranks)
    given = [Source(source, Pipeline(Images()))]
    return build_train_loader(given, ToyPolicy(), batching, steps, num_workers=workers, chunks=chunks_of(data))


def test_rows_are_those_of_the_folder_and_a_restart_downloads_nothing(bucket, tmp_path):
    root, served = bucket
    local = open_lerobot(LeRobotDatasetConfig(repo_id=str(root), images={"base": CAMERA}), 2, "train")
    remote = open_lerobot(config(root), 2, "train")
    for ours, theirs in zip(remote.__getitems__([0, 13, 287]), local.__getitems__([0, 13, 287]), strict=True):
        assert ours.keys() == theirs.keys()
        np.testing.assert_array_equal(ours[CAMERA], theirs[CAMERA])
        np.testing.assert_array_equal(ours["action"], theirs["action"])
    assert remote.fingerprint() == local.fingerprint()
    count = len(served.got)
    assert count == len(downloaded(tmp_path)) == 2 * EPISODES + 5
    dataset._listed.cache_clear()
    open_lerobot(config(root), 2, "train").__getitems__([5])
    assert (len(served.got), served.listed) == (count, 2)


def test_in_chunked_order_videos_are_downloaded_when_they_are_read(bucket, tmp_path):
    root, served = bucket
    data = config(root, **CHUNKED)
    source = open_lerobot(data, 1, "train")
    assert not [name for name in served.got if name.endswith("mp4")]
    assert len(served.got) == EPISODES + 5  # Metadata, and the numbers of all rows.
    nodes = []
    for ranks in ((0, 1), (2, 3)):
        served.got.clear()
        rows = [row for rank in ranks for batch in loader(source, data, rank=rank, ranks=4) for row in batch["index"]]
        assert len(rows) == 288 // 2
        nodes.append(list(served.got))
        assert len(served.got) == len(set(served.got))
        for path in downloaded(tmp_path):  # As on another machine.
            if path.suffix == ".mp4":
                path.unlink()
    assert len({*nodes[0], *nodes[1]}) == EPISODES
    assert len(nodes[0]) + len(nodes[1]) <= EPISODES + 3


def test_the_cache_stays_within_its_limit_and_every_image_is_right(bucket, tmp_path):
    root, served = bucket
    whole = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    videos = sum(path.stat().st_size for path in root.rglob("*.mp4"))
    limit = (whole - 0.4 * videos) / 0.9
    data = config(root, **(CHUNKED | {"streams": 2, "shuffle_buffer": 8}), download_limit_gb=limit / 1e9)
    source, most, seen = open_lerobot(data, 1, "train"), 0, []
    for batch in loader(source, data, steps=(0, 36)):
        seen += batch["index"].tolist()
        most = max(most, used_bytes(tmp_path))
    assert sorted(seen) == sorted([*range(288)] * 2)
    # Files come and go while they are counted: one that was removed and the one in its place may both be in the sum.
    assert whole - videos < most <= limit + max(path.stat().st_size for path in root.rglob("*.mp4"))
    assert len([name for name in served.got if name.endswith("mp4")]) > EPISODES  # Some twice, as not all have room.
    assert len(source.__getitems__(range(0, 288, 7))) == 42
    for index in range(0, 288, 31):
        assert number_of(source.__getitems__([index])[0][CAMERA]) == of_frame(index // FRAMES, index % FRAMES)
    # The numbers were never removed, so that a restart does not need them again.
    served.got.clear()
    dataset._listed.cache_clear()
    open_lerobot(data, 1, "train")
    assert served.got == []


@pytest.mark.slow
def test_workers_read_ahead(bucket, tmp_path):
    """Workers are other processes, with `file://` as it is; the files of the next rows are there before these."""
    root, _ = bucket
    data = config(root, **CHUNKED)
    source = open_lerobot(data, 1, "train")
    rows = [row for batch in loader(source, data, workers=2, steps=(0, 18)) for row in batch["index"].tolist()]
    assert sorted(rows) == list(range(288))
    assert len([path for path in downloaded(tmp_path) if path.suffix == ".mp4"]) == EPISODES


def test_what_is_read_soon_is_downloaded_in_the_background(bucket):
    root, served = bucket
    data = config(root, **CHUNKED)
    source = open_lerobot(data, 1, "train")
    source.prefetch(range(24))
    pool = source._remote._running.get("")
    pool.shutdown(wait=True)
    assert sorted(name for name in served.got if name.endswith("mp4")) == ["episode_000000.mp4", "episode_000001.mp4"]
    served.got.clear()
    source.__getitems__([0, 23])
    assert served.got == []


def test_a_download_that_fails_in_the_background_is_reported_when_it_is_needed(bucket):
    root, served = bucket
    source = open_lerobot(config(root, **CHUNKED), 1, "train")
    served.failing = {"episode_000001.mp4": FileNotFoundError("gone")}
    source.prefetch(range(12, 24))
    source._remote._running[""].shutdown(wait=True)
    with pytest.raises(UserError, match=r"episode_000001.mp4 cannot be downloaded: it does not exist.*listed before"):
        source.__getitems__([13])


def test_storage_that_is_away_is_waited_for(bucket, monkeypatch, capsys):
    root, served = bucket
    monkeypatch.setattr(storage, "PAUSES", (0.01, 0.01, 0.01))
    source = open_lerobot(config(root, **CHUNKED), 1, "train")
    served.failing = {"mp4": TimeoutError("no answer")}
    monkeypatch.setattr(storage.time, "sleep", lambda _: served.failing.clear())
    assert len(read_rows(source, [13])) == 1
    assert "cannot be downloaded: TimeoutError: no answer" in capsys.readouterr().err
    served.failing = {"mp4": PermissionError("token expired")}
    monkeypatch.setattr(storage.time, "sleep", lambda _: None)
    with pytest.raises(RunError, match=r"could be read when the run started.*access is denied \(token expired\)"):
        read_rows(source, [30])


def test_an_object_that_changes_during_a_run_ends_it(bucket):
    root, _ = bucket
    source = open_lerobot(config(root, **CHUNKED), 1, "train")
    shutil.copy(root / "videos/chunk-000" / CAMERA / "episode_000003.mp4", changed := root / "videos/new.mp4")
    changed.replace(root / "videos/chunk-000" / CAMERA / "episode_000004.mp4")
    with pytest.raises(RunError, match=r"episode_000004.mp4 has changed since the dataset was listed: \d+ bytes"):
        source.__getitems__([4 * FRAMES])


def test_a_new_version_is_downloaded_and_a_run_that_continues_sees_it(bucket):
    root, served = bucket
    data = config(root, **CHUNKED)
    before = record_images([("", open_lerobot(data, 1, "train"))])
    assert len(before) == EPISODES
    assert not [name for name in served.got if name.endswith("mp4")]  # Versions are compared, not contents.
    os.utime(root / "videos/chunk-000" / CAMERA / "episode_000004.mp4", ns=(1, 1))
    dataset._listed.cache_clear()
    after = record_images([("", open_lerobot(data, 1, "train"))])
    assert [name for name in before if before[name] != after[name]] == [f"videos/chunk-000/{CAMERA}/episode_000004.mp4"]


def test_an_upload_that_is_not_complete_is_refused_at_the_start(bucket):
    root, _ = bucket
    (root / "videos/chunk-000" / CAMERA / "episode_000007.mp4").unlink()
    with pytest.raises(UserError, match=r"lacks the video files videos/.*episode_000007.mp4: complete the upload"):
        open_lerobot(config(root, **CHUNKED), 1, "train")
    dataset._listed.cache_clear()
    shutil.rmtree(root / "meta")
    (root.parent / "arm/inner/meta").mkdir(parents=True)
    (root.parent / "arm/inner/meta/info.json").write_text("{}")
    with pytest.raises(UserError, match=r"has no meta/info.json: it is not.*Below it are inner"):
        open_lerobot(config(root), 1, "train")
    dataset._listed.cache_clear()
    with pytest.raises(UserError, match=r"there is nothing in file:///.*/bucket/nothing: check bucket and folder"):
        open_lerobot(config(root.parent / "nothing"), 1, "train")


def test_a_damaged_video_is_found_when_it_arrives(bucket):
    root, _ = bucket
    source = open_lerobot(config(root, **CHUNKED), 1, "train")
    source.__getitems__([0])
    path = root / "videos/chunk-000" / CAMERA / "episode_000002.mp4"
    path.write_bytes(path.read_bytes()[:400])
    dataset._listed.cache_clear()
    source = open_lerobot(config(root, **CHUNKED), 1, "train")
    with pytest.raises(UserError, match=r"episode_000002.mp4: cannot be opened as a video.*frames of episode 2"):
        source.__getitems__([2 * FRAMES])


def test_limits_that_cannot_work_are_refused_with_what_would(bucket):
    root, _ = bucket
    with pytest.raises(UserError, match=r"files of file:.* are needed at once, but data.download_limit_gb = .*: raise"):
        open_lerobot(config(root, download_limit_gb=1e-4), 1, "train")
    videos = sum(path.stat().st_size for path in root.rglob("*.mp4"))
    whole = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    with pytest.raises(
        UserError, match=r"is too little for file:.*: 8 streams on this machine read .* Set it to 0\.\d+"
    ):
        open_lerobot(config(root, **CHUNKED, download_limit_gb=(whole - videos / 2) / 1e9), 1, "train")


def test_nothing_of_the_users_is_removed_and_killed_downloads_leave_no_trace(tmp_path, monkeypatch):
    monkeypatch.setenv("RLINF_CACHE", str(tmp_path))
    files = [RemoteFile(f"videos/{number}.mp4", 100, "1") for number in range(10)]
    cache = DownloadCache.of("s3://b/one", 450)
    cache.files.mkdir(parents=True)
    (mine := cache.files / "videos" / "mine.mp4").parent.mkdir()
    mine.write_bytes(bytes(400))
    parts = cache.folder / "parts"
    parts.mkdir()
    (parts / "dead.size").write_text("300")  # Of a process that was killed.
    (parts / "dead").write_bytes(bytes(200))
    for file in files:
        cache.place(file, lambda path: path.write_bytes(bytes(100)))
    assert [cache.has(file) for file in files] == [False] * 6 + [True] * 4
    assert mine.stat().st_size == 400
    assert list(parts.iterdir()) == []


def test_the_least_recently_used_file_goes_and_never_one_that_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("RLINF_CACHE", str(tmp_path))
    write = lambda path: path.write_bytes(bytes(100))  # noqa: E731
    one, two = (DownloadCache.of(f"s3://b/{name}", 400) for name in ("one", "two"))
    a, b, c, d, e = (RemoteFile(f"videos/{name}.mp4", 100, "1") for name in "abcde")
    numbers = RemoteFile("data/0.parquet", 100, "1")
    one.open_dataset()
    one.place(numbers, write)
    for place, (cache, file) in enumerate(((one, a), (two, b), (one, c))):
        cache.place(file, write)
        os.utime(cache._record(file.name), ns=(place, place))
    os.utime(one._record(numbers.name), ns=(0, 0))
    with ExitStack() as reading:
        assert one.hold(a, reading)
        os.utime(one._record(a.name), ns=(0, 0))
        two.place(d, write)
        # The numbers of a dataset that is open, and a file that is read, stay although they are the oldest.
        assert (one.has(numbers), one.has(a), two.has(b)) == (True, True, False)
        with pytest.raises(RunError, match=r"videos/e.mp4 \(1e-07 GB\) does not fit into .*which may have 2e-07 GB"):
            DownloadCache(one.folder, 200).place(e, write, patience=0.0)
    assert not (tmp_path / KIND).joinpath("none").exists()


def test_a_file_is_downloaded_once_by_all_that_want_it_and_a_failure_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RLINF_CACHE", str(tmp_path))
    file, begun = RemoteFile("videos/a.mp4", 100, "1"), []

    def download(path):
        begun.append(path)
        path.write_bytes(bytes(50))
        release.wait(5)
        path.write_bytes(bytes(100))

    release = threading.Event()
    # Each thread has its own descriptors, as another process has.
    threads = [
        threading.Thread(target=DownloadCache.of("s3://b/one", 1000).place, args=(file, download)) for _ in "abcd"
    ]
    for thread in threads:
        thread.start()
    assert not DownloadCache.of("s3://b/one", 1000).has(file)
    release.set()
    for thread in threads:
        thread.join(20)
    assert len(begun) == 1
    assert DownloadCache.of("s3://b/one", 1000).has(file)
    short = RemoteFile("videos/b.mp4", 100, "1")
    with pytest.raises(RunError, match=r"videos/b\.mp4: 7 bytes were downloaded instead of 100"):
        DownloadCache.of("s3://b/one", 1000).place(short, lambda path: path.write_bytes(bytes(7)))
    assert [path.name for path in (tmp_path / KIND).rglob("files/**/*") if path.is_file()] == ["a.mp4"]


HOLD_AND_DIE = """
import os, sys
from contextlib import ExitStack
from rlinf_core.data.remote.download_cache import DownloadCache, RemoteFile
keep = ExitStack()
assert DownloadCache.of("s3://b/one", 150).hold(RemoteFile("videos/a.mp4", 100, "1"), keep)
print("held", flush=True)
sys.stdin.read()
"""


def test_locks_end_with_their_process(tmp_path, monkeypatch):
    monkeypatch.setenv("RLINF_CACHE", str(tmp_path))
    cache, (a, b) = DownloadCache.of("s3://b/one", 150), (RemoteFile(f"videos/{n}.mp4", 100, "1") for n in "ab")
    cache.place(a, lambda path: path.write_bytes(bytes(100)))
    command = [sys.executable, "-c", HOLD_AND_DIE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="does not fit"):
            cache.place(b, lambda path: path.write_bytes(bytes(100)), patience=0.0)
        other.kill()
    cache.place(b, lambda path: path.write_bytes(bytes(100)), patience=0.0)
    assert (cache.has(a), cache.has(b)) == (False, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "ftp://host/data",
            r"is not an address that rlinf opens: it may begin with s3://, gs://, az://, hf://, file://",
        ),
        ("https://host/data", "is not an address that rlinf opens"),
        ("memory://data", "is not an address that rlinf opens"),
        ("simplecache::s3://b/x", "is not an address that rlinf opens"),
        ("s3://", "names no bucket: it has the form s3://bucket/folder"),
        ("s3://key:geheim@bucket/x", r"must be a bucket and a folder alone.*AWS_ACCESS_KEY_ID"),
        ("s3://bucket/x?endpoint_url=http://10.0.0.1", "no user, password, parameters"),
        ("gs://bucket/../other", "no user, password, parameters or `..`"),
    ],
)
def test_addresses_that_are_not_opened(text, message):
    with pytest.raises(UserError, match=message) as found:
        parse_address(text, "data.repo_id")
    assert "geheim" not in str(found.value)


def test_an_address_for_something_else_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"policy.weights: s3://b/w is an address, but this must be a folder"):
        local_path("s3://b/w", "policy.weights")
    with pytest.raises(UserError, match=r"data\.revision = 'main' applies to hub ids"):
        find_dataset(f"file://{tmp_path}", "main")


class NoCredentialsError(Exception):
    """Named as botocore's."""


def test_clients_that_are_missing_or_not_logged_in_are_explained(bucket, monkeypatch):
    _, served = bucket
    monkeypatch.setattr(dataset, "open_filesystem", address.open_filesystem)

    def missing(*arguments, **options):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.filesystem", missing)
    with pytest.raises(UserError, match=r"s3://b/x needs the package s3fs, .*pip install 'rlinf-core\[s3\]'"):
        open_remote("s3://b/x", "data.repo_id", 1000)

    monkeypatch.setattr("fsspec.filesystem", lambda *a, **o: served)
    for error, message in (
        (NoCredentialsError("Unable to locate credentials"), r"no usable credentials .*FSSPEC_S3_ANON=true"),
        (PermissionError("Forbidden"), r"access is denied \(Forbidden\): it needs the right to list"),
        (FileNotFoundError("The specified bucket does not exist"), "it does not exist, as storage says"),
        (OSError("x?token=geheim123"), r"cannot be listed: OSError: x\?token=\*\*\*"),
    ):
        monkeypatch.setattr(served, "find", Mock(side_effect=error))
        with pytest.raises(UserError, match=message):
            open_remote("s3://b/x", "data.repo_id", 1000)


def test_names_of_objects_stay_in_the_folder(bucket, monkeypatch):
    root, served = bucket
    found = {f"{root}/meta/../../../x": {"type": "file", "size": 3, "mtime": 1}}
    monkeypatch.setattr(served, "find", lambda *arguments, **options: found)
    with pytest.raises(UserError, match=r"has an object outside the dataset's folder: .* is outside the folder"):
        open_remote(f"file://{root}", "data.repo_id", 1000)
    # Markers of folders are not files.
    found.clear()
    found.update({f"{root}/meta/": {"type": "file", "size": 0}, f"{root}/meta": {"type": "directory", "size": 0}})
    with pytest.raises(UserError, match="there is nothing in"):
        open_remote(f"file://{root}", "data.repo_id", 1000)


def test_copies_in_other_processes_read_the_listing_from_the_cache(bucket):
    root, served = bucket
    opened = open_remote(f"file://{root}", "data.repo_id", 10**9)
    assert len(opened.files) > 2 * EPISODES
    data = pickle.dumps(opened)
    assert len(data) < 2000
    copy = pickle.loads(data)
    assert isinstance(copy, RemoteDataset)
    assert copy.files == opened.files
    assert served.listed == 1
    opened.listing.unlink()
    with pytest.raises(RunError, match="was removed or damaged"):
        _ = pickle.loads(data).files
    assert str(StorageError(5, "no answer")) == "no answer"


def test_a_limit_without_downloads_is_a_mistake():
    with pytest.raises(ValueError, match=r"download_limit_gb is for datasets in object storage .*: leave it out"):
        LeRobotDatasetConfig(repo_id="someone/dataset", download_limit_gb=10.0)
    assert LeRobotDatasetConfig(repo_id="s3://bucket/dataset", download_limit_gb=10.0).download_limit_gb == 10.0
