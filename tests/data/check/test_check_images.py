"""What `rlinf check-dataset` says of images agrees with what training reads, with either decoder."""

import json
import shutil

import numpy as np
import pytest
from video_files import numbered, turn, write_video

from rlinf_core.contract.datasets import LeRobotDatasetConfig
from rlinf_core.data.check.files import check_files
from rlinf_core.data.check.pictures import Reading
from rlinf_core.data.images.video import decoder_name
from rlinf_core.data.lerobot.metadata import read_metadata
from rlinf_core.data.lerobot.source import open_lerobot
from rlinf_core.errors import UserError
from rlinf_core.testing.lerobot import CAMERAS, SIZE
from rlinf_core.testing.lerobot_v2 import write_v2

FRONT = CAMERAS[0]


@pytest.fixture(scope="module")
def older(video_dataset, tmp_path_factory):
    root = tmp_path_factory.mktemp("older") / "v21"
    write_v2(video_dataset.root, root, "v2.1")
    return root


@pytest.fixture
def root(older, tmp_path):
    return shutil.copytree(older, tmp_path / "it")


def describe(root, **fields):
    """Change the front camera's feature."""
    info = json.loads((root / "meta/info.json").read_text())
    info["features"][FRONT] |= fields
    (root / "meta/info.json").write_text(json.dumps(info))


def found(root, reads=None, depth="ends"):
    metadata = read_metadata("it", root)
    damage = check_files(metadata, cameras=[FRONT], vectors=[], depth=depth, reads=reads)
    return {kind: [one.message for one in some] for kind, some in damage.by_kind().items()}


def rows(root, decoder="pyav"):
    config = LeRobotDatasetConfig(repo_id=str(root), images={"front": FRONT}, decoder=decoder)
    return open_lerobot(config, 1, "train").__getitems__([0, 1])


def replace_videos(root, **options):
    for i, path in enumerate(sorted(root.glob(f"videos/**/{FRONT}/*.mp4"))):
        length = read_metadata("it", root).lengths[i]
        frames = options.get("image", np.zeros((SIZE, SIZE, 3), np.uint8))
        write_video(path, [frames] * int(length), size=frames.shape[:2], **options.get("video", {}))


@pytest.mark.parametrize("decoder", ["pyav", "torchcodec"])
@pytest.mark.parametrize("depth", ["ends", "full"])
def test_a_turned_video_has_the_shape_of_its_upright_frames(decoder, depth, root):
    if decoder == "torchcodec" and decoder_name() != "torchcodec":
        pytest.skip("torchcodec does not load here (no FFmpeg libraries)")
    replace_videos(root, image=numbered(5, 32, 64))
    for path in root.glob(f"videos/**/{FRONT}/*.mp4"):
        turn(path, (0, 1, -1, 0))
    describe(root, shape=[64, 32, 3])
    assert found(root, Reading(decoder), depth) == {}
    assert [row[FRONT].shape for row in rows(root, decoder)] == [(64, 32, 3)] * 2
    describe(root, shape=[32, 64, 3])
    [*messages] = found(root, Reading(decoder), depth)["wrong_shape"]
    assert messages[0] == "is 64 x 32 pixels, meta/info.json says [32, 64, 3]"


MARKS = {
    "info": {"is_depth_map": True},
    "info, older": {"video.is_depth_map": True},
    "info, format": {"video.pix_fmt": "gray16le"},
    "info, format without prefix": {"pix_fmt": "gray12le"},
    "video_info, older": {"video.is_depth_map": True, "video.pix_fmt": "yuv420p"},
    "video_info, format": {"video.pix_fmt": "gray10le"},
}


@pytest.mark.parametrize("mark", MARKS)
def test_depth_maps_are_refused_wherever_the_metadata_mark_them(mark, root):
    where = mark.partition(",")[0]
    describe(root, **{where: MARKS[mark]})
    with pytest.raises(UserError, match=rf"data\.images\.front names '{FRONT}', which contains .*'{where}'.*RGB"):
        rows(root)
    describe(root, **{where: {"is_depth_map": False, "video.is_depth_map": "false", "video.pix_fmt": "gray"}})
    rows(root)


def test_depth_maps_are_refused_by_the_format_of_the_video_alone(root):
    depth = np.full((SIZE, SIZE), 3000, np.uint16)
    replace_videos(root, image=depth, video={"codec": "ffv1", "pixel_format": "gray12le", "container": "matroska"})
    with pytest.raises(UserError, match=rf"data\.images\.front names '{FRONT}', but .*\.mp4 contains gray12le frames"):
        rows(root)
    assert set(found(root)) == {"not_rgb"}  # Three channels, according to the metadata.
    describe(root, shape=[SIZE, SIZE, 1])
    assert found(root) == {}
    assert set(found(root, Reading(train=True))) == {"not_rgb"}
    describe(root, shape=[SIZE, SIZE, 3], info={"is_depth_map": True})
    assert found(root) == {}
