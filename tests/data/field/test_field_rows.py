"""Rows, episodes and tasks as people have them: what the files hold counts, and only what is used is needed."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from field_datasets import (
    CAMERA,
    CHUNK,
    edit_info,
    number_of,
    of_frame,
    rows_of,
    write_dataset,
    write_episodes,
    write_lines,
    write_table,
)

from rlinf_core.contract.datasets import LeRobotDatasetConfig
from rlinf_core.data.check.files import check_files
from rlinf_core.data.check.repair import repair
from rlinf_core.data.lerobot.metadata import read_metadata
from rlinf_core.data.lerobot.source import open_lerobot
from rlinf_core.errors import UserError

DATA = f"data/{CHUNK}/file-000.parquet"


def opened(root, split="train", **settings):
    settings = {"images": {"front": CAMERA}, "decoder": "pyav"} | settings
    return open_lerobot(LeRobotDatasetConfig(repo_id=str(root), **settings), 2, split)


def places(source):
    """Episode and frame of each row, by its state."""
    return [tuple(map(int, row["observation.state"][:2])) for row in source.without_images(range(len(source)))]


def all_of(*lengths, episodes=None):
    return [(e, f) for e, n in zip(episodes or range(len(lengths)), lengths, strict=True) for f in range(n)]


def notes(root):
    damage = check_files(read_metadata("it", root), cameras=[CAMERA], vectors=["action"])
    assert damage.ok
    return {one.kind for one in damage.listed}


def test_rows_are_found_where_they_are_if_a_pointer_is_stale(tmp_path):
    """lerobot/libero: meta/episodes names the file before."""
    root = write_dataset(tmp_path / "stale")
    table = pq.read_table(root / DATA)
    pq.write_table(table.slice(0, 11), root / DATA)
    pq.write_table(table.slice(11), root / f"data/{CHUNK}/file-001.parquet")
    source = opened(root)
    assert places(source) == all_of(6, 5, 7)
    assert [number_of(row[CAMERA]) for row in source.__getitems__([10, 11, 17])] == [260, 512, 518]
    assert source.describe(11).endswith("file-001.parquet, episode 2, frame 0")
    assert notes(root) == {"stale_pointer"}
    shutil.copy(root / f"data/{CHUNK}/file-001.parquet", root / f"data/{CHUNK}/._file-001.parquet")  # Not a file.
    assert len(opened(root)) == 18
    table = read_metadata("it", root)
    assert repair(table, tmp_path / "fixed") == ["data file: corrected for 1 episode, first 2"]
    assert notes(tmp_path / "fixed") == set()
    assert places(opened(tmp_path / "fixed")) == all_of(6, 5, 7)


def test_an_index_that_restarts_with_every_episode_is_not_used(tmp_path):
    root = write_dataset(tmp_path / "restarts", version="v2.1")
    for path in sorted((root / "data").rglob("*.parquet")):
        table = pq.read_table(path)
        pq.write_table(table.set_column(0, "index", pa.array(range(len(table)))), path)
    source = opened(root)
    assert places(source) == all_of(6, 5, 7)
    assert source.columns(range(18))["index"].tolist() == list(range(18))
    assert notes(root) == {"stale_index"}


def test_only_the_files_of_chosen_episodes_are_needed(tmp_path):
    root = write_dataset(tmp_path / "part", version="v2.1")
    data, video = root / f"data/{CHUNK}", root / f"videos/{CHUNK}/{CAMERA}"
    (data / "episode_000002.parquet").write_bytes(b"PAR1 cut off")
    (video / "episode_000002.mp4").unlink()
    with pytest.raises(UserError, match=r"episode_000002\.parquet cannot be read"):
        opened(root)
    assert places(opened(root, exclude_episodes=(2,))) == all_of(6, 5)
    (data / "episode_000002.parquet").unlink()
    source = opened(root, episodes=(0, 1))
    assert places(source) == all_of(6, 5)
    assert [number_of(row[CAMERA]) for row in source.__getitems__([5, 6])] == [5, of_frame(1, 0)]
    with pytest.raises(UserError, match=r"episode_000002\.parquet cannot be .*no other data file holds episode 2"):
        opened(root)
    chosen = read_metadata("it", root).episodes < 2
    assert check_files(read_metadata("it", root), cameras=[CAMERA], vectors=[], chosen=chosen).ok
    assert places(opened(root, episodes=(0, 1), images={})) == all_of(6, 5)


def test_cameras_that_are_not_named_need_not_exist(tmp_path):
    root = write_dataset(tmp_path / "camera")
    features = json.loads((root / "meta/info.json").read_text())["features"]
    edit_info(root, features=features | {"observation.images.gone": {"dtype": "video", "shape": [8, 8, 3]}})
    assert len(opened(root)) == 18


def test_a_dataset_with_a_gap_in_its_numbers_is_read_and_its_counts_can_be_repaired(tmp_path):
    """A recorder crashed: episodes 2 and 3 are lost, the counts still include them."""
    lengths, kept = (6, 5, 7, 4, 6), [0, 1, 4]
    root = write_dataset(tmp_path / "gap", lengths)
    rows = [i for i, e in enumerate(rows_of(lengths, 10, [0] * 5)["episode_index"]) if e in kept]
    for path in (root / DATA, root / f"meta/episodes/{CHUNK}/file-000.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.take(rows if path == root / DATA else kept), path)
    with pytest.raises(UserError, match=r"counts 5 episodes and 28 frames, meta/episodes lists 3 and 17\. .*--repair"):
        opened(root)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    lines = repair(read_metadata("it", root), tmp_path / "fixed")
    assert lines[0] == "meta/info.json: total_episodes is 3 instead of 5"
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
    source = opened(tmp_path / "fixed")
    assert places(source) == all_of(6, 5, 6, episodes=kept)
    assert [number_of(row[CAMERA]) for row in source.__getitems__([11, 16])] == [of_frame(4, 0), of_frame(4, 5)]
    with pytest.raises(UserError, match="it exists"):
        repair(read_metadata("it", root), tmp_path / "fixed")


def test_metadata_in_files_of_different_integers_are_joined(tmp_path):
    root = write_dataset(tmp_path / "shards")
    table = pq.read_table(root / f"meta/episodes/{CHUNK}/file-000.parquet")
    small = table.slice(2).cast(
        pa.schema([field.with_type(pa.int32()) if field.type == pa.int64() else field for field in table.schema])
    )
    pq.write_table(table.slice(0, 2), root / f"meta/episodes/{CHUNK}/file-000.parquet")
    pq.write_table(small, root / f"meta/episodes/{CHUNK}/file-001.parquet")
    (root / f"meta/episodes/{CHUNK}/._file-001.parquet").write_bytes(b"\0\5\26\7")
    assert places(opened(root)) == all_of(6, 5, 7)


@pytest.mark.parametrize(
    ("columns", "prompt"),
    [
        ({"robot": ["g1", "g1"], "task": ["hold the bag", "squat"]}, "squat"),
        ({"words": ["hold the bag", "squat"], "difficulty": [1, 2]}, "squat"),
        ({"robot": ["g1", "g1"], "sentence": ["hold the bag", "squat"]}, None),
    ],
)
def test_the_prompt_is_the_column_called_task_or_the_only_text(columns, prompt, tmp_path):
    root = write_dataset(tmp_path / "tasks", (4, 4), tasks=[0, 1])
    write_table(root / "meta/tasks.parquet", {"task_index": [0, 1]} | columns)
    if prompt is None:
        with pytest.raises(UserError, match="it has robot, sentence, and none is called task"):
            opened(root)
    else:
        assert opened(root).without_images([7])[0]["task"] == prompt


def test_the_prompt_is_the_index_of_a_pandas_table(tmp_path):
    """lerobot's own layout, here with a further column of texts before it."""
    pandas = pytest.importorskip("pandas")
    root = write_dataset(tmp_path / "index", (4, 4), tasks=[0, 1])
    index = pandas.Index(["hold the bag", "squat"], name="instruction")
    frame = pandas.DataFrame({"task_index": [0, 1], "robot": ["g1", "g1"]}, index=index)
    frame.to_parquet(root / "meta/tasks.parquet")
    assert opened(root).without_images([0])[0]["task"] == "hold the bag"


