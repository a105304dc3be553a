import pickle
import shutil

import numpy as np
import pytest

from rlinf_core.contract.datasets import LeRobotDatasetConfig
from rlinf_core.data.lerobot import rows as lerobot_rows
from rlinf_core.data.lerobot import shared_memory as shared_columns
from rlinf_core.data.lerobot.shared_memory import Runs
from rlinf_core.data.lerobot.source import open_lerobot
from rlinf_core.errors import UserError


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


def zero_actions(source, monkeypatch):
    """Fill the cached file of the actions with zeros, as a machine that lost its power does."""
    names = source._columns.entry.facts["names"]
    path = source._columns.entry.file(f"{names.index('action')}.npy")
    header = 128
    path.write_bytes(path.read_bytes()[:header] + bytes(path.stat().st_size - header))
    monkeypatch.setattr(lerobot_rows, "_in_use", {})
    return path


def test_zeros_in_cached_columns_are_named_and_not_trained_on(image_dataset, shared, monkeypatch, capsys):
    data = LeRobotDatasetConfig(repo_id=str(image_dataset.root))
    source = open_lerobot(data, 2, "train")
    actions, fingerprint = numbers(source)["action"], source.fingerprint()
    path = zero_actions(source, monkeypatch)
    again = open_lerobot(data, 2, "train")
    said = capsys.readouterr().err
    assert str(path) in said
    assert "the cache is damaged" in said
    assert actions.any()
    np.testing.assert_array_equal(numbers(again)["action"], actions)
    assert again.fingerprint() == fingerprint
    monkeypatch.setattr(lerobot_rows, "_in_use", {})
    open_lerobot(data, 2, "train")
    assert capsys.readouterr().err == ""


def test_columns_that_somebody_removed_during_a_run_are_written_again_for_the_next_process(
    image_dataset, shared, monkeypatch
):
    source = open_lerobot(LeRobotDatasetConfig(repo_id=str(image_dataset.root)), 2, "train")
    expected = numbers(source)["action"]
    pickled = pickle.dumps(source)
    shutil.rmtree(shared)
    np.testing.assert_array_equal(numbers(source)["action"], expected)
    with pytest.raises(UserError, match="removed or damaged while a process was starting"):
        pickle.loads(pickled)
    np.testing.assert_array_equal(numbers(pickle.loads(pickle.dumps(source)))["action"], expected)
    shutil.rmtree(shared)
    shared.touch()  # Nor can it be written again.
    np.testing.assert_array_equal(numbers(pickle.loads(pickle.dumps(source)))["action"], expected)
