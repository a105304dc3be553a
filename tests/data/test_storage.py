"""Storage that is away for a moment costs a wait, for good a run error; neither is a mistake or a bad sample."""

import errno
import os
import shutil
import threading

import numpy as np
import pytest

from rlinf_core.contract.datasets import LeRobotDatasetConfig
from rlinf_core.data import storage
from rlinf_core.data.lerobot.source import open_lerobot
from rlinf_core.data.loading.encoding import read_rows
from rlinf_core.errors import RunError, UserError

CAMERA = "observation.images.front"


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(storage, "PAUSES", (0.05,) * 8)


@pytest.fixture(params=["pyav", "torchcodec"])
def source(request, video_dataset, tmp_path):
    root = shutil.copytree(video_dataset.root, tmp_path / "data")
    config = LeRobotDatasetConfig(repo_id=str(root), images={"front": CAMERA}, decoder=request.param)
    return open_lerobot(config, 4, "train")


def move(folder, seconds):
    """Move a folder away now, and back after some seconds."""
    folder.rename(folder.with_name("away"))
    threading.Timer(seconds, folder.with_name("away").rename, (folder,)).start()


def test_videos_that_are_away_for_a_moment_are_waited_for(source, tmp_path, capsys):
    expected = read_rows(source, [3, 20])
    source.close()
    move(tmp_path / "data" / "videos", 0.15)
    for row, before in zip(read_rows(source, [3, 20]), expected, strict=True):
        np.testing.assert_array_equal(row[CAMERA], before[CAMERA])
    said = capsys.readouterr().err
    assert "cannot be read" in said
    assert "can be read again" in said


def test_videos_that_stay_away_are_a_fault(source, tmp_path):
    (tmp_path / "data" / "videos").rename(tmp_path / "gone")
    with pytest.raises(RunError, match=r"could be read when the run started.* Is its storage mounted\?"):
        read_rows(source, [3])


class Failing:
    """A source that fails with errors in turn."""

    def __init__(self, *errors):
        self.errors, self.closed = list(errors), 0

    def __getitems__(self, indices):
        if self.errors:
            raise self.errors.pop(0)
        return [{"index": index} for index in indices]

    def close(self):
        self.closed += 1

    def describe(self, index):
        return f"row {index}"


def of_system(number):
    """As readers report an error of the operating system."""
    try:
        try:
            raise OSError(number, os.strerror(number), "/data/1.mp4")
        except OSError as cause:
            raise UserError("/data/1.mp4 cannot be opened as a video") from cause
    except UserError as error:
        return error


@pytest.mark.parametrize("name", ["EIO", "ESTALE", "ENOENT", "ETIMEDOUT", "EACCES", "ENOTCONN", "EHOSTDOWN"])
def test_errors_of_storage_are_waited_for(name):
    source = Failing(*(of_system(getattr(errno, name)) for _ in range(4)))
    assert read_rows(source, [7]) == [{"index": 7}]
    assert source.closed >= 4


@pytest.mark.parametrize(
    "error",
    [
        UserError("not an image"),
        of_system(errno.ENOSPC),  # The user can make room.
        of_system(errno.ENAMETOOLONG),
        OSError("image file is truncated (3 bytes not processed)"),  # As Pillow says it.
    ],
)
def test_other_errors_stay_what_they_are(error):
    source = Failing(*[error] * 9)
    with pytest.raises(type(error)) as raised:
        read_rows(source, [7])
    assert not isinstance(raised.value, RunError)
    assert len(source.errors) >= 6


def test_words_of_a_library_without_numbers_count():
    error = UserError("decoding fails")
    error.__cause__ = RuntimeError("Could not read packet: Input/output error")
    assert storage.is_storage_error(error)
    error.__cause__ = RuntimeError("Invalid data found when processing input")
    assert not storage.is_storage_error(error)


def test_only_a_restarted_run_waits_for_its_data(monkeypatch):
    tries = []

    def open_data():
        tries.append(1)
        if len(tries) < 4:
            raise UserError("data.repo_id names no folder")
        return "data"

    with pytest.raises(UserError):
        storage.reopen(open_data)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert storage.reopen(open_data) == "data"
    tries[:] = [1] * -20
    with pytest.raises(RunError, match="before this restart"):
        storage.reopen(lambda: (_ for _ in ()).throw(UserError("gone")))
