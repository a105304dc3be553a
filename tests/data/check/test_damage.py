"""A folder of damaged datasets: `rlinf check-dataset` finds each damage, and nothing else, and nothing in good ones;
training names the same with file, episode and frame.
"""

import io
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from damage_corpus import (
    CORPUS,
    FRONT,
    NEW_DATA,
    NEW_VIDEO,
    OLD_DATA,
    OLD_VIDEO,
    WRIST,
    edit,
    front_to_back,
    shorten_video,
    spoil,
)
from PIL import Image

from rlinf_core import cli
from rlinf_core.contract.datasets import LeRobotDatasetConfig
from rlinf_core.data.check.files import check_files, number_columns
from rlinf_core.data.check.findings import LISTED, Damage, FileFinding
from rlinf_core.data.lerobot.metadata import read_metadata
from rlinf_core.data.lerobot.source import open_lerobot
from rlinf_core.data.loading.encoding import read_rows
from rlinf_core.errors import Exit, UserError
from rlinf_core.testing.lerobot import SIZE
from rlinf_core.testing.lerobot_v2 import write_v2


@pytest.fixture(scope="module")
def good(image_dataset, video_dataset, tmp_path_factory):
    """Name -> folder of a dataset without damage."""
    root = tmp_path_factory.mktemp("good")
    found = {"image v3.0": image_dataset.root, "video v3.0": video_dataset.root}
    for kind in ("image", "video"):
        for version in ("v2.0", "v2.1"):
            found[f"{kind} {version}"] = root / kind / version
            write_v2(found[f"{kind} v3.0"], root / kind / version, version)
    return found


def check(root, depth="ends"):
    metadata = read_metadata("it", root)
    cameras = [*metadata.columns_of("image"), *metadata.columns_of("video")]
    damage = check_files(metadata, cameras=cameras, vectors=number_columns(metadata), depth=depth)
    return [finding for kind in damage.by_kind().values() for finding in kind]


@pytest.mark.parametrize("depth", ["fast", "ends", "full"])
@pytest.mark.parametrize(
    "name", [f"{kind} {version}" for kind in ("image", "video") for version in ("v2.0", "v2.1", "v3.0")]
)
def test_nothing_is_found_in_good_datasets(name, depth, good):
    assert check(good[name], depth) == []


@pytest.fixture(scope="module")
def damaged(good, tmp_path_factory):
    """Name -> folder of a dataset with one damage."""
    root = tmp_path_factory.mktemp("damaged")
    for name, (base, damage, _) in CORPUS.items():
        shutil.copytree(good[base], root / name)
        damage(root / name)
    return root


@pytest.mark.parametrize("name", CORPUS)
def test_each_damage_is_found_where_it_is(name, damaged):
    *_, (kind, file, episode, frame) = CORPUS[name]
    found = check(damaged / name)
    first = found[0]
    assert (first.kind, first.file, first.episode, first.frame) == (kind, file, episode, frame)
    # An image of another size is one in every episode.
    assert {(one.kind, one.message.split()[0]) for one in found} == {(kind, first.message.split()[0])}
    assert len(found) == (4 if name == "image of another size" else 1)


def test_a_video_with_too_few_frames_names_the_first_frame_that_is_not_there(good, tmp_path):
    root = shutil.copytree(good["video v2.1"], tmp_path / "short")
    shorten_video(root)
    for depth in ("ends", "full"):
        (count,) = check(root, depth)
        assert (count.kind, count.file) == ("wrong_count", OLD_VIDEO)
        assert count.message.startswith("has 4 frames, but episode 1 has 7 rows: rows from frame 4 on have none. ")
        assert count.message.endswith("data.exclude_episodes = [1]")


def test_a_video_that_only_claims_its_frames_is_found(good, tmp_path):
    root = shutil.copytree(good["video v2.1"], tmp_path / "claims")
    front_to_back(root)
    for depth in ("ends", "full"):
        found = check(root, depth)
        assert {(one.kind, one.file, one.episode) for one in found} == {("damaged_video", OLD_VIDEO, 1)}


def test_what_lies_between_first_and_last_frame_is_found_when_everything_is_decoded(good, tmp_path):
    root = shutil.copytree(good["image v3.0"], tmp_path / "between")
    edit(NEW_DATA, WRIST, lambda v: [*v[:3], {**v[3], "bytes": b"no picture"}, *v[4:]])(root)
    assert check(root) == []
    [found] = check(root, "full")
    assert (found.kind, found.episode, found.frame) == ("damaged_image", 1, 3)
    assert found.message.startswith(f"{WRIST!r} contains a damaged image: it is not PNG")


