"""What a dataset may have in place of a file: pipes, sockets, folders, devices, and parquet files that claim much."""

import os
import shutil
import socket

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from damaging import complaint

from rlinf_core.contract.datasets import LeRobotDatasetConfig
from rlinf_core.data.check.files import check_files, number_columns
from rlinf_core.data.lerobot.metadata import read_metadata
from rlinf_core.data.lerobot.source import open_lerobot
from rlinf_core.data.loading.encoding import read_rows
from rlinf_core.errors import UserError
from rlinf_core.testing.lerobot import CAMERAS
from rlinf_core.testing.lerobot_v2 import write_v2
from rlinf_core.untrusted import parquet as untrusted_parquet


@pytest.fixture(scope="module")
def versions(video_dataset, tmp_path_factory):
    older = tmp_path_factory.mktemp("older") / "v2.1"
    write_v2(video_dataset.root, older, "v2.1")
    return {"v2.1": older, "v3.0": video_dataset.root}


def read_all(root):
    config = LeRobotDatasetConfig(repo_id=str(root), images={"front": CAMERAS[0]}, quality_column="length")
    source = open_lerobot(config, 2, "train")
    read_rows(source, range(len(source)))


def check_all(root):
    metadata = read_metadata("it", root)
    found = check_files(metadata, cameras=CAMERAS[:1], vectors=number_columns(metadata), depth="ends")
    if not found.ok:
        raise UserError("; ".join(map(str, found.listed)))


READERS = {"train": read_all, "check": check_all}


def bind(path):
    """Make a socket: its path is longer than an address may be, so its folder is opened."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(f"/proc/self/fd/{folder}/{path.name}")
    finally:
        os.close(folder)


KINDS = {
    "a named pipe": os.mkfifo,
    "a socket": bind,
    "a folder": os.mkdir,
    "a device": lambda path: os.symlink("/dev/zero", path),
}
FILES = [
    ("v3.0", "meta/info.json"),
    ("v3.0", "meta/tasks.parquet"),
    ("v3.0", "meta/episodes/chunk-000/file-000.parquet"),
    ("v3.0", "data/chunk-000/file-000.parquet"),
    ("v3.0", f"videos/{CAMERAS[0]}/chunk-000/file-000.mp4"),
    ("v2.1", "meta/episodes.jsonl"),
    ("v2.1", "meta/tasks.jsonl"),
    ("v2.1", "data/chunk-000/episode_000001.parquet"),
    ("v2.1", f"videos/chunk-000/{CAMERAS[0]}/episode_000001.mp4"),
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("version", "name"), FILES)
def test_what_is_not_a_file_is_refused_at_once(version, name, versions, tmp_path):
    root = tmp_path / "it"
    shutil.copytree(versions[version], root)
    file = root / name
    file.unlink()
    for kind, make in KINDS.items():
        make(file)
        for read in READERS.values():
            with pytest.raises(UserError) as caught:
                read(root)
            assert f"is {kind}, not a file" in str(caught.value)
            assert name in str(caught.value)
        shutil.rmtree(file) if file.is_dir() else file.unlink()


def bomb(path):
    """Replace the numbers of episodes or tasks by lists of very many zeros."""
    table = pq.read_table(path)
    name = "episode_index" if "episode_index" in table.column_names else "task_index"
    offsets = np.linspace(0, 4 * 10**6, table.num_rows + 1).astype(np.int32)
    zeros = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.zeros(4 * 10**6, np.float32)))
    pq.write_table(table.set_column(table.column_names.index(name), name, zeros), path, compression="zstd")


@pytest.mark.parametrize(("version", "name"), [one for one in FILES if one[1].endswith("parquet")])
def test_every_reader_of_a_dataset_refuses_parquet_bombs(version, name, versions, tmp_path, monkeypatch):
    monkeypatch.setattr(untrusted_parquet, "FREE", 2**22)
    monkeypatch.setattr(untrusted_parquet, "RATIO", 50)
    root = tmp_path / "it"
    shutil.copytree(versions[version], root)
    bomb(root / name)
    for read in READERS.values():
        said = complaint(lambda read=read: read(root), name, spare=2**29)
        assert "made to exhaust memory" in said
