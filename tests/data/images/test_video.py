import pickle

import numpy as np
import pytest

from rlinf_core.data.images.video import VideoReader, decoder_name
from rlinf_core.errors import UserError
from rlinf_core.testing.lerobot import CAMERAS, FPS


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """H.264 with B-frames and key frames far apart: frame i lies at i/10 s."""
    import av

    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    generator = np.random.default_rng(0)
    images = np.kron(generator.integers(0, 255, (40, 8, 8, 3), np.uint8), np.ones((1, 8, 8, 1), np.uint8))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"g": "12", "bf": "2", "crf": "20"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("decoder", ["pyav", "torchcodec"])
def test_frames_are_those_that_lerobot_decodes(video, decoder):
    decode_video_frames = pytest.importorskip("lerobot.datasets.video_utils").decode_video_frames

    if decoder == "torchcodec" and decoder_name() != "torchcodec":
        pytest.skip("torchcodec does not load here (no FFmpeg libraries)")
    expected = decode_video_frames(video, [i / FPS for i in range(40)], 1e-4, decoder, return_uint8=True)
    expected = expected.permute(0, 2, 3, 1).numpy()
    reader, generator = VideoReader(decoder=decoder), np.random.default_rng(1)
    for count in (1, 1, 2, 7, 40, 3, 1):  # Any order, repeats, after the end was reached.
        frames = generator.integers(0, 40, count)
        found = reader.frames(video, (frames / FPS).tolist(), tolerance=0.05)
        np.testing.assert_array_equal(np.stack(found), expected[frames])
    assert found[0].dtype == np.uint8


def test_the_nearest_frame_within_half_a_frame_is_taken(video):
    reader = VideoReader(decoder="pyav")
    exact = reader.frames(video, [0.7], 0.05)[0]
    for time in (0.66, 0.74):
        np.testing.assert_array_equal(reader.frames(video, [time], 0.05)[0], exact)


@pytest.mark.parametrize("time", [-0.5, 0.55, 4.2, 1000.0])
def test_a_time_without_a_frame_names_file_and_time(video, time):
    reader = VideoReader(decoder="pyav")
    with pytest.raises(UserError, match=rf"clip\.mp4 has no frame within 0\.0400 s of {time:.4f} s"):
        reader.frames(video, [0.1, time], tolerance=0.04)
    assert reader.frames(video, [0.3], tolerance=0.04)  # The decoder is still of use.


def test_missing_and_broken_files_are_named(tmp_path, video):
    with pytest.raises(UserError, match=r"none\.mp4 cannot be opened"):
        VideoReader().frames(tmp_path / "none.mp4", [0.0], 0.05)
    (tmp_path / "broken.mp4").write_bytes(video.read_bytes()[:300])
    with pytest.raises(UserError, match=r"broken\.mp4 cannot be opened"):
        VideoReader(decoder="pyav").frames(tmp_path / "broken.mp4", [0.0], 0.05)


@pytest.mark.parametrize("time", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_what_is_not_a_time_is_one_message(time, video):
    with pytest.raises(UserError, match=r"has no frame within .* \(it is not a time in a video\)"):
        VideoReader().frames(video, [0.0, time], float("inf"))


def test_few_files_stay_open(video_dataset):
    paths = sorted(video_dataset.root.glob("videos/**/*.mp4"))
    reader = VideoReader(capacity=2, decoder="pyav")
    before = [reader.frames(path, [0.0], 0.05)[0] for path in paths]
    assert len(paths) > 2
    assert len(reader._open) == 2
    for path, frame in zip(paths, before, strict=True):
        np.testing.assert_array_equal(reader.frames(path, [0.0], 0.05)[0], frame)
    assert not pickle.loads(pickle.dumps(reader))._open


def test_open_decoders_are_bounded_in_bytes_and_a_last_one_stays(video_dataset):
    paths = sorted(video_dataset.root.glob("videos/**/*.mp4"))
    reader = VideoReader(decoder="pyav")
    frames = [reader.frames(path, [0.0], 0.05)[0] for path in paths]
    each = max(decoder.memory for decoder in reader._open.values())
    assert each > 2_000_000
    for memory, count in ((2 * each, 2), (1, 1)):
        bounded = VideoReader(decoder="pyav", memory=memory)
        for path, frame in zip(paths, frames, strict=True):
            np.testing.assert_array_equal(bounded.frames(path, [0.0], 0.05)[0], frame)
        assert list(bounded._open) == paths[-count:]


def test_files_decoded_by_several_threads_give_the_same_frames(video_dataset):
    paths = sorted(video_dataset.root.glob("videos/**/*.mp4"))
    wanted = [(path, [0.3, 0.0, 0.3, 0.5]) for path in paths]
    expected = VideoReader(threads=1).frames_of_files(wanted, 0.05)
    reader = VideoReader(capacity=2, threads=3)
    for _ in range(5):
        for ours, theirs in zip(reader.frames_of_files(wanted, 0.05), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert len(reader._open) == 2


def test_a_named_decoder_that_does_not_load_is_an_error(video, monkeypatch):
    monkeypatch.setattr("rlinf_core.data.images.video.torchcodec_failure", lambda: "libavutil.so.59 is missing")
    with pytest.raises(UserError, match=r'data\.decoder = "torchcodec".*libavutil\.so\.59 is missing.*"auto"'):
        VideoReader(decoder="torchcodec").frames(video, [0.0], 0.05)


def test_files_are_shared_by_episodes(video_dataset):
    """The datasets of these tests do exercise offsets into files and several files."""
    files = list(video_dataset.root.glob(f"videos/{CAMERAS[0]}/**/*.mp4"))
    assert 1 < len(files) < len(video_dataset.tasks)