def test_pages_of_a_data_file_that_are_damaged_are_found(good, tmp_path):
    """The footer is whole; what it points to is not."""
    root = shutil.copytree(good["image v2.1"], tmp_path / "pages")
    table = pq.read_table(root / OLD_DATA)
    pq.write_table(table, root / OLD_DATA, compression="zstd", use_dictionary=False)
    spoil(OLD_DATA, share=0.9, count=2000)(root)
    kinds = {(one.kind, one.file) for one in check(root)}
    assert ("unreadable_file", OLD_DATA) in kinds


def test_depth_maps_are_no_damage_but_no_pictures_to_train_on(good, tmp_path):
    root = shutil.copytree(good["image v2.1"], tmp_path / "depth")
    png = io.BytesIO()
    Image.fromarray(np.full((SIZE, SIZE), 40_000, np.uint16)).save(png, "PNG")
    for path in root.glob("data/*/*.parquet"):
        table = pq.read_table(path)
        at, pictures = table.column_names.index(WRIST), [{"bytes": png.getvalue(), "path": ""}] * len(table)
        pq.write_table(table.set_column(at, WRIST, pa.array(pictures, table[WRIST].type)), path)
    assert {finding.kind for finding in check(root)} == {"damaged_image"}
    described = json.loads((root / "meta/info.json").read_text())
    described["features"][WRIST]["shape"] = [SIZE, SIZE, 1]
    (root / "meta/info.json").write_text(json.dumps(described))
    assert check(root) == []
    source = open_lerobot(LeRobotDatasetConfig(repo_id=str(root), images={"wrist": WRIST}), 1, "train")
    with pytest.raises(UserError, match=r"row 0 of .* one channel of 16 or more bits, such as a depth map"):
        source.__getitems__([0])


def test_times_in_float32_of_long_episodes_are_right(good, tmp_path):
    from rlinf_core.data.check.numbers import _check_times

    frame = np.arange(400_000.0)
    time = (frame / 30).astype(np.float32).astype(np.float64)
    metadata = read_metadata("it", good["image v2.1"])
    object.__setattr__(metadata, "fps", 30.0)
    assert list(_check_times(metadata, "f", time, frame, np.zeros_like(frame), frame)) == []


def test_damages_of_a_kind_are_counted_and_some_listed():
    damage = Damage()
    damage.add(FileFinding("not_finite", "NaN", f"{i:03}.parquet", i) for i in range(100))
    damage.add([FileFinding("missing_file", "gone", "z.parquet"), FileFinding("no_statistics", "none")])
    assert list(damage.by_kind()) == ["missing_file", "not_finite", "no_statistics"]
    assert len(damage.by_kind()["not_finite"]) == LISTED
    assert damage.counts["not_finite"] == 100
    assert not damage.ok
    notes = Damage()
    notes.add([FileFinding("spare_frames", "two")])
    assert notes.ok


def rlinf(capsys, *words):
    code = cli.main(["check-dataset", *map(str, words)])
    return code, capsys.readouterr()


def test_the_command_reports_and_its_exit_code_says_whether_there_is_damage(good, damaged, capsys):
    code, told = rlinf(capsys, good["video v2.1"])
    assert (code, told.out) == (Exit.OK, f"{good['video v2.1']} (v2.1, 4 episodes, 36 frames): ok\n")
    code, told = rlinf(capsys, damaged / "NaN in actions", "--fast")
    assert code == Exit.USER_ERROR
    assert told.out.splitlines()[0].endswith("(v3.0, 4 episodes, 36 frames): 1 finding")
    assert told.out.splitlines()[1:] == [
        "not_finite (1)",
        f"  {NEW_DATA}, episode 1, frame 3: 'action' contains NaN or infinity in 1 frame of the episode",
    ]
    code, told = rlinf(capsys, damaged / "no statistics")
    assert code == Exit.OK
    assert "no_statistics (1, note)" in told.out
    code, told = rlinf(capsys, damaged / "video truncated", "--json")
    report = json.loads(told.out)
    assert (code, report["ok"], report["counts"]) == (Exit.USER_ERROR, False, {"damaged_video": 1})
    assert report["findings"][0]["file"] == OLD_VIDEO
    assert report["checked"] == "ends"


def test_a_dataset_that_cannot_be_opened_is_a_finding_too(tmp_path, capsys):
    code, told = rlinf(capsys, tmp_path, "--json")
    assert code == Exit.USER_ERROR
    assert "is not a LeRobot dataset" in json.loads(told.out)["findings"][0]["message"]
    code, told = rlinf(capsys, tmp_path, "a.b=1")
    assert "settings apply to a run's TOML file" in told.err


