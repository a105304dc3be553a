import os

import av
import numpy as np
import pytest
from video_files import write_video

from rlinf_core.data.images.video_header import FrameTimes, Turn, is_depth_format, read_frame_times, read_video_header
from rlinf_core.errors import UserError


def test_a_header_says_what_the_frames_are(tmp_path):
    path = write_video(tmp_path / "clip.mp4", 5, size=(48, 64), rate=10)
    header = read_video_header(path)
    assert (header.frames, header.height, header.width, header.pixel_format) == (5, 48, 64, "yuv420p")
    assert (header.start, header.duration, header.average_rate, header.base_rate) == (0, 0.5, 10, 10)
    assert (header.turn, header.full_range, header.color_matrix, header.not_rgb) == (Turn(), False, 2, "")
    assert read_video_header(path) is header


def test_a_file_that_changed_is_read_again(tmp_path):
    path = write_video(tmp_path / "clip.mp4", 5)
    assert read_video_header(path).frames == len(read_frame_times(path).ticks) == 5
    before = path.stat()
    write_video(path, 7)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert read_video_header(path).frames == len(read_frame_times(path).ticks) == 7


def test_times_are_those_of_the_frames_in_display_order(tmp_path):
    """B-frames are stored in another order; the rate varies."""
    ticks = [0, 100, 130, 300, 310, 500, 900, 1000]
    path = write_video(tmp_path / "clip.mp4", 8, ticks=ticks, options={"bf": "2", "g": "8"})
    times = read_frame_times(path)
    np.testing.assert_allclose(times.seconds, np.array(ticks) / 1000, atol=1e-9)
    assert times.is_key.tolist() == [True] + [False] * 7
    with av.open(str(path)) as file:
        assert [frame.pts for frame in file.decode(video=0)] == times.ticks.tolist()


def test_the_nearest_frame_is_the_earlier_of_two_at_the_same_distance():
    for seconds, expected in (([1.0, 2.0, 4.0], [0, 0, 0, 1, 1, 2, 2]), ([1.0], [0] * 7)):
        times = FrameTimes(np.array(seconds), np.ones(len(seconds), bool), np.array(seconds))
        assert times.nearest([-9, 1, 1.5, 1.6, 3, 3.1, 99]).tolist() == expected


@pytest.mark.parametrize("read", [read_video_header, read_frame_times])
def test_what_is_no_video_is_named(read, tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    for name in ("none.mp4", "text.mp4"):
        with pytest.raises(UserError, match=rf"{name} cannot be opened as a video"):
            read(tmp_path / name)


def test_one_channel_of_many_bits_is_depth():
    deep = {"gray9le", "gray10le", "gray12le", "gray16be", "gray16le", "ya16le", "grayf32le"}
    others = {"gray", "ya8", "yuv420p", "yuv420p10le", "p010le", "rgb48le", "pal8", "monow", "bayer_rggb16le", "", "x"}
    assert {name for name in deep | others if is_depth_format(name)} == deep
