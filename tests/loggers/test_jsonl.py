"""A file of rows is whole at any time, and a full disk neither tears it nor ends the run."""

import json
import resource
from contextlib import contextmanager

import pytest

from rlinf_core.errors import UserError
from rlinf_core.loggers.jsonl import JsonlLogger, RowFile, cut_back, read_metrics, read_rows


@contextmanager
def no_file_larger_than(size):
    """As on a full disk: what is more is not written, and fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_rows_that_a_full_disk_does_not_take_are_written_later(tmp_path, capsys):
    file = RowFile(tmp_path / "rows.jsonl")
    file.append({"step": 1})
    whole = (tmp_path / "rows.jsonl").read_bytes()
    with no_file_larger_than(len(whole) + 5):
        file.append({"step": 2})
        file.append({"step": 3})
        assert (tmp_path / "rows.jsonl").read_bytes() == whole
    file.append({"step": 4})
    file.close(None)
    assert [row["step"] for row in read_rows(tmp_path / "rows.jsonl")] == [1, 2, 3, 4]
    assert capsys.readouterr().err.count("rows.jsonl cannot be written") == 1


def test_rows_that_are_lost_in_the_end_are_a_mistake_unless_there_is_another(tmp_path, capsys):
    file = RowFile(tmp_path / "rows.jsonl")
    with no_file_larger_than(3):
        file.append({"step": 1})
        with pytest.raises(UserError, match=r"rows\.jsonl lacks its last 1 rows"):
            file.close(None)
        file.close(ValueError())


def test_there_is_no_file_before_the_first_row(tmp_path):
    RowFile(tmp_path / "rows.jsonl").close(None)
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_are_none_are_null(tmp_path):
    logger = JsonlLogger(RowFile(tmp_path / "rows.jsonl"))
    logger.step(1, {"loss": float("nan"), "lr": 0.5})
    logger.close(None)
    assert json.loads((tmp_path / "rows.jsonl").read_text()) == {"step": 1, "loss": None, "lr": 0.5}


def test_rows_that_stay_keep_their_bytes_and_a_torn_last_one_goes(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"step":1,  "x": "\\u00e9 \xc2\x85"}\n{"step": 2}\n{"st')
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    cut_back(path, 1)
    assert path.read_bytes() == b'{"step":1,  "x": "\\u00e9 \xc2\x85"}\n'


STRAY = {
    "blank": b"",
    "zeros": b"\0\0\0",
    "a note": b"lr was too high, see my notebook",
    "a list": b"[]",
    "a number": b"7",
    "no step": b'{"loss": 1}',
    "step as text": b'{"step": "1"}',
    "step as NaN": b'{"step": NaN}',
    "Latin-1": b"\xff",
    "deep": b"[" * 100_000,
    "long": b'{"step": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("line", STRAY.values(), ids=STRAY)
def test_a_line_that_is_no_row_is_ignored_stays_with_the_row_before_it_and_is_reported(tmp_path, capsys, line):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n' + line + b"\n")
    assert [row["step"] for row in read_rows(path)] == [1, 3]
    cut_back(path, 1)
    assert path.read_bytes() == b'{"step": 1}\n' + line + b"\n"
    assert capsys.readouterr().err == f"warning: {path}: not a row with a step, ignored: line 2, 4\n"


def test_metrics_are_rows_of_numbers(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = ({"step": 1, "loss": 1}, {"step": 2, "loss": "low"}, {"step": 3, "loss": None}, {"step": 4, "a": []})
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert [row["step"] for row in read_metrics(path)] == [1, 3]
