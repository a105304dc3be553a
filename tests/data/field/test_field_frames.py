"""Which frame a row gets in videos as people have them: the right one, or the run refuses to start and says why."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from field_datasets import CAMERA, CHUNK, number_of, of_frame, write_dataset, write_episodes, write_video

from rlinf_core.contract.datasets import LeRobotDatasetConfig
from rlinf_core.data.check.files import check_files
from rlinf_core.data.lerobot.metadata import read_metadata
from rlinf_core.data.lerobot.source import open_lerobot
from rlinf_core.errors import UserError

LENGTHS = (6, 5, 7, 4)
OWN = [of_frame(e, f) for e, length in enumerate(LENGTHS) for f in range(length)]
VIDEO = f"videos/{CAMERA}/{CHUNK}/file-000.mp4"


def opened(root, **settings):
    settings = {"images": {"front": CAMERA}, "decoder": "pyav"} | settings
    return open_lerobot(LeRobotDatasetConfig(repo_id=str(root), **settings), 2, "train")


def frames(root, **settings):
    source = opened(root, **settings)
    return [number_of(row[CAMERA]) for row in source.__getitems__(range(len(source)))]


def found(root, match="time"):
    """What `rlinf check-dataset` finds, without its notes: kind, episode."""
    damage = check_files(read_metadata("it", root), cameras=[CAMERA], vectors=[], match=match)
    return [(one.kind, one.episode) for one in damage.listed if not one.to_json()["note"]]


def test_starts_that_drift_are_refused_with_the_first_episode_that_is_off(tmp_path):
    """huggingface/lerobot#3177: from_timestamps add up an error until rows get the next frame."""
    lengths = [7 + (3 * e) % 11 for e in range(40)]
    root = write_dataset(tmp_path / "drift", lengths, fps=30)
    starts = [sum(lengths[:e]) / 30 + 0.0009 * e for e in range(40)]
    write_episodes(root, lengths, 30, starts=starts)
    with pytest.raises(
        UserError, match=r"9 of 9 rows of episode 19 would .* 0\.51 frames late.*match_frames = \"number"
    ):
        opened(root, exclude_episodes=(39,))
    assert found(root) == [("wrong_timestamp", 19)]
    own = [of_frame(e, f) for e, length in enumerate(lengths) for f in range(length)]
    assert frames(root, match_frames="number") == own
    assert found(root, "number") == []
    write_episodes(root, lengths, 30, starts=[start - 0.0009 * e + 3e-5 * e for e, start in enumerate(starts)])
    assert frames(root) == own  # The rounding errors of sums do not matter.


def test_times_that_run_on_over_episodes_are_refused(tmp_path):
    """huggingface/lerobot#1875: rows of later episodes would get frames of others."""
    running = {}
    for index, own in enumerate(OWN):
        running[divmod(own, 256)] = index / 10
    root = write_dataset(tmp_path / "on", LENGTHS, times=lambda e, f: running[e, f])
    write_video(root / VIDEO, OWN + [9999] * 40)
    message = r"the timestamp of the first row of episode 1 is 0\.6000 s instead of 0"
    with pytest.raises(UserError, match=message):
        opened(root)
    write_video(root / VIDEO, OWN)
    with pytest.raises(UserError, match=message + r".*match_frames = \"number"):
        opened(root)
    assert frames(root, match_frames="number") == OWN


@pytest.mark.parametrize("gone", [(1, 4), (2, 0)])
def test_a_joined_video_with_a_frame_less_is_refused_and_no_innocent_episode_is_named(gone, tmp_path):
    root = write_dataset(tmp_path / "short", LENGTHS)
    write_video(root / VIDEO, [number for number in OWN if number != of_frame(*gone)])
    with pytest.raises(UserError, match=r"has 21 frames, but episodes 0 to 3 have 22 rows\. Which episode lacks"):
        opened(root)
    assert found(root) == [("wrong_count", None)]


