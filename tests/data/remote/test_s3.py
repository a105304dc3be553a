"""A dataset in S3 itself: s3fs, and a server that answers as S3 does, in this process (`--group storage`)."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from field_datasets import CAMERA, write_dataset

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

import boto3
import toy_policy
from distributions import install
from moto.server import ThreadedMotoServer

from rlinf_core import UserError
from rlinf_core.contract.datasets import LeRobotDatasetConfig
from rlinf_core.data.lerobot.source import open_lerobot
from rlinf_core.data.remote import dataset
from rlinf_core.errors import RunError
from rlinf_core.loggers.jsonl import read_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CHUNKED = {"shuffle": "chunked", "stream_of": "files", "streams": 4, "chunk_frames": 4, "shuffle_buffer": 32}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("s3") / "arm", [12] * 8, version="v2.1")


@pytest.fixture(scope="module")
def endpoint():
    """One server for all tests: s3fs keeps clients, with their endpoint."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def bucket(original, endpoint, tmp_path, monkeypatch):
    """A client of the bucket `lab`, which holds the dataset in `sets/arm`."""
    for name, value in (
        ("AWS_ENDPOINT_URL", endpoint),
        ("AWS_ACCESS_KEY_ID", "testing"),
        ("AWS_SECRET_ACCESS_KEY", "testing"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_EC2_METADATA_DISABLED", "true"),
        ("RLINF_CACHE", str(tmp_path / "cache")),
    ):
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="lab")
    client.put_object(Bucket="lab", Key="sets/arm/")  # The marker that S3's console writes for a folder.
    for path in sorted(original.rglob("*")):
        if path.is_file():
            client.upload_file(str(path), "lab", f"sets/arm/{path.relative_to(original).as_posix()}")
    dataset._listed.cache_clear()
    yield client
    dataset._listed.cache_clear()


def config(**options):
    return LeRobotDatasetConfig(repo_id="s3://lab/sets/arm", images={"base": CAMERA}, **options)


def test_rows_are_those_of_the_folder(bucket, original):
    local = open_lerobot(LeRobotDatasetConfig(repo_id=str(original), images={"base": CAMERA}), 2, "train")
    for options in ({}, CHUNKED):
        remote = open_lerobot(config(**options), 2, "train")
        assert remote.fingerprint() == local.fingerprint()
        for ours, theirs in zip(remote.__getitems__([0, 50, 95]), local.__getitems__([0, 50, 95]), strict=True):
            np.testing.assert_array_equal(ours[CAMERA], theirs[CAMERA])


def test_objects_that_change_or_go_are_named(bucket, original):
    source = open_lerobot(config(**CHUNKED), 1, "train")
    videos = [f"sets/arm/videos/chunk-000/{CAMERA}/episode_{number:06d}.mp4" for number in range(8)]
    bucket.upload_file(str(original / videos[4].removeprefix("sets/arm/")), "lab", videos[3])
    bucket.delete_object(Bucket="lab", Key=videos[5])
    with pytest.raises(RunError, match=r"episode_000003.mp4 has changed since the dataset was listed"):
        source.__getitems__([3 * 12])
    with pytest.raises(UserError, match=r"episode_000005.mp4 cannot be downloaded: it does not exist"):
        source.__getitems__([5 * 12])


def test_buckets_and_logins_that_do_not_exist_are_explained(bucket, monkeypatch):
    with pytest.raises(UserError, match=r"s3://nowhere/arm cannot be listed: it does not exist, as storage says"):
        open_lerobot(LeRobotDatasetConfig(repo_id="s3://nowhere/arm", images={"base": CAMERA}), 1, "train")
    with pytest.raises(UserError, match=r"there is nothing in s3://lab/other"):
        open_lerobot(LeRobotDatasetConfig(repo_id="s3://lab/other", images={"base": CAMERA}), 1, "train")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(Path(os.environ["RLINF_CACHE"])))
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    dataset._listed.cache_clear()
    with pytest.raises(UserError, match=r"no usable credentials .*AWS_PROFILE.*FSSPEC_S3_ANON=true"):
        open_lerobot(config(), 1, "train")


ARM = """
from dataclasses import dataclass
from rlinf_core.contract.datasets import LeRobotDatasetConfig
from rlinf_core.data.transforms import Transform

@dataclass(frozen=True)
class Numbered(Transform):
    inner: Transform

    def __call__(self, row):
        return self.inner(row) | {"index": row["index"]}

class Arm(LeRobotDatasetConfig):
    run_defaults = {"policy": {"type": "trainable_toy"}}

    def repack(self):
        return Numbered(super().repack())
"""
RUN = """
[runner]
name = "{name}"
max_steps = 4
[data]
config_name = "arm"
repo_id = "{repo_id}"
images = {{ base = "observation.images.front" }}
num_workers = 2
shuffle = "chunked"
stream_of = "files"
streams = 4
chunk_frames = 4
shuffle_buffer = 32
[trainer]
device = "cpu"
param_dtype = "fp32"
global_batch_size = 16
micro_batch_size = 8
[optim]
lr = 1e-2
warmup_steps = 0
"""


def test_a_run_trains_from_a_bucket_and_goes_on_without_downloading_again(bucket, original, tmp_path):
    """With two loader workers; the same losses as from the folder."""
    install(tmp_path / "site", "arm", datasets={"arm": "arm:Arm"}, arm=ARM)
    install(tmp_path / "site", "toy", plugins={"toy": "toy_policy"})
    support = Path(toy_policy.__file__).parent

    def train(name, repo_id, steps):
        (file := tmp_path / f"{name}.toml").write_text(RUN.format(name=name, repo_id=repo_id))
        command = [sys.executable, "-m", "rlinf_core.train", str(file), f"runner.max_steps={steps}"]
        paths = {"PYTHONPATH": f"{tmp_path / 'site'}:{support}"}
        done = subprocess.run(command, cwd=tmp_path, env=os.environ | paths, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [row["loss"] for row in read_rows(tmp_path / "runs" / name / "metrics.jsonl") if "loss" in row]

    local = train("local", original, 4)
    assert train("remote", "s3://lab/sets/arm", 2) == local[:2]
    files = {path: path.stat().st_ino for path in (tmp_path / "cache/remote").rglob("*.mp4")}
    assert files
    assert train("remote", "s3://lab/sets/arm", 4) == local
    assert all(path.stat().st_ino == number for path, number in files.items())
