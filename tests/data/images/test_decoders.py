"""Both decoders give the same frames, whatever recorders write: the nearest in time, upright, in the right colours."""

import numpy as np
import pytest
from video_files import number_in, numbered, write_video

from rlinf_core.data.images.video import VideoReader, decoder_name, torchcodec_shows
from rlinf_core.data.images.video_header import read_frame_times, read_video_header
from rlinf_core.errors import UserError

QUIET = {"x265-params": "log-level=none:keyint=8:bframes=3"}
B_FRAMES = {"bf": "3", "g": "8"}
VARIED = [0, 60, 160, 350, 360, 365, 500, 900, 1000, 1300]
"""Times in milliseconds: gaps of 5 to 400."""
FILES = {
    "B-frames": {"options": B_FRAMES},
    "variable rate": {"ticks": VARIED, "options": {"g": "4", "bf": "0"}},
    "variable rate, B-frames": {"ticks": VARIED, "options": B_FRAMES},
    "variable rate, AV1": {"ticks": VARIED, "codec": "libsvtav1", "options": {"preset": "12", "g": "4"}},
    "starts late": {"ticks": [70 + 100 * i for i in range(10)], "options": {"bf": "0"}},
    "Matroska": {"container": "matroska", "options": B_FRAMES, "rate": 30},
    "fragmented": {"options": {"bf": "0", "g": "4"}, "muxing": {"movflags": "frag_keyframe+empty_moov"}},
    "B-frames without an edit list": {"options": {"bf": "2", "g": "8"}, "muxing": {"use_editlist": "0"}},
    "H.265": {"codec": "libx265", "options": QUIET},
    "H.265, 10 bits": {"codec": "libx265", "options": QUIET, "pixel_format": "yuv420p10le"},
    "AV1": {"codec": "libsvtav1", "options": {"preset": "12", "g": "8"}},
    "VP9": {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "g": "8"}},
    "AV1, 10 bits": {"codec": "libsvtav1", "options": {"preset": "12"}, "pixel_format": "yuv420p10le"},
    "4:4:4": {"pixel_format": "yuv444p"},
    "4:2:2": {"pixel_format": "yuv422p"},
    "RGB": {"codec": "libx264rgb", "pixel_format": "rgb24"},
    "grey": {"codec": "ffv1", "pixel_format": "gray", "container": "matroska"},
    "MJPEG": {"codec": "mjpeg", "pixel_format": "yuvj420p"},
    "width of no multiple": {"size": (44, 76)},
}


@pytest.fixture(params=["pyav", "torchcodec"])
def decoder(request):
    if request.param == "torchcodec" and decoder_name() != "torchcodec":
        pytest.skip("torchcodec does not load here (no FFmpeg libraries)")
    return request.param


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Name -> a video of ten numbered frames, written once."""
    root, written = tmp_path_factory.mktemp("files"), {}

    def get(name):
        if name not in written:
            path = root / f"{len(written)}.mp4"
            written[name] = write_video(path, 10, **FILES[name])
        return written[name]

    return get


def seconds(name):
    """The times of a file's frames, in seconds."""
    options = FILES[name]
    first = 200 if name == "B-frames without an edit list" else 0
    return np.array(options.get("ticks") or first + np.arange(10) * 1000 / options.get("rate", 10)) / 1000


@pytest.mark.parametrize("name", FILES)
def test_each_time_gets_the_nearest_frame_whatever_else_is_requested(name, files, decoder):
    reader, path, there = VideoReader(decoder=decoder), files(name), seconds(name)
    between = np.random.default_rng(0).uniform(there[0] - 0.02, there[-1] + 0.02, 12)
    times = np.concatenate([there, there + 3e-5, between])
    nearest = np.abs(there[:, None] - times).argmin(0)
    order = np.random.default_rng(1).permutation(len(times))
    batches = [times[:10], times, times[order], *np.split(times[order], len(times)), np.repeat(times[[20, 3, 3]], 2)]
    for batch in batches:
        found = [number_in(frame) for frame in reader.frames(path, batch.tolist(), tolerance=0.21)]
        assert found == [nearest[times == time][0] for time in batch], batch
    reader.close()


