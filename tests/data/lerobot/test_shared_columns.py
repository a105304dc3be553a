import pickle

import numpy as np
import pytest

from rlinf_core.contract.datasets import LeRobotDatasetConfig
from rlinf_core.data.lerobot import rows as lerobot_rows
from rlinf_core.data.lerobot import shared_memory as shared_columns
from rlinf_core.data.lerobot.shared_memory import Runs
from rlinf_core.data.lerobot.source import open_lerobot


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """Everything counts as large, and nothing of it is in memory."""
    monkeypatch.setattr(shared_columns, "SHARED_FROM", 1)
    monkeypatch.setattr(lerobot_rows, "_in_use", {})
    monkeypatch.setenv("RLINF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def numbers(source):
    return source.columns(range(len(source)))


def test_large_columns_are_mapped_by_every_copy(image_dataset, shared, monkeypatch):
    data = LeRobotDatasetConfig(repo_id=str(image_dataset.root), validation_episodes=(1,))
    source = open_lerobot(data, 5, "train")
    copied = pickle.dumps(source)
    assert b".npy" not in copied
    assert source._columns["action"].tobytes() not in copied
    for values in pickle.loads(copied)._columns.values():
        assert isinstance(values.base, np.memmap)
        assert not values.flags.writeable
    monkeypatch.setattr(shared_columns, "SHARED_FROM", 2**25)
    monkeypatch.setattr(shared_columns, "find_shared", lambda key: None)
    monkeypatch.setattr(lerobot_rows, "find_shared", lambda key: None)
    monkeypatch.setattr(lerobot_rows, "_in_use", {})
    plain = open_lerobot(data, 5, "train")
    assert plain._columns.entry is None
    for name, values in numbers(plain).items():
        np.testing.assert_array_equal(numbers(pickle.loads(copied))[name], values)
        np.testing.assert_array_equal(numbers(pickle.loads(pickle.dumps(plain)))[name], values)
    assert plain.fingerprint() == source.fingerprint()


def test_what_is_shared_is_not_read_again(image_dataset, shared, monkeypatch):
    data = LeRobotDatasetConfig(repo_id=str(image_dataset.root))
    first = numbers(open_lerobot(data, 2, "train"))
    monkeypatch.setattr(lerobot_rows, "_in_use", {})
    monkeypatch.setattr(lerobot_rows, "_read", None)
    np.testing.assert_array_equal(numbers(open_lerobot(data, 2, "train"))["action"], first["action"])
    assert not [path for path in (shared / "columns").iterdir() if path.suffix == ".tmp"]


def test_columns_that_cannot_be_shared_are_in_memory_and_a_note_says_so(image_dataset, shared, capsys):
    shared.touch()
    data = LeRobotDatasetConfig(repo_id=str(image_dataset.root))
    source = open_lerobot(data, 1, "train")
    note = capsys.readouterr().err
    assert "cannot be written" in note
    assert "RLINF_CACHE" in note
    assert source._columns.entry is None
    open_lerobot(data, 1, "train")  # Read once in this process, and told once.
    assert capsys.readouterr().err == ""
    copied = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(numbers(copied)["action"], numbers(source)["action"])


@pytest.mark.parametrize("positions", [[], [3], [0, 1, 2], [0, 1, 5, 6, 7, 9], [4, 6, 8]])
def test_runs_are_the_positions(positions):
    runs = Runs.of(np.array(positions, np.int64))
    assert runs.all().tolist() == positions
    assert len(runs) == len(positions)
    assert [int(runs[np.array(i)]) for i in reversed(range(len(positions)))] == positions[::-1]
    with pytest.raises(IndexError):
        runs[np.array([len(positions)])]
