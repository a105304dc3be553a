"""What all tests share: no network, a cache of their own, and tiny datasets that lerobot writes once."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # Read when huggingface_hub is imported.

import pytest
import tiny_lerobot


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    os.environ["RLINF_CACHE"] = str(tmp_path_factory.mktemp("cache"))  # Workers inherit it.


@pytest.fixture(scope="session")
def video_dataset(tmp_path_factory):
    """Four episodes of two tasks, two cameras as AV1 video, two episodes a video file and one a data file."""
    root = tmp_path_factory.mktemp("lerobot") / "video"
    return tiny_lerobot.write_dataset(root, videos=True, data_files_size_in_mb=0.0001, video_files_size_in_mb=0.003)


@pytest.fixture(scope="session")
def image_dataset(tmp_path_factory):
    """The same episodes with PNG pictures in the parquet columns, in several files."""
    root = tmp_path_factory.mktemp("lerobot") / "image"
    return tiny_lerobot.write_dataset(root, videos=False, data_files_size_in_mb=0.0001)
