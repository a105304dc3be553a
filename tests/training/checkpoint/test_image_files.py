"""Image files that change between the starts of a run, or while it runs."""

import functools
import json
import os
import re
import shutil

import pytest
import toy_data
import toy_policy
from damaging import complaint, examples, json_texts
from hypothesis import given

from rlinf_core.data.images.evidence import differing, evidence_of, evidence_of_files
from rlinf_core.errors import UserError
from rlinf_core.preflight import check_run
from rlinf_core.training import run_folder
from rlinf_core.training.checkpoint.image_files import FILE, changed_since, write_record
from rlinf_core.training.resume import Flags


def test_evidence_is_size_and_content_and_not_time(tmp_path):
    path = tmp_path / "front.mp4"
    path.write_bytes(os.urandom(10**5))
    before = evidence_of(path)
    os.utime(path, (0, 0))
    assert evidence_of(shutil.copy(path, tmp_path / "copy.mp4")) == evidence_of(path) == before
    for place in (0, 10**5 // 2 + 7, 10**5 - 1):
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        (tmp_path / "changed").write_bytes(content)
        now = evidence_of(tmp_path / "changed")
        assert differing({"x": before}, {"x": now}) == ["x (other content of the same size)"]
    path.write_bytes(b"short")
    assert differing({"x": before}, {"x": evidence_of(path)}) == ["x (5 bytes instead of 100000 bytes)"]
    os.mkfifo(tmp_path / "pipe")
    files = {name: tmp_path / name for name in ("gone", "pipe")}
    assert evidence_of_files(files) == {"gone": "missing", "pipe": "cannot be read: it is a named pipe, not a file"}
    assert differing({"a": "1 bytes, x"}, {"b": "1 bytes, x"}) == ["a (not used any more)", "b (new)"]


@pytest.fixture
def videos(tmp_path, monkeypatch):
    """Videos that the toy rows name as theirs."""
    folder = tmp_path / "videos"
    folder.mkdir()
    paths = {name: folder / name for name in ("front.mp4", "wrist.mp4")}
    for path in paths.values():
        path.write_bytes(os.urandom(50_000))

    class Filmed(toy_data.Rows):  # Python remembers for a class which protocols it follows.
        row_files = dict
        image_files_by_name = lambda self: paths  # noqa: E731

    monkeypatch.setattr(toy_policy, "Rows", Filmed)
    return paths


def test_a_run_continues_only_with_the_images_that_it_began_with(
    tmp_path, train_toy, configure_toy, toy_plugins, videos, monkeypatch, capsys
):
    train_toy("runner.name=run", "runner.max_steps=1")
    record = tmp_path / "run" / "checkpoints" / "step_000000001" / FILE
    assert json.loads(record.read_text()) == evidence_of_files(videos)
    os.utime(videos["front.mp4"], (0, 0))
    train_toy("runner.name=run", "runner.max_steps=2")
    whole = videos["front.mp4"].read_bytes()
    videos["front.mp4"].write_bytes(bytes(len(whole)))
    videos["wrist.mp4"].write_bytes(whole[:100])
    refused = (
        r"step_000000002 was trained on other image files than the dataset now has: front.mp4 \(other content of the "
        r"same size\), wrist.mp4 \(100 bytes instead of 50000 bytes\). Restore them"
    )
    for _ in range(2):  # A refused start leaves the record as it was.
        with pytest.raises(UserError, match=refused):
            train_toy("runner.name=run", "runner.max_steps=3")
    run = configure_toy("runner.name=run", "runner.max_steps=3")
    assert any(re.search(refused, finding) for finding in check_run(run, toy_plugins).findings)
    report = check_run(run, toy_plugins, allow_change=True)
    assert not report.findings
    assert any("continues with other image files: front.mp4" in warning for warning in report.warnings)
    capsys.readouterr()
    with monkeypatch.context() as allowed:
        allowed.setattr(run_folder, "Flags", functools.partial(Flags, allow_change=True))
        train_toy("runner.name=run", "runner.max_steps=3")
    assert "warning: the run continues with other image files: front.mp4" in capsys.readouterr().out
    train_toy("runner.name=run", "runner.max_steps=4")


def test_a_checkpoint_without_a_record_continues(tmp_path, train_toy, videos, monkeypatch):
    with monkeypatch.context() as early:
        early.setattr(toy_policy.Rows, "image_files_by_name", dict)
        train_toy("runner.name=run", "runner.max_steps=1")
    assert not (tmp_path / "run" / FILE).exists()
    train_toy("runner.name=run", "runner.max_steps=2")
    assert (tmp_path / "run" / "checkpoints" / "step_000000002" / FILE).exists()
    write_record(tmp_path / "run", {})
    assert not (tmp_path / "run" / FILE).exists()


def test_a_damaged_record_is_one_message(tmp_path):
    record = {"front.mp4": "5 bytes, 00"}
    write_record(tmp_path, record)

    @examples(20)
    @given(json_texts(record))
    def fuzz(data):
        (tmp_path / FILE).write_bytes(data)
        complaint(lambda: changed_since(tmp_path, record), FILE)

    fuzz()


def test_images_that_change_during_the_run_are_named_at_its_end(train_toy, videos, monkeypatch, capsys):
    read = toy_data.Rows.__getitems__

    def read_and_replace(self, indices):
        videos["wrist.mp4"].write_bytes(b"recorded again")
        return read(self, indices)

    monkeypatch.setattr(toy_policy.Rows, "__getitems__", read_and_replace)
    train_toy("runner.max_steps=1")
    assert "image files changed while the run was reading them: wrist.mp4 (14 bytes" in capsys.readouterr().out
