import json
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlinf_core.contract.datasets import LeRobotDatasetConfig
from rlinf_core.data.lerobot.source import open_lerobot
from rlinf_core.errors import UserError
from rlinf_core.testing.lerobot import CAMERAS, FPS

HORIZON = 5


def config(root, **fields):
    return LeRobotDatasetConfig(repo_id=str(root), images=dict(zip(("front", "wrist"), CAMERAS, strict=True)), **fields)


def uint8_hwc(image):
    """LeRobotDataset's pictures: CHW, uint8 or float32 in [0, 1]."""
    if image.is_floating_point():
        image = (image * 255).round()
    return image.permute(1, 2, 0).numpy().astype(np.uint8)


@pytest.mark.parametrize("kind", ["video_dataset", "image_dataset"])
def test_every_row_equals_lerobots_own(kind, request):
    lerobot_dataset = pytest.importorskip("lerobot.datasets.lerobot_dataset")

    root = request.getfixturevalue(kind).root
    steps = {"action": [step / FPS for step in range(HORIZON)]}
    theirs = lerobot_dataset.LeRobotDataset(
        "tests/tiny", root, delta_timestamps=steps, video_backend="pyav", return_uint8=True
    )
    source = open_lerobot(config(root), HORIZON, "train")
    source._videos._decoder = "pyav"
    assert len(source) == len(theirs)
    order = np.random.default_rng(0).permutation(len(source)).tolist()
    for index, ours in zip(order, source.__getitems__(order), strict=True):
        expected = theirs[index]
        assert ours.keys() == expected.keys()
        assert ours["task"] == expected["task"]
        for column in CAMERAS:
            np.testing.assert_array_equal(ours[column], uint8_hwc(expected[column]))
        for column in ours.keys() - {"task", *CAMERAS}:
            np.testing.assert_array_equal(ours[column], expected[column].numpy())


@pytest.mark.parametrize("kind", ["video_dataset", "image_dataset"])
def test_closed_files_are_opened_again(kind, request):
    source = open_lerobot(config(request.getfixturevalue(kind).root), HORIZON, "train")
    (before,) = source.__getitems__([3])
    source.close()
    (after,) = source.__getitems__([3])
    for column in CAMERAS:
        np.testing.assert_array_equal(after[column], before[column])


def test_chunks_repeat_the_last_action_of_the_episode(image_dataset):
    source = open_lerobot(config(image_dataset.root), HORIZON, "train")
    row = source.without_images([len(image_dataset.actions[0]) - 2])[0]
    last = image_dataset.actions[0][-1]
    np.testing.assert_array_equal(row["action"], np.stack([image_dataset.actions[0][-2], *[last] * (HORIZON - 1)]))
    assert row["action_is_pad"].tolist() == [False, False, True, True, True]
    assert not CAMERAS & row.keys()


def test_without_actions_rows_have_none(image_dataset):
    row = open_lerobot(config(image_dataset.root), 0, "train").without_images([0])[0]
    assert not {"action", "action_is_pad"} & row.keys()
    assert row["observation.state"].shape == (3,)


def test_only_named_cameras_are_decoded(image_dataset):
    dataset = LeRobotDatasetConfig(repo_id=str(image_dataset.root), images={"wrist": CAMERAS[1]})
    row = open_lerobot(dataset, 1, "train").__getitems__([3])[0]
    assert CAMERAS[0] not in row
    np.testing.assert_array_equal(row[CAMERAS[1]], image_dataset.images[0][3, 1])


def test_a_copy_reads_the_same_and_rows_tell_where_they_come_from(video_dataset):
    source = open_lerobot(config(video_dataset.root), HORIZON, "train")
    first = source.__getitems__([0, 20])
    copy = pickle.loads(pickle.dumps(source))
    for ours, again in zip(first, copy.__getitems__([0, 20]), strict=True):
        np.testing.assert_array_equal(ours[CAMERAS[0]], again[CAMERAS[0]])
    assert source.describe(20) == f"{video_dataset.root}, data/chunk-000/file-002.parquet, episode 2, frame 4"


def test_splits_are_disjoint_complete_and_deterministic(image_dataset):
    dataset = config(image_dataset.root, validation_fraction=0.5)
    train, held_out = (open_lerobot(dataset, HORIZON, split) for split in ("train", "validation"))
    assert len(train) + len(held_out) == 36
    assert not set(train.episodes) & set(held_out.episodes)
    for source in (train, held_out):  # Half of each of the two tasks.
        assert {row["task"] for row in source.without_images(range(len(source)))} == set(image_dataset.tasks)
    again = open_lerobot(dataset, HORIZON, "validation")
    np.testing.assert_array_equal(held_out.episodes, again.episodes)


def test_splits_share_what_is_read_while_the_files_are_the_same(image_dataset, tmp_path):
    root = shutil.copytree(image_dataset.root, tmp_path / "shared")
    dataset = config(root, validation_episodes=(1,))
    train, held_out = (open_lerobot(dataset, HORIZON, split) for split in ("train", "validation"))
    assert train._columns is held_out._columns
    path = root / "data/chunk-000/file-001.parquet"
    table = pq.read_table(path)
    at = table.column_names.index("action")
    pq.write_table(table.set_column(at, "action", pa.array([[5.0, 5.0]] * 7, pa.list_(pa.float32(), 2))), path)
    assert open_lerobot(dataset, HORIZON, "validation").without_images([0])[0]["action"].max() == 5
    np.testing.assert_array_equal(held_out.without_images([0])[0]["action"][0], image_dataset.actions[1][0])


