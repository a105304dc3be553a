"""One dataset in formats v2.0, v2.1 and v3.0: each gives the same rows and pixels, from a folder and from a hub."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import point_to, serve
from huggingface_hub import constants

from rlinf_core import hub
from rlinf_core.contract.datasets import LeRobotDatasetConfig
from rlinf_core.data.check.numbers import check_metadata
from rlinf_core.data.lerobot.files import find_dataset
from rlinf_core.data.lerobot.metadata import load_metadata
from rlinf_core.data.lerobot.source import open_lerobot
from rlinf_core.errors import UserError
from rlinf_core.testing import write_tiny_dataset
from rlinf_core.testing.lerobot import CAMERAS
from rlinf_core.testing.lerobot_v2 import write_v2

V2 = ("v2.0", "v2.1")


def config(repo_id, cameras=CAMERAS, **fields):
    return LeRobotDatasetConfig(
        repo_id=str(repo_id), images=dict(zip(("front", "wrist"), cameras, strict=False)), **fields
    )


def rows_of(repo_id, **fields):
    source = open_lerobot(config(repo_id, **fields), 5, "train")
    return source.__getitems__(range(len(source)))


def assert_same_rows(rows, others):
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for key, value in row.items():
            np.testing.assert_array_equal(value, other[key])


@pytest.fixture(scope="module")
def older(image_dataset, video_dataset, tmp_path_factory):
    """(pictures, version) -> the folder of the dataset in that format, with two episodes a folder."""
    root = tmp_path_factory.mktemp("older")
    made = {}
    for pictures, dataset in (("image", image_dataset), ("video", video_dataset)):
        for version in V2:
            made[pictures, version] = root / pictures / version
            write_v2(dataset.root, made[pictures, version], version, chunks_size=2)
    return made


@pytest.mark.parametrize("version", V2)
@pytest.mark.parametrize("pictures", ["image", "video"])
def test_every_version_gives_the_same_rows(pictures, version, older, request):
    newest = request.getfixturevalue(f"{pictures}_dataset").root
    root = older[pictures, version]
    assert_same_rows(rows_of(root), rows_of(newest))
    metadata = load_metadata("it", root)
    assert metadata.version == version
    assert [path.parent.name for path in metadata.data_files] == ["chunk-000", "chunk-000", "chunk-001", "chunk-001"]
    source = open_lerobot(config(root), 1, "train")
    assert source.describe(20) == f"{root}, data/chunk-001/episode_000002.parquet, episode 2, frame 4"


@pytest.mark.parametrize("pictures", ["image", "video"])
def test_what_lerobot_makes_of_v21_gives_the_same_rows(pictures, older, tmp_path, request):
    """lerobot's own converter reads our v2.1, and joins its files anew."""
    convert_dataset = pytest.importorskip("lerobot.scripts.convert_dataset_v21_to_v30").convert_dataset
    root = shutil.copytree(older[pictures, "v2.1"], tmp_path / "converted")
    convert_dataset("tests/tiny", root=root, push_to_hub=False)
    assert load_metadata("it", root).version == "v3.0"
    assert_same_rows(rows_of(root), rows_of(request.getfixturevalue(f"{pictures}_dataset").root))


def test_a_tiny_dataset_of_an_older_format(tmp_path):
    tiny = write_tiny_dataset(tmp_path / "tiny", lengths=(3, 4), version="v2.1")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    row = rows_of(tiny.root)[4]
    np.testing.assert_array_equal(row[CAMERAS[1]], tiny.images[1][1, 1])
    np.testing.assert_array_equal(row["observation.state"], tiny.states[1][1])
    assert row["task"] == tiny.tasks[1]


def test_episodes_need_not_be_numbered_without_gaps_or_listed_in_order(older, tmp_path):
    root = shutil.copytree(older["image", "v2.0"], tmp_path / "gaps")
    expected = rows_of(root)
    path = root / "meta/episodes.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[3]["episode_index"] = 7
    path.write_text("\n".join(json.dumps(line) for line in [lines[3], *lines[:3]]) + "\n\n")
    renumbered = root / "data/chunk-003/episode_000007.parquet"
    renumbered.parent.mkdir()
    table = pq.read_table(root / "data/chunk-001/episode_000003.parquet")
    at = table.column_names.index("episode_index")
    pq.write_table(table.set_column(at, "episode_index", pa.array([7] * len(table))), renumbered)
    assert_same_rows(
        rows_of(root),
        [row | {"episode_index": 7 if row["episode_index"] == 3 else row["episode_index"]} for row in expected],
    )


def test_texts_of_tasks_may_hold_any_character_or_be_missing(older, tmp_path):
    root = shutil.copytree(older["image", "v2.1"], tmp_path / "texts")
    lines = ['{"task_index": 0, "task": "push\u2028the\x85block"}', '{"task_index": 1, "task": null}']
    (root / "meta/tasks.jsonl").write_text("\r\n".join(lines), encoding="utf-8")
    assert {row["task"] for row in rows_of(root)} == {"push\u2028the\x85block", ""}