def test_a_text_means_all_numbers_that_have_it(tmp_path):
    """RLinf/RLinf#1331: merged datasets list a sentence twice."""
    texts = ("pick the cube", "open the drawer", "pick the cube")
    root = write_dataset(tmp_path / "twice", (4, 3, 5), tasks=[0, 1, 2], texts=texts, version="v2.1")
    for name in ("pick the cube", 0, 2):
        assert places(opened(root, tasks=(name,))) == all_of(4, 5, episodes=[0, 2])
        held_out = opened(root, "validation", validation_tasks=(name,))
        assert places(held_out) == all_of(4, 5, episodes=[0, 2])
        assert places(opened(root, validation_tasks=(name,))) == all_of(3, episodes=[1])


def test_tasks_are_needed_only_for_prompts(tmp_path):
    root = write_dataset(tmp_path / "none", version="v2.1")
    (root / "meta/tasks.jsonl").unlink()
    with pytest.raises(UserError, match=r"tasks\.jsonl cannot be read"):
        opened(root)
    assert len(opened(root, prompt_from_task=False, default_prompt="pick")) == 18
    write_lines(root / "meta/tasks.jsonl", [{"task_index": 5, "task": "other"}])
    with pytest.raises(UserError, match=r"has the task 0, which meta/tasks\.jsonl does not list: add its text"):
        opened(root)


