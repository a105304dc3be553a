"""Unpacked images in the cache: whatever happens to them, images are the dataset's."""

import io
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from damaging import damaged_bytes, examples
from hypothesis import given
from PIL import Image

from rlinf_core.data.images import parquet
from rlinf_core.data.images.parquet import ParquetImages
from rlinf_core.errors import UserError

ROWS = 200


@pytest.fixture
def cached(tmp_path, monkeypatch):
    monkeypatch.setenv("RLINF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "images"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A data file; image n is grey of the level n, the last is missing."""
    path = tmp_path_factory.mktemp("data") / "file-000.parquet"
    images = []
    for level in range(ROWS - 1):
        out = io.BytesIO()
        Image.new("RGB", (8, 6), (level, level, level)).save(out, "BMP")
        images.append({"bytes": out.getvalue(), "path": ""})
    pq.write_table(pa.table({"front": [*images, {"bytes": None, "path": None}], "n": range(ROWS)}), path)
    return path


def opened(file):
    return ParquetImages(file, ["front"], file.parent)


def levels(images, rows=(0, 63, 64, ROWS - 2)):
    return [int(images.image("front", row)[0, 0, 0]) for row in rows]


RIGHT = [0, 63, 64, ROWS - 2]


def unpacked(cached):
    (path,) = cached.iterdir()
    return path


def test_images_are_unpacked_once_and_nothing_is_left_beside_them(file, cached, monkeypatch):
    assert levels(opened(file)) == RIGHT
    monkeypatch.setattr(parquet, "_unpack", None)
    assert levels(opened(file)) == RIGHT
    assert unpacked(cached).suffix == ".arrow"
    with pytest.raises(UserError, match="row 199 of 'front'"):
        opened(file).image("front", ROWS - 1)


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def overwrite_with_another(path):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, pa.schema([("x", pa.int8())])):
        pass


DAMAGE = {
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "zeroed": zero,
    "empty": lambda path: path.write_bytes(b""),
    "of another program": overwrite_with_another,
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_file_is_named_as_the_caches_and_written_again(how, file, cached, capsys):
    opened(file)
    path = unpacked(cached)
    DAMAGE[how](path)
    assert levels(opened(file)) == RIGHT
    said = capsys.readouterr().err
    assert f"the cache is damaged: {path}" in said
    assert levels(opened(file)) == RIGHT
    assert capsys.readouterr().err == ""


def change_row(path, row):
    """Change a pixel of an image that still decodes: BMP has no checksum of its own."""
    content = bytearray(path.read_bytes())
    table = pa.ipc.open_file(pa.py_buffer(bytes(content))).read_all()
    at = content.index(table["front"][row].as_py()) + 60
    content[at : at + 3] = b"\xff\xff\xff"
    with path.open("r+b") as out:  # In place: a process that has mapped the file sees it.
        out.write(content)


def test_a_changed_image_is_found_when_it_is_read(file, cached, capsys):
    images = opened(file)
    change_row(unpacked(cached), 64)
    assert levels(images, [63]) == [63]
    assert capsys.readouterr().err == ""
    np.testing.assert_array_equal(np.unique(images.image("front", 64)), [64])
    assert "row 64 of 'front' has changed since it was written" in capsys.readouterr().err
    assert levels(images) == RIGHT


def test_damage_anywhere_changes_no_image(file, cached):
    opened(file)
    path = unpacked(cached)

    @examples(40)
    @given(damaged_bytes(path.read_bytes()))
    def fuzz(data):
        path.write_bytes(data)
        assert levels(opened(file), range(0, ROWS - 1, 9)) == [*range(0, ROWS - 1, 9)]

    fuzz()


def test_a_disk_that_changes_what_is_written_is_one_message(file, cached, monkeypatch):
    images, unpack = opened(file), parquet._unpack

    def unpack_badly(batches, path):
        unpack(batches, path)
        change_row(path, 3)

    change_row(unpacked(cached), 3)
    monkeypatch.setattr(parquet, "_unpack", unpack_badly)
    with pytest.raises(UserError, match="damaged again as soon as it is written"):
        images.image("front", 3)


def test_two_processes_that_unpack_at_once_both_read_all_images(file, cached, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)  # As in two containers with one home folder.
    read = parquet.image_batches

    def read_while_another_process_opens(*arguments):
        monkeypatch.setattr(parquet, "image_batches", read)
        batches = read(*arguments)
        yield next(batches)
        assert levels(opened(file)) == RIGHT
        yield from batches

    monkeypatch.setattr(parquet, "image_batches", read_while_another_process_opens)
    assert levels(opened(file)) == RIGHT
    assert unpacked(cached).suffix == ".arrow"


def test_what_somebody_removes_during_a_run_is_unpacked_again(file, cached, capsys):
    images = opened(file)
    shutil.rmtree(cached)
    assert levels(images) == RIGHT
    assert levels(opened(file)) == RIGHT
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [28, 30, 122])  # No space, read-only, quota.
def test_a_cache_that_cannot_be_written_is_one_message(error, file, cached, monkeypatch):
    def fails(*arguments):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(pa, "OSFile", fails)
    with pytest.raises(UserError, match=r"cannot be unpacked into .*set RLINF_CACHE"):
        opened(file)
    assert not list(cached.iterdir())