@pytest.mark.parametrize("kind", ["files", "bytes", "large bytes"])
def test_pictures_may_be_files_or_plain_bytes(kind, older, tmp_path):
    root = shutil.copytree(older["image", "v2.0"], tmp_path / "loose")
    expected = rows_of(root)
    for path in root.glob("data/*/*.parquet"):
        table = pq.read_table(path)
        for camera in CAMERAS:
            at, pictures = table.column_names.index(camera), table[camera].to_pylist()
            if kind != "files":
                type_ = pa.binary() if kind == "bytes" else pa.large_binary()
                column = pa.array([one["bytes"] for one in pictures], type_)
            else:
                names = [f"images/{camera}/{path.stem}/frame_{i:06d}.png" for i in range(len(pictures))]
                for name, one in zip(names, pictures, strict=True):
                    (root / name).parent.mkdir(parents=True, exist_ok=True)
                    (root / name).write_bytes(one["bytes"])
                column = pa.array([{"bytes": None, "path": name} for name in names], table[camera].type)
            table = table.set_column(at, camera, column)
        pq.write_table(table, path)
    assert_same_rows(rows_of(root), expected)
    if kind == "files":
        (root / "images" / CAMERAS[0] / "episode_000001" / "frame_000003.png").unlink()
        shutil.move(root, tmp_path / "moved")  # Else the pictures are unpacked already.
        with pytest.raises(UserError, match=r"episode_000001\.parquet: row 3 of '.*front' contains no image"):
            rows_of(tmp_path / "moved")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "meta/episodes.jsonl",
            '{"episode_index": 0, "length": 9}\n{"episode_',
            r"episodes\.jsonl, line 2, is not a JSON",
        ),
        ("meta/episodes.jsonl", '{"episode_index": 0}\n', "line 1, is not a JSON object with episode_index, length"),
        (
            "meta/episodes.jsonl",
            '{"episode_index": 0, "length": 9}\n',
            "counts 4 episodes and 36 frames, meta/episodes.jsonl lists 1 and 9",
        ),
        ("meta/tasks.jsonl", None, r"tasks\.jsonl cannot be read"),
        ("meta/info.json", '{"codebase_version": "v2.1"}', "damaged: fps: Field required; features: "),
        ("meta/info.json", '{"codebase', r"info\.json cannot be read"),
        ("meta/info.json", "[]", r"info\.json is damaged: the whole file: Input should be a valid dictionary"),
        ("meta/info.json", ('"dtype": "image"', '"type": "image"'), r"features\.observation\.images.*has no dtype"),
        (
            "meta/info.json",
            ('"shape": [\n                3\n', '"forms": [\n                3\n'),
            r"has no shape, which must be a list",
        ),
        ("meta/tasks.jsonl", '{"task_index": "0", "task": "push"}\n', "'0': 'push' is not an integer with a text"),
        ("meta/info.json", ("episode_index:", "episode:"), r"the path 'data/.*uses fields other than episode_chunk, "),
        ("meta/episodes.jsonl", ('"length": 9', '"length": "9"'), "a length is not an integer"),
        ("meta/info.json", ('"data/', '"../'), r"the path '\.\./.*' is outside the dataset's folder"),
    ],
)
def test_damaged_metadata_are_named(file, content, message, older, tmp_path):
    root = shutil.copytree(older["image", "v2.1"], tmp_path / "damaged")
    if content is None:
        (root / file).unlink()
    elif isinstance(content, tuple):
        (root / file).write_text((root / file).read_text().replace(*content))
    else:
        (root / file).write_text(content)
    with pytest.raises(UserError, match=message):
        load_metadata("it", root)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("dataset_from_index", None, "'dataset_from_index' has no value for an episode"),
        ("dataset_to_index", 9.5, "'dataset_to_index' is not a numeric column"),
        ("data/file_index", "0", None),
        (f"videos/{CAMERAS[0]}/from_timestamp", None, "from_timestamp' has no value for an episode"),
    ],
)
def test_damaged_episodes_of_v30_are_named(column, value, message, video_dataset, tmp_path):
    root = shutil.copytree(video_dataset.root, tmp_path / "damaged")
    change_episodes(root, column, lambda values: [type(value or one)(one) for one in values[:-1]] + [value])
    if message is None:  # Numbers written as texts are read.
        assert len(load_metadata("it", root).episodes) == 4
        return
    with pytest.raises(UserError, match=message):
        load_metadata("it", root)


def change_episodes(root, column, change):
    (path,) = root.glob("meta/episodes/*/*.parquet")
    table = pq.read_table(path)
    pq.write_table(
        table.set_column(table.column_names.index(column), column, pa.array(change(table[column].to_pylist()))), path
    )