def test_spare_frames_are_refused_unless_the_starts_leave_room_for_them(tmp_path):
    root = write_dataset(tmp_path / "spare", LENGTHS)
    write_video(root / VIDEO, [*OWN[:6], 9999, *OWN[6:]])  # The first episode's video has a frame more.
    with pytest.raises(UserError, match=r"has 23 frames, .* 22 rows, .* no room for 1 of the others.*time_unchecked"):
        opened(root)
    assert found(root) == [("wrong_count", None)]
    write_episodes(root, LENGTHS, 10, starts=[0.0, 0.7, 1.2, 1.9])
    assert frames(root) == OWN
    assert found(root) == []
    write_video(root / VIDEO, [*OWN, 9999])
    write_episodes(root, LENGTHS, 10)
    assert frames(root, match_frames="time_unchecked") == OWN
    with pytest.raises(UserError, match="needs one frame per row"):
        opened(root, match_frames="number")


def test_a_video_at_nearly_the_rate_of_the_rows_is_refused_or_matched_by_number(tmp_path):
    """A 29.97 Hz camera under 30 Hz rows: the nearest frame is another one after 17 seconds."""
    root = write_dataset(tmp_path / "ntsc", [6], fps=30)
    count = 560
    root = write_dataset(tmp_path / "ntsc-long", [count], fps=30)
    write_video(root / VIDEO, [of_frame(0, f) for f in range(count)], rate=30000 / 1001)
    with pytest.raises(UserError, match=r"rows of episode 0 .* has 29\.97 frames per second, the rows 30: they drift"):
        opened(root)
    assert frames(root, match_frames="number") == [of_frame(0, f) for f in range(count)]


def test_rows_that_were_thinned_out_get_the_nearest_frame(tmp_path):
    """Tavish9/any4lerobot#17: rows at 10 Hz, the camera's video at 30."""
    root = write_dataset(tmp_path / "thin", [12])
    write_video(root / VIDEO, list(range(36)), rate=30)
    assert frames(root) == list(range(0, 36, 3))
    assert found(root) == []


def test_a_clock_that_jitters_in_rows_and_video_alike_is_right(tmp_path):
    """huggingface/lerobot#3513: both are stamped by the robot's clock."""
    seconds = [0.0, 0.06, 0.14, 0.33, 0.43, 0.55, 0.61, 0.80]
    root = write_dataset(tmp_path / "clock", [8, 8], version="v2.1", times=lambda e, f: seconds[f])
    for e in range(2):
        path = root / f"videos/{CHUNK}/{CAMERA}/episode_{e:06d}.mp4"
        write_video(path, [of_frame(e, f) for f in range(8)], seconds=seconds)
    assert frames(root) == [of_frame(e, f) for e in range(2) for f in range(8)]
    assert found(root) == []


def test_times_that_begin_with_the_first_step_are_used_as_they_are(tmp_path):
    """GR00T's datasets: row k is stamped (k + 1) / fps; the last row gets the last frame, as in GR00T's loader."""
    root = write_dataset(tmp_path / "gr00t", [5, 4], version="v2.1", times=lambda e, f: (f + 1) / 10)
    assert frames(root) == [of_frame(0, f) for f in (1, 2, 3, 4, 4)] + [of_frame(1, f) for f in (1, 2, 3, 3)]
    assert frames(root, match_frames="number") == [of_frame(e, f) for e, n in enumerate((5, 4)) for f in range(n)]
    joined = write_dataset(tmp_path / "joined", [5, 4], times=lambda e, f: (f + 1) / 10)
    with pytest.raises(UserError, match=r"first row of episode 0 is 0\.1000 s instead of 0"):
        opened(joined)  # The last row of an episode would get the next episode's first frame.


@pytest.mark.parametrize("time", [float("nan"), float("inf"), 1e30, -5.0])
def test_a_damaged_timestamp_is_refused_with_its_row(time, tmp_path):
    root = write_dataset(tmp_path / "damaged", LENGTHS)
    [path] = sorted(root.glob("data/**/*.parquet"))
    table = pq.read_table(path)
    times = table["timestamp"].to_numpy().copy()
    times[8] = time  # Row 2 of episode 1.
    column = pa.array(times, table.schema.field("timestamp").type)
    pq.write_table(table.set_column(table.column_names.index("timestamp"), "timestamp", column), path)
    with pytest.raises(UserError, match=r"1 of 5 rows of episode 1 would get a wrong frame: the timestamp of row 2"):
        opened(root)
    assert frames(root, match_frames="number") == OWN