@pytest.mark.parametrize("tags", [{}, {"colorspace": 1, "color_range": 1}], ids=["untagged", "BT.709"])
@pytest.mark.parametrize("name", FILES)
def test_both_decoders_give_the_same_pixels(name, tags, tmp_path):
    if decoder_name() != "torchcodec":
        pytest.skip("torchcodec does not load here (no FFmpeg libraries)")
    height, width = FILES[name].get("size", (64, 64))
    colors = np.random.default_rng(0).integers(0, 256, (10, height // 4, width // 4, 3), np.uint8)
    images = colors.repeat(4, 1).repeat(4, 2)
    tags = {} if name == "RGB" else tags
    path = write_video(tmp_path / "clip.mp4", list(images), **FILES[name], tags=tags)
    one, other = (
        np.stack(VideoReader(decoder=decoder).frames(path, seconds(name).tolist(), 0.01))
        for decoder in ("pyav", "torchcodec")
    )
    assert np.array_equal(one, other)
    assert np.abs(one.astype(int) - images).mean() < (70 if name == "grey" else 35)


def test_frames_that_an_edit_list_hides_are_not_counted(tmp_path, decoder):
    """A recording that was cut without encoding it again: the frames since the key frame are stored but not shown."""
    ticks = [100 * i - 250 for i in range(12)]
    path = write_video(
        tmp_path / "cut.mp4", 12, ticks=ticks, options=B_FRAMES | {"g": "250"}, muxing={"avoid_negative_ts": "disabled"}
    )
    assert read_frame_times(path).seconds.tolist() == pytest.approx(np.arange(9) / 10)
    for times in ([0.0, 0.1, 0.8], [0.85], [0.04], [0.0]):
        expected = [3 + min(round(10 * time), 8) for time in times]
        assert [number_in(frame) for frame in VideoReader(decoder=decoder).frames(path, times, 0.06)] == expected


@pytest.mark.parametrize("name", ["B-frames", "variable rate"])
def test_too_far_a_time_says_where_the_nearest_frame_is(name, files, decoder):
    reader, path = VideoReader(decoder=decoder), files(name)
    last = seconds(name)[-1]
    for time, at in ((last + 0.2, last), (-0.2, 0.0)):
        with pytest.raises(
            UserError, match=rf"no frame within 0\.1000 s of {time:.4f} s \(the nearest is at {at:.4f} s, 0\.2000"
        ):
            reader.frames(path, [0.0, time], tolerance=0.1)
    assert number_in(reader.frames(path, [last], tolerance=0.1)[0]) == 9


ORIENTATIONS = {
    "upright": (1, 0, 0, 1),
    "90": (0, 1, -1, 0),
    "180": (-1, 0, 0, -1),
    "270": (0, -1, 1, 0),
    "mirrored": (-1, 0, 0, 1),
    "upside down": (1, 0, 0, -1),
    "transposed": (0, 1, 1, 0),
    "transversed": (0, -1, -1, 0),
}


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_frames_are_upright(name, tmp_path, decoder):
    """A display matrix (a b; c d) moves the pixel at (x, y) to (ax + cy, bx + dy)."""
    stored = numbered(0b0000_0100_0000_0011, 32, 64)
    a, b, c, d = ORIENTATIONS[name]
    path = write_video(tmp_path / "clip.mp4", [stored] * 2, size=(32, 64), matrix=(a, b, c, d))
    upright = np.zeros_like(stored if a else stored.transpose(1, 0, 2))
    y, x = np.mgrid[:32, :64]
    columns, rows = a * x + c * y, b * x + d * y
    upright[rows - rows.min(), columns - columns.min()] = stored
    [found] = VideoReader(decoder=decoder).frames(path, [0.1], 0.01)
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright).mean() < 3
    header = read_video_header(path)
    assert (header.height, header.width) == found.shape[:2]
    assert header.turn.mirrors == (a * d - b * c < 0)
    if not header.turn.mirrors:
        assert header.turn.degrees == int(name) if name.isdigit() else header.turn.degrees == 0


def right_color(yuv, matrix, full):
    """RGB of limited- or full-range Y'CbCr, from the definitions in ITU-R BT.601, BT.709 and BT.2020."""
    red, blue = {1: (0.2126, 0.0722), 9: (0.2627, 0.0593)}.get(matrix, (0.299, 0.114))
    y, cb, cr = yuv
    y, scale = (y / 255, 255) if full else ((y - 16) / 219, 224)
    cb, cr = (cb - 128) / scale, (cr - 128) / scale
    r, b = y + 2 * (1 - red) * cr, y + 2 * (1 - blue) * cb
    return np.clip(255 * np.array([r, (y - red * r - blue * b) / (1 - red - blue), b]), 0, 255)


@pytest.mark.parametrize("width", [64, 76])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", [2, 1, 5, 9], ids=["untagged", "BT.709", "BT.601", "BT.2020"])
@pytest.mark.parametrize(
    ("codec", "pixel_format"),
    [("libx264", "yuv420p"), ("libx265", "yuv420p10le"), ("libsvtav1", "yuv420p"), ("libx264", "yuv444p")],
)
def test_colors_are_those_that_the_tags_say(codec, pixel_format, matrix, full, width, tmp_path, decoder):
    colors, options = (
        [(40, 200, 60), (200, 100, 150), (120, 160, 110)],
        {"libx265": QUIET, "libsvtav1": {"preset": "12"}},
    )
    path = write_video(
        tmp_path / "clip.mp4",
        colors,
        size=(64, width),
        codec=codec,
        pixel_format=pixel_format,
        options=options.get(codec, {"crf": "1"}),
        tags={"colorspace": matrix, "color_range": 2 if full else 1},
    )
    frames = VideoReader(decoder=decoder).frames(path, [0.0, 0.1, 0.2], 0.01)
    for frame, yuv in zip(frames, colors, strict=True):
        assert np.abs(frame[32, 32] - right_color(yuv, matrix, full)).max() <= 3
    header = read_video_header(path)
    assert header.full_range == full


def test_what_torchcodec_would_show_wrongly_is_decoded_by_pyav(tmp_path):
    wanted = {"tags": {"color_range": 2}, "codec": "libsvtav1", "options": {"preset": "12"}}
    for i, options in enumerate(
        (wanted, {"matrix": (-1, 0, 0, 1)}, {"codec": "libsvtav1", "options": {"preset": "12"}})
    ):
        path = write_video(tmp_path / f"{i}.mp4", 2, **options)
        assert torchcodec_shows(read_video_header(path)) == (i == 2)


def test_videos_of_depth_maps_and_with_alpha_are_refused(tmp_path, decoder):
    depth = np.full((64, 64), 3000, np.uint16)
    files = {"gray12le": [depth] * 2, "yuva420p": 2}
    for pixel_format, frames in files.items():
        path = write_video(
            tmp_path / f"{pixel_format}.mkv", frames, codec="ffv1", pixel_format=pixel_format, container="matroska"
        )
        with pytest.raises(UserError, match=rf"{pixel_format}\.mkv contains {pixel_format} frames.*data\.images"):
            VideoReader(decoder=decoder).frames(path, [0.0], 0.05)
        assert VideoReader(decoder=decoder, any_format=True).frames(path, [0.0], 0.05)[0].shape == (64, 64, 3)