@pytest.mark.parametrize("version", [*V2, "v3.0"])
def test_a_quality_that_is_not_there_is_named(version, older, image_dataset):
    root = image_dataset.root if version == "v3.0" else older["image", version]
    with pytest.raises(
        UserError, match=r"quality_column names 'lenth', which .*; its episodes have length, .*; its fr"
    ):
        rows_of(root, quality_column="lenth")


def test_a_dataset_without_episodes_is_refused(older, tmp_path):
    root = shutil.copytree(older["image", "v2.1"], tmp_path / "none")
    (root / "meta/episodes.jsonl").write_text("")
    with pytest.raises(UserError, match="meta/ lists no episode"):
        load_metadata("it", root)


def test_episodes_that_overlap_in_a_video_are_found_and_not_trained_on(video_dataset, tmp_path):
    root = shutil.copytree(video_dataset.root, tmp_path / "overlap")
    change_episodes(
        root, f"videos/{CAMERAS[1]}/from_timestamp", lambda starts: [starts[0], starts[1] - 0.2, *starts[2:]]
    )
    (finding,) = check_metadata(load_metadata("it", root))
    assert (finding.kind, finding.episode) == ("wrong_timestamp", 1)
    assert "overlap with episode 0" in finding.message
    with pytest.raises(UserError, match=r"file-000\.mp4: .* episode 0 with 9 frames and episode 1 overlap"):
        rows_of(root)
    assert len(rows_of(root, exclude_episodes=(1,))) == 29
    assert len(rows_of(root, cameras=CAMERAS[:1])) == 36


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_LEROBOT_HOME", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub._open_snapshot.cache_clear()
    yield tmp_path
    hub._open_snapshot.cache_clear()


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_of_a_dataset_on_the_hub_only_the_cameras_in_use_are_downloaded(
    version, older, video_dataset, empty_cache, monkeypatch
):
    root = video_dataset.root if version == "v3.0" else older["video", version]
    with serve(root) as server:
        point_to(monkeypatch, server.address)
        rows = rows_of("lab/arm", cameras=CAMERAS[:1], revision="v2")
        metadata = load_metadata("it", root)
        wanted = [*metadata.files(CAMERAS[:1]), *(path for path in (root / "meta").rglob("*") if path.is_file())]
        assert server.got() == sorted(path.relative_to(root).as_posix() for path in wanted)
        before = len(server.asked)
        assert_same_rows(rows_of("lab/arm@v2", cameras=CAMERAS[:1])[:3], rows[:3])
        assert [verb for verb, _ in server.asked[before:]] == ["GET"]  # The list of metadata files.
    assert_same_rows(rows, rows_of(root, cameras=CAMERAS[:1]))
    point_to(monkeypatch, "http://127.0.0.1:9")
    hub._open_snapshot.cache_clear()
    assert_same_rows(rows_of("lab/arm@v2", cameras=CAMERAS[:1])[:1], rows[:1])
    with pytest.raises(UserError, match=r"data\.repo_id: 'lab/arm' .*wrist.* the hub is unreachable"):
        rows_of("lab/arm@v2")


def test_only_the_videos_of_the_episodes_in_use_are_downloaded_or_missed(older, empty_cache, monkeypatch, tmp_path):
    root = shutil.copytree(older["video", "v2.1"], tmp_path / "part")
    for path in root.glob("videos/*/*/episode_000003.mp4"):
        path.unlink()
    fields = {"exclude_episodes": (3,), "validation_episodes": (1,)}
    with serve(root) as server:
        point_to(monkeypatch, server.address)
        rows = rows_of("lab/arm", **fields)
        videos = {path.rpartition("/")[2] for path in server.got() if path.startswith("videos")}
    assert videos == {f"episode_00000{episode}.mp4" for episode in (0, 1, 2)}
    assert_same_rows(rows, rows_of(root, **fields))
    with pytest.raises(UserError, match=r"lacks the video files .*episode_000003\.mp4"):
        rows_of(root)


def test_what_lerobot_recorded_here_needs_no_hub(empty_cache, image_dataset):
    shutil.copytree(image_dataset.root, empty_cache / "home/lerobot/lab/arm")
    assert find_dataset("lab/arm").root == empty_cache / "home/lerobot/lab/arm"
    (empty_cache / "home/lerobot/lab/arm/.cache/huggingface/download").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot be loaded"):  # Parts that an old version of lerobot downloaded.
        find_dataset("lab/arm")


def test_a_revision_belongs_to_a_hub_id_and_is_said_once(image_dataset):
    with pytest.raises(UserError, match="applies to hub ids"):
        find_dataset(str(image_dataset.root), "main")
    with pytest.raises(UserError, match="set one"):
        find_dataset("lab/arm@v1", "v2")
