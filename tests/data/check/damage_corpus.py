"""Damage to the files of a LeRobot dataset, and where `rlinf check-dataset` should find it."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rlinf_core.testing.lerobot import CAMERAS

FRONT, WRIST = CAMERAS
STATS_V21 = "meta/episodes_stats.jsonl"
NEW_DATA, OLD_DATA = "data/chunk-000/file-001.parquet", "data/chunk-000/episode_000001.parquet"
NEW_VIDEO, OLD_VIDEO = f"videos/{FRONT}/chunk-000/file-000.mp4", f"videos/chunk-000/{FRONT}/episode_000001.mp4"


def remove(file):
    return lambda root: (root / file).unlink()


def cut(file, share):
    return lambda root: (root / file).write_bytes(
        (root / file).read_bytes()[: int((root / file).stat().st_size * share)]
    )


def spoil(file, share=0.5, count=40):
    """Overwrite bytes in the middle of a file."""

    def damage(root):
        data = bytearray((root / file).read_bytes())
        at = int(len(data) * share)
        data[at : at + count] = bytes(255 - byte for byte in data[at : at + count])
        (root / file).write_bytes(data)

    return damage


def edit(file, column, change):
    """Rewrite a column as `change(list of its values)`; a column of None removes rows that `change(i)` says."""

    def damage(root):
        table = pq.read_table(root / file)
        if column is None:
            table = table.filter(pa.array([not change(i) for i in range(len(table))]))
        else:
            values = change(table[column].to_pylist())
            at = table.column_names.index(column)
            if values is None:
                table = table.remove_column(at)
            else:
                kind = table.schema.field(column).type
                fits = not pa.types.is_fixed_size_list(kind) or {len(value) for value in values} == {kind.list_size}
                table = table.set_column(at, column, pa.array(values, kind if fits else pa.list_(pa.float32())))
        pq.write_table(table, root / file)

    return damage


def at(place, value):
    return lambda values: [*values[:place], value, *values[place + 1 :]]


def info(**changes):
    def damage(root):
        path = root / "meta/info.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def shape(column, shape):
    def damage(root):
        path = root / "meta/info.json"
        content = json.loads(path.read_text())
        content["features"][column]["shape"] = shape
        path.write_text(json.dumps(content))

    return damage


def lines(file, change):
    def damage(root):
        found = [json.loads(line) for line in (root / file).read_text().splitlines()]
        (root / file).write_text("".join(json.dumps(line) + "\n" for line in change(found)))

    return damage


def empty_episode(root):
    lines("meta/episodes.jsonl", lambda found: [*found, {"episode_index": 4, "length": 0, "tasks": []}])(root)
    info(total_episodes=5)(root)
    table = pq.read_table(root / OLD_DATA)
    pq.write_table(table.slice(0, 0), root / "data/chunk-000/episode_000004.parquet")


def shorten_video(root):
    """Keep the first four frames, in a file that is whole."""
    import av

    (root / OLD_VIDEO).rename(root / "long.mp4")
    with av.open(str(root / "long.mp4")) as long, av.open(str(root / OLD_VIDEO), "w") as short:
        stream = short.add_stream_from_template(long.streams.video[0], opaque=True)
        for packet in list(long.demux(video=0))[:4]:
            packet.stream = stream
            short.mux(packet)
    (root / "long.mp4").unlink()


def front_to_back(root):
    """Move the table of frames to the front, as files that are streamed have it, then lose the end."""
    import av

    (root / OLD_VIDEO).rename(root / "whole.mp4")
    with (
        av.open(str(root / "whole.mp4")) as whole,
        av.open(str(root / OLD_VIDEO), "w", options={"movflags": "faststart"}) as moved,
    ):
        stream = moved.add_stream_from_template(whole.streams.video[0], opaque=True)
        for packet in whole.demux(video=0):
            if packet.pts is not None:
                packet.stream = stream
                moved.mux(packet)
    (root / "whole.mp4").unlink()
    cut(OLD_VIDEO, 0.9)(root)


NAN = [float("nan"), 0.0]
OLD_FILES = [("v2.1", OLD_DATA), ("v3.0", NEW_DATA)]
CORPUS = {
    "data file missing": ("image v3.0", remove(NEW_DATA), ("missing_file", NEW_DATA, None, None)),
    "data file of v2 missing": ("image v2.0", remove(OLD_DATA), ("missing_file", OLD_DATA, None, None)),
    "video missing": ("video v3.0", remove(NEW_VIDEO), ("missing_file", NEW_VIDEO, None, None)),
    "footer corrupt": ("image v3.0", cut(NEW_DATA, 0.7), ("unreadable_file", NEW_DATA, None, None)),
    "column missing": (
        "image v2.1",
        edit(OLD_DATA, "action", lambda _: None),
        ("missing_column", OLD_DATA, None, None),
    ),
    "a row missing": ("video v2.1", edit(OLD_DATA, None, lambda i: i == 6), ("wrong_count", OLD_DATA, 1, None)),
    "frames miscounted": ("image v3.0", info(total_frames=35), ("wrong_count", "meta/info.json", None, None)),
    "episodes miscounted": ("image v2.1", info(total_episodes=5), ("wrong_count", "meta/info.json", None, None)),
    "index with a gap": ("image v2.0", edit(OLD_DATA, "index", at(4, 99)), ("stale_index", OLD_DATA, 1, 4)),
    "frame twice": ("image v3.0", edit(NEW_DATA, "frame_index", at(5, 4)), ("wrong_index", NEW_DATA, 1, 5)),
    "NaN in actions": ("image v3.0", edit(NEW_DATA, "action", at(3, NAN)), ("not_finite", NEW_DATA, 1, 3)),
    "infinite state": (
        "video v2.1",
        edit(OLD_DATA, "observation.state", at(6, [0.0, -np.inf, 0.0])),
        ("not_finite", OLD_DATA, 1, 6),
    ),
    "another width": (
        "image v2.1",
        edit(OLD_DATA, "action", lambda values: [[*value, 0.0] for value in values]),
        ("wrong_shape", OLD_DATA, None, None),
    ),
    "ragged": ("image v2.1", edit(OLD_DATA, "action", at(2, [1.0])), ("wrong_shape", OLD_DATA, None, None)),
    "time jumps": ("image v3.0", edit(NEW_DATA, "timestamp", at(2, 7.0)), ("wrong_timestamp", NEW_DATA, 1, 2)),
    "time at another rate": (
        "video v2.0",
        edit(OLD_DATA, "timestamp", lambda values: [2 * value for value in values]),
        ("wrong_timestamp", OLD_DATA, 1, 1),
    ),
    "unknown task": ("image v2.1", edit(OLD_DATA, "task_index", at(4, 7)), ("unknown_task", OLD_DATA, 1, 4)),
    "empty episode": ("image v2.1", empty_episode, ("empty_episode", "meta/episodes.jsonl", 4, None)),
    "video truncated": ("video v2.1", cut(OLD_VIDEO, 0.6), ("damaged_video", OLD_VIDEO, 1, None)),
    "image undecodable": (
        "image v3.0",
        edit(NEW_DATA, FRONT, lambda v: [{**v[0], "bytes": v[0]["bytes"][:60]}, *v[1:]]),
        ("damaged_image", NEW_DATA, 1, 0),
    ),
    "image gone": (
        "image v2.1",
        edit(OLD_DATA, FRONT, at(3, {"bytes": None, "path": "images/gone.png"})),
        ("damaged_image", OLD_DATA, 1, 3),
    ),
    "image of another size": (
        "image v2.1",
        shape(WRIST, [48, 32, 3]),
        ("wrong_shape", OLD_DATA[:-9] + "0.parquet", 0, 0),
    ),
    "no statistics": ("image v2.1", remove(STATS_V21), ("no_statistics", STATS_V21, None, None)),
    "statistics of v3 gone": (
        "video v3.0",
        remove("meta/stats.json"),
        ("no_statistics", "meta/stats.json", None, None),
    ),
    "file of no episode": (
        "image v2.1",
        lambda root: shutil.copy(root / OLD_DATA, root / "data/chunk-000/episode_000009.parquet"),
        ("unlisted_file", "data/chunk-000/episode_000009.parquet", None, None),
    ),
}