def test_a_dataset_that_is_nowhere_is_named_as_the_argument_that_it_is(capsys):
    assert cli.main(["check-dataset", "./nowhere"]) == Exit.USER_ERROR
    assert capsys.readouterr().err.startswith("error: dataset: there is no file or folder ./nowhere")


def test_of_a_config_only_its_columns_count(good, tiny_run, tmp_path, capsys):
    root = shutil.copytree(good["video v2.1"], tmp_path / "part")
    (root / OLD_VIDEO.replace(FRONT, WRIST)).unlink()
    settings = [f'data.images={{base_0_rgb="{FRONT}"}}', 'data.state=["observation.state"]', 'data.actions=["action"]']
    settings += ["policy.variant=dummy", "policy.weights=random"]
    path = tiny_run("pi05_metaworld", root, *settings)
    assert rlinf(capsys, path)[0] == Exit.OK
    code, told = rlinf(capsys, path, f'data.images={{base_0_rgb="{WRIST}"}}')
    assert code == Exit.USER_ERROR
    assert "missing_file (1)" in told.out
    code, told = rlinf(capsys, path, 'data.state=["observation.stat"]')
    assert "data.state names 'observation.stat'" in told.err


UNTRAINABLE = {
    "data file missing": rf"{NEW_DATA} cannot be read",
    "data file of v2 missing": rf"{OLD_DATA} cannot be read",
    "video missing": rf"lacks the video files {NEW_VIDEO}",
    "footer corrupt": rf"{NEW_DATA} cannot be read",
    "column missing": rf"{OLD_DATA} lacks the columns action",
    "a row missing": rf"{OLD_DATA} has 6 rows of episode 1, which has 7 frames .*data\.exclude_episodes = \[1\]",
    "frames miscounted": "counts 4 episodes and 35 frames, meta/episodes lists 4 and 36",
    "episodes miscounted": r"counts 5 episodes and 36 frames, meta/episodes\.jsonl lists 4 and 36",
    "frame twice": rf"{NEW_DATA}, row 5: frame_index of episode 1 is 4 instead of 5: a frame is missing",
    "NaN in actions": rf"'action' contains NaN .* in 1 frames of 1 episodes \(1\), first in "
    rf".*{NEW_DATA}, episode 1, frame 3",
    "infinite state": rf"'observation\.state' contains NaN .*{OLD_DATA}, episode 1, frame 6: .*rlinf check-dataset ",
    "another width": rf"{OLD_DATA}: 'action' has 3 numbers in row 0, but meta/info.json says 2",
    "ragged": rf"{OLD_DATA}: 'action' has 1 numbers in row 2, but meta/info.json says 2",
    "unknown task": rf"{OLD_DATA}, episode 1, frame 4, has the task 7, which meta/tasks.jsonl does not list",
    "time at another rate": rf"{OLD_VIDEO}: 5 of 7 rows of episode 1 would get a wrong frame: the timestamp of row 1, ",
    "video truncated": rf"{OLD_VIDEO}: cannot be opened as a video: .* It has the frames of episode 1",
    "image undecodable": rf"{NEW_DATA}: row 0 of '{FRONT}' contains a damaged image.*{NEW_DATA}, episode 1, frame 0\]",
    "image gone": rf"{OLD_DATA}: row 3 of '{FRONT}' contains no image.*{OLD_DATA}, episode 1, frame 3\]",
}


def read_all(config):
    source = open_lerobot(config, 3, "train")
    return read_rows(source, range(len(source)))


@pytest.mark.parametrize("name", UNTRAINABLE)
def test_training_names_the_damage_with_file_episode_and_frame(name, damaged):
    config = LeRobotDatasetConfig(repo_id=str(damaged / name), images={"front": FRONT, "wrist": WRIST})
    with pytest.raises(UserError, match=UNTRAINABLE[name]):
        read_all(config)


def test_training_names_the_frame_at_which_a_video_ends(good, tmp_path):
    root = shutil.copytree(good["video v2.1"], tmp_path / "short")
    shorten_video(root)
    config = LeRobotDatasetConfig(repo_id=str(root), images={"front": FRONT})
    with pytest.raises(UserError, match=rf"{OLD_VIDEO}: has 4 frames, but episode 1 has 7 rows: rows from frame 4 on"):
        read_all(config)


def test_an_episode_without_frames_does_not_stop_training(damaged):
    config = LeRobotDatasetConfig(repo_id=str(damaged / "empty episode"), validation_fraction=0.5)
    assert len(open_lerobot(config, 1, "train")) + len(open_lerobot(config, 1, "validation")) == 36
