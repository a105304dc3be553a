"""metrics.jsonl: every row readable, and cut back exactly on resume."""

import json

from rlinf_core.training.jsonl import JsonlLogger, cut_back, read_rows


def write(path, text):
    path.write_text(text)
    return path


def test_rows_are_on_disk_at_once_and_not_a_number_is_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    logger = JsonlLogger(path.open("a"))
    logger.step(1, {"loss": 0.5, "grad_norm": float("nan")})
    assert json.loads(path.read_text()) == {"step": 1, "loss": 0.5, "grad_norm": None}
    logger.validation(1, {"val_loss": float("inf")})
    assert read_rows(path)[1] == {"step": 1, "val_loss": None}


def test_cutting_back_keeps_the_bytes_of_the_rows_that_stay(tmp_path):
    rows = '{"step": 1,  "loss": 0.10}\n{"step": 2, "loss": 0.2}\n{"step": 2, "val_loss": 3}\n'
    path = write(tmp_path / "metrics.jsonl", rows + '{"step": 3, "loss": 0.3}\n{"step": 4, "lo')
    cut_back(path, 2)
    assert path.read_text() == rows


def test_a_torn_last_line_is_not_a_row(tmp_path):
    path = write(tmp_path / "metrics.jsonl", '{"step": 1}\n{"step": 2, "lo')
    assert read_rows(path) == [{"step": 1}]
    cut_back(path, 5)
    assert path.read_text() == '{"step": 1}\n'


def test_no_file_is_no_rows(tmp_path):
    cut_back(tmp_path / "metrics.jsonl", 0)
    assert read_rows(tmp_path / "metrics.jsonl") == []