def test_named_episodes_are_held_out(image_dataset):
    dataset = config(image_dataset.root, validation_episodes=(1,))
    assert set(open_lerobot(dataset, 1, "validation").episodes) == {1}
    assert set(open_lerobot(dataset, 1, "train").episodes) == {0, 2, 3}
    row = open_lerobot(dataset, 1, "validation").__getitems__([2])[0]
    np.testing.assert_array_equal(row[CAMERAS[0]], image_dataset.images[1][2, 0])
    with pytest.raises(UserError, match=r"validation_episodes names \[9\].* 0 to 3"):
        open_lerobot(config(image_dataset.root, validation_episodes=(9,)), 1, "train")
    with pytest.raises(UserError, match="no episode is held out"):
        open_lerobot(config(image_dataset.root), 1, "validation")


def test_the_fingerprint_follows_the_data(image_dataset, tmp_path):
    same = open_lerobot(config(image_dataset.root), HORIZON, "train").fingerprint()
    assert open_lerobot(config(image_dataset.root), HORIZON, "train").fingerprint() == same
    assert open_lerobot(config(image_dataset.root, validation_episodes=(1,)), HORIZON, "train").fingerprint() != same
    root = shutil.copytree(image_dataset.root, tmp_path / "copy")
    assert open_lerobot(config(root), HORIZON, "train").fingerprint() == same
    path = root / "data/chunk-000/file-001.parquet"
    table = pq.read_table(path)
    states = table["observation.state"].to_pylist()
    states[2][1] += 1.0
    at = table.column_names.index("observation.state")
    pq.write_table(table.set_column(at, "observation.state", pa.array(states, pa.list_(pa.float32(), 3))), path)
    assert open_lerobot(config(root), HORIZON, "train").fingerprint() != same


def test_a_missing_column_is_named_with_near_ones_first(image_dataset):
    with pytest.raises(UserError, match=r"data\.state names 'observation\.stat'.*columns are observation\.state, "):
        open_lerobot(config(image_dataset.root, state=("observation.stat",)), 1, "train")
    with pytest.raises(UserError, match=r"data\.images\.front names 'observation\.images\.fron'"):
        open_lerobot(config(image_dataset.root).model_copy(update={"images": {"front": CAMERAS[0][:-1]}}), 1, "train")
    with pytest.raises(UserError, match="contains float32, not images"):
        open_lerobot(config(image_dataset.root).model_copy(update={"images": {"front": "action"}}), 1, "train")


@pytest.mark.parametrize(
    ("version", "message"),
    [("v1.6", r"format v1\.6; supported are v2\.0, v2\.1, v3\.0.*convert_dataset_v1_to_v2"), ("v4.0", r"v4\.0.*newer")],
)
def test_another_format_version_is_refused_with_the_way_out(image_dataset, tmp_path, version, message):
    root = shutil.copytree(image_dataset.root, tmp_path / "old")
    info = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps(info | {"codebase_version": version}))
    with pytest.raises(UserError, match=message):
        open_lerobot(config(root), 1, "train")


def test_a_missing_video_is_found_before_training_starts(video_dataset, tmp_path):
    root = shutil.copytree(video_dataset.root, tmp_path / "broken")
    gone = sorted((root / "videos").glob("*/*/*.mp4"))[-1]
    gone.unlink()
    with pytest.raises(UserError, match=f"lacks the video files {gone.relative_to(root)}: "):
        open_lerobot(config(root), 1, "train")


def test_incomplete_datasets_are_refused(image_dataset, tmp_path):
    root = shutil.copytree(image_dataset.root, tmp_path / "broken")
    file = root / "data/chunk-000/file-002.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"file-002\.parquet cannot be read: .*[^.]\. Download"):
        open_lerobot(config(root), 1, "train")
    file.unlink()
    with pytest.raises(UserError, match=r"file-002\.parquet cannot be read"):
        open_lerobot(config(root), 1, "train")
    shutil.copy(root / "data/chunk-000/file-001.parquet", root / "data/chunk-000/file-002.parquet")
    with pytest.raises(UserError, match=r"has 14 rows of episode 1, which has 7 frames according to meta"):
        open_lerobot(config(root), 1, "train")


@pytest.mark.parametrize(
    ("repo_id", "message"),
    [
        ("", r"data\.repo_id is not set"),
        ("./nowhere", r"data\.repo_id: there is no file or folder \./nowhere"),
        ("somebody/something", r"cannot be loaded from the hub.*HF_HUB_OFFLINE is set"),
    ],
)
def test_a_dataset_that_cannot_be_had(repo_id, message):
    with pytest.raises(UserError, match=message):
        open_lerobot(LeRobotDatasetConfig(repo_id=repo_id), 1, "train")


def test_a_folder_without_metadata_is_no_dataset(tmp_path):
    with pytest.raises(UserError, match="is not a LeRobot dataset"):
        open_lerobot(LeRobotDatasetConfig(repo_id=str(tmp_path)), 1, "train")


def test_pictures_that_cannot_be_unpacked_name_the_cache(image_dataset, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("RLINF_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="RLINF_CACHE"):
        open_lerobot(config(image_dataset.root), 1, "train").__getitems__([0])


def test_the_decoder_of_videos_is_named_with_its_speed(video_dataset, image_dataset):
    said = open_lerobot(config(video_dataset.root), 1, "train").try_decoder()
    assert re.fullmatch(r"(torchcodec|pyav), [1-9]\d* frames/s in this process", said)
    assert open_lerobot(config(image_dataset.root), 1, "train").try_decoder() == ""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["video_dataset", "image_dataset"])
def test_memory_is_flat_over_ten_thousand_samples(kind, request):
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    source, generator = (
        open_lerobot(config(request.getfixturevalue(kind).root), HORIZON, "train"),
        np.random.default_rng(0),
    )
    for batch in range(1250):
        if batch == 250:
            before = resident()
        source.__getitems__(generator.integers(0, len(source), 10).tolist())
    assert resident() - before < 2**23
