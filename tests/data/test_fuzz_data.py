"""Damage to any file of a dataset, in every format: reading raises one message that names the file."""

import io
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from damaging import complaint, damaged, damaged_bytes, examples, json_texts
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rlinf_core.contract.datasets import LeRobotDatasetConfig
from rlinf_core.data.check.files import check_files, number_columns
from rlinf_core.data.lerobot.metadata import read_metadata
from rlinf_core.data.lerobot.source import open_lerobot
from rlinf_core.data.loading.encoding import read_rows
from rlinf_core.testing.lerobot import CAMERAS
from rlinf_core.testing.lerobot_v2 import write_v2

VERSIONS = ("v2.0", "v2.1", "v3.0")


@pytest.fixture(scope="module")
def folders(image_dataset, tmp_path_factory):
    """Format -> a dataset with pictures in its parquet files, to be damaged; `restore` mends it."""
    root = tmp_path_factory.mktemp("fuzzed")
    for version in VERSIONS[:2]:
        write_v2(image_dataset.root, root / version, version)
    shutil.copytree(image_dataset.root, root / "v3.0")
    return {version: root / version for version in VERSIONS}


@pytest.fixture
def damage(monkeypatch, tmp_path):
    """`damage(file, data, read)`: what reading complains of while the file holds other bytes."""
    monkeypatch.setenv("RLINF_CACHE", str(tmp_path))

    def damage(file, data, read, *names):
        whole = file.read_bytes()
        file.write_bytes(data)
        try:
            return complaint(read, *names)
        finally:
            file.write_bytes(whole)

    return damage


def read_all(root):
    config = LeRobotDatasetConfig(repo_id=str(root), images={"front": CAMERAS[0]}, validation_fraction=0.3)
    for split in ("train", "validation"):
        source = open_lerobot(config, 2, split)
        read_rows(source, range(0, len(source), 5))


def check_all(root):
    metadata = read_metadata("it", root)
    cameras = [*metadata.columns_of("image"), *metadata.columns_of("video")]
    check_files(metadata, cameras=cameras, vectors=number_columns(metadata), depth="ends")


READERS = {"train": read_all, "check": check_all}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("version", VERSIONS)
def test_info(version, reader, folders, damage):
    root = folders[version]
    file = root / "meta/info.json"

    @examples(10)
    @given(json_texts(json.loads(file.read_text())))
    def fuzz(data):
        damage(file, data, lambda: READERS[reader](root), root, "data.images")

    fuzz()


@pytest.mark.parametrize("name", ["episodes.jsonl", "tasks.jsonl"])
@pytest.mark.parametrize("reader", READERS)
def test_lists_of_v2(name, reader, folders, damage):
    root = folders["v2.1"]
    file = root / "meta" / name
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    texts = damaged(lines).map(lambda some: "".join(json.dumps(line) + "\n" for line in some).encode())

    @examples(10)
    @given(st.one_of(texts, texts, damaged_bytes(file.read_bytes())))
    def fuzz(data):
        damage(file, data, lambda: READERS[reader](root), root)

    fuzz()


def parquet_bytes(table):
    out = io.BytesIO()
    pq.write_table(table, out)
    return out.getvalue()


@st.composite
def damaged_tables(draw, table):
    """A table with a column gone, of another type, or with other values in it."""
    at = draw(st.integers(0, table.num_columns - 1))
    name, rows = table.column_names[at], table.num_rows
    columns = [
        *(pa.nulls(rows), pa.array(["x"] * rows), pa.array([b"\xff"] * rows), pa.array([True] * rows)),
        *(
            pa.array([value] * rows, kind)
            for value, kind in ((-1, pa.int64()), (2**62, pa.int64()), (1.5, pa.float64()))
        ),
        *(pa.array([value] * rows, pa.float32()) for value in (float("nan"), float("inf"))),
        *(pa.array([value] * rows) for value in ([], [1, 2], [[1.0]], {"bytes": b"no"}, {"path": "../../../x"})),
        *(pa.array([{"bytes": None, "path": path}] * rows) for path in ("/etc/passwd", "\0", "", "." * 5000)),
        pa.array(range(rows)),
        pa.array([0] * rows, pa.timestamp("us")),
    ]
    how = draw(st.sampled_from(("replace", "replace", "replace", "remove", "rows", "twice")))
    if how == "remove":
        return table.remove_column(at)
    if how == "rows":
        return table.slice(draw(st.integers(0, rows)), draw(st.integers(0, rows)))
    if how == "twice":
        return table.append_column(name, table[name])
    return table.set_column(at, name, draw(st.sampled_from(columns)))


TABLES = [
    ("v2.0", "data/chunk-000/episode_000001.parquet"),
    ("v3.0", "data/chunk-000/file-001.parquet"),
    ("v3.0", "meta/tasks.parquet"),
    ("v3.0", "meta/episodes/chunk-000/file-000.parquet"),
]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("version", "name"), TABLES)
def test_parquet(version, name, reader, folders, damage):
    root = folders[version]
    file = root / name

    @examples(10)
    @given(st.one_of(damaged_tables(pq.read_table(file)).map(parquet_bytes), damaged_bytes(file.read_bytes())))
    def fuzz(data):
        damage(file, data, lambda: READERS[reader](root), root, "data.images")

    fuzz()


@pytest.fixture(scope="module")
def film(video_dataset, tmp_path_factory):
    root = tmp_path_factory.mktemp("film") / "v2.1"
    write_v2(video_dataset.root, root, "v2.1")
    return root


@pytest.mark.parametrize("reader", READERS)
def test_videos(reader, film, damage):
    file = film / f"videos/chunk-000/{CAMERAS[0]}/episode_000000.mp4"

    @examples(10)
    @given(damaged_bytes(file.read_bytes()))
    def fuzz(data):
        damage(file, data, lambda: READERS[reader](film), film)

    fuzz()


def test_pictures():
    from rlinf_core.data.images.pictures import decode

    whole = []
    for kind in ("PNG", "JPEG", "BMP", "GIF", "TIFF"):
        out = io.BytesIO()
        Image.effect_noise((24, 16), 50).convert("RGB").save(out, kind)
        whole.append(out.getvalue())

    @examples(60)
    @given(st.one_of([damaged_bytes(data) for data in whole]))
    def fuzz(data):
        complaint(lambda: decode(data, "row 3"), "row 3")

    fuzz()