def test_a_dataset_without_frame_numbers_is_read_in_its_order(tmp_path):
    """GR00T's datasets have no column frame_index."""
    root = write_dataset(tmp_path / "gr00t", version="v2.1")
    for path in sorted((root / "data").rglob("*.parquet")):
        pq.write_table(pq.read_table(path).drop_columns(["frame_index", "index"]), path)
    source = opened(root)
    assert places(source) == all_of(6, 5, 7)
    assert source.columns([0, 6, 17])["frame_index"].tolist() == [0, 0, 6]
    assert notes(root) == {"derived_column"}


def test_files_under_another_numbering_of_folders_are_found(tmp_path):
    """A fork's template says chunk-{episode_index:03d}, and all files are in chunk-000."""
    root = write_dataset(tmp_path / "fork", version="v2.1")
    edit_info(
        root,
        data_path="data/chunk-{episode_index:03d}/episode_{episode_index:06d}.parquet",
        video_path="videos/chunk-{episode_index:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    )
    source = opened(root)
    assert [number_of(row[CAMERA]) for row in source.__getitems__([0, 6, 17])] == [0, of_frame(1, 0), of_frame(2, 6)]


def test_a_byte_order_mark_is_no_damage(tmp_path):
    root = write_dataset(tmp_path / "bom", version="v2.1")
    for name in ("info.json", "tasks.jsonl", "episodes.jsonl"):
        path = root / "meta" / name
        path.write_text("\ufeff" + path.read_text(), encoding="utf-8")
    assert len(opened(root)) == 18


def test_what_is_not_a_dataset_says_what_it_is(tmp_path):
    write_dataset(tmp_path / "shards/rank_0/id_0")
    write_dataset(tmp_path / "shards/rank_1/id_0")
    with pytest.raises(UserError, match=r"2 datasets are below it[\s\S]*\[\[data\.mixture\]\][\s\S]*rank_1/id_0"):
        opened(tmp_path / "shards")
    with pytest.raises(UserError, match=r"one level too deep: data\.repo_id = .*rank_0/id_0"):
        opened(tmp_path / "shards/rank_0")
    root = write_dataset(tmp_path / "lance")
    edit_info(root, storage_format="lance")
    with pytest.raises(UserError, match=r"is stored as lance .* which rlinf does not read.*LeRobotDataset\.create"):
        opened(root)


def test_episodes_listed_twice_are_named(tmp_path):
    root = write_dataset(tmp_path / "twice")
    write_episodes(root, (6, 5, 7), 10, episodes=[0, 1, 1])
    with pytest.raises(UserError, match="lists 2 episodes in 3 rows: twice 1"):
        opened(root)
