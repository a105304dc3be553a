"""Parquet files of a few kilobytes that claim gigabytes."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from damaging import complaint, damaged_bytes, examples
from hypothesis import given

from rlinf_core.data.images.parquet import image_batches
from rlinf_core.data.lerobot.files import read_parquet
from rlinf_core.untrusted import parquet as untrusted_parquet
from rlinf_core.untrusted.parquet import open_parquet, read_batches, read_table

HALF_A_GIGABYTE = 2**29


def zeros(rows, values):
    """A few rows that are lists of very many zeros: run-length encoding stores each as one run."""
    offsets = pa.array(np.linspace(0, values, rows + 1).astype(np.int32))
    return pa.ListArray.from_arrays(offsets, pa.array(np.zeros(values, np.float32)))


def repeated(text, rows):
    """The same text in every row; a dictionary stores it once."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([text]))


def write(path, columns, **options):
    pq.write_table(pa.table(columns), path, compression="zstd", store_schema=False, **options)
    assert path.stat().st_size < 40_000
    return path


@pytest.fixture
def small_limits(monkeypatch):
    monkeypatch.setattr(untrusted_parquet, "FREE", 2**22)
    monkeypatch.setattr(untrusted_parquet, "RATIO", 50)


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("numbers", lambda: zeros(20, 18 * 10**6)),
        ("texts", lambda: repeated("x" * 10**6, 2000)),
        ("images", lambda: repeated(b"x" * 10**6, 2000)),
        ("one long text", lambda: pa.array(["x" * 2 * 10**7])),
        ("missing values", lambda: pa.nulls(4 * 10**6, pa.float64())),
    ],
)
def test_a_bomb_is_refused_before_it_takes_memory(name, column, tmp_path, request):
    if name != "numbers":  # One of them is as large as it has to be, which takes a second to write.
        request.getfixturevalue("small_limits")
    path = write(tmp_path / "bomb.parquet", {"x": column()}, use_dictionary=name != "numbers")
    said = complaint(lambda: read_parquet(path), path, spare=HALF_A_GIGABYTE)
    assert "made to exhaust memory" in said
    assert "its columns take" in said


def test_columns_that_are_not_read_may_be_any_size(tmp_path, small_limits):
    path = write(tmp_path / "bomb.parquet", {"x": zeros(20, 4 * 10**6), "y": range(20)})
    assert read_parquet(path, ["y"])["y"].to_pylist() == list(range(20))


def test_what_is_recorded_is_read_as_pyarrow_reads_it(tmp_path):
    rows = 3000
    random = np.random.default_rng(0)
    table = pa.table(
        {
            "observation.state": pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(rows * 14, np.float32)), 14),
            "action": list(random.normal(size=(rows, 7)).astype(np.float32)),
            "task": ["put the red cup on the plate"] * rows,
            "note": [None] * rows,
            "index": range(rows),
        }
    )
    path = tmp_path / "file.parquet"
    pq.write_table(table, path, row_group_size=700)
    with open_parquet(path) as file:
        assert read_table(file, path).equals(pq.read_table(path))
        assert read_table(file, path, ["task", "index"]).equals(pq.read_table(path, columns=["task", "index"]))
        assert pa.Table.from_batches(read_batches(file, path, rows=64)).equals(pq.read_table(path))


def test_the_footer_is_read_as_pyarrow_reads_it(tmp_path):
    path = tmp_path / "file.parquet"
    large = pa.array(np.random.default_rng(0).normal(size=70_000))
    pq.write_table(pa.table({"x": large, "t": ["a", None] * 35_000, "b": [True] * 70_000}), path, row_group_size=33_000)
    footer = pq.read_metadata(path)
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    parts = [[group.column(number) for number in range(3)] for group in groups]
    expected = [[(part.num_values, part.total_uncompressed_size) for part in group] for group in parts]
    assert list(untrusted_parquet._row_groups(path, 3)) == list(
        zip((group.num_rows for group in groups), expected, strict=True)
    )


def test_damage_to_the_footer_does_not_end_the_process(tmp_path):
    """pyarrow's accessors of the footer abort where it calls a column encrypted, or has other columns."""
    path = tmp_path / "file.parquet"
    pq.write_table(pa.table({"x": range(5), "y": ["a"] * 5}), path)
    whole = path.read_bytes()
    length = int.from_bytes(whole[-8:-4], "little")

    @examples(40)
    @given(damaged_bytes(whole[-8 - length : -8]))
    def fuzz(footer):
        path.write_bytes(whole[: -8 - length] + footer + len(footer).to_bytes(4, "little") + b"PAR1")
        complaint(lambda: read_parquet(path), path)

    fuzz()


def test_texts_are_read_in_batches_when_they_might_be_long(tmp_path):
    """Where the footer allows a bomb, what is read is the same, with the notes of pandas."""
    metadata = {b"pandas": json.dumps({"index_columns": ["task"]}).encode()}
    texts = [f"{n} " + "y" * 10_000 for n in range(100)]
    table = pa.table({"task": texts * 3, "task_index": range(300)}).replace_schema_metadata(metadata)
    path = tmp_path / "tasks.parquet"
    pq.write_table(table, path, compression="zstd", row_group_size=100)
    found = read_parquet(path)
    assert found.to_pydict() == table.to_pydict()
    assert found.schema.pandas_metadata == table.schema.pandas_metadata


def test_images_are_unpacked_in_bounded_memory(tmp_path, small_limits):
    path = write(tmp_path / "bomb.parquet", {"front": repeated(b"x" * 2 * 10**6, 64)})

    def unpack():
        for batch in image_batches(path, ["front"], tmp_path):
            assert len(batch) < 4

    complaint(unpack, path, spare=HALF_A_GIGABYTE)
