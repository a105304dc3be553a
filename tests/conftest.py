"""What all tests share: no network, a cache of their own, and tiny datasets that lerobot writes once."""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # Read when huggingface_hub is imported.

import pytest

pytest_plugins = ["rlinf_core.testing"]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    os.environ["RLINF_CACHE"] = str(tmp_path_factory.mktemp("cache"))  # Workers inherit it.


@pytest.fixture(scope="session")
def video_dataset(tmp_path_factory):
    """Four episodes of two tasks, two cameras as AV1 video, two episodes a video file and one a data file."""
    from rlinf_core.testing import write_tiny_dataset

    root = tmp_path_factory.mktemp("lerobot") / "video"
    return write_tiny_dataset(root, videos=True, data_files_size_in_mb=0.0001, video_files_size_in_mb=0.003)


@pytest.fixture(scope="session")
def image_dataset(tmp_path_factory):
    """The same episodes with PNG pictures in the parquet columns, in several files."""
    from rlinf_core.testing import write_tiny_dataset

    root = tmp_path_factory.mktemp("lerobot") / "image"
    return write_tiny_dataset(root, data_files_size_in_mb=0.0001)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on `sys.path`; what was imported from it is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
