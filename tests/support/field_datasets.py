"""Datasets with the properties of real ones: a writer that follows no library, whose images carry their own number."""

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CAMERA = "observation.images.front"
SIDE = 64
CHUNK = "chunk-000"


def numbered(number):
    """Uint8 [SIDE, SIDE, 3] with 16 tiles, the bits of a number."""
    bits = np.array([(number >> k) & 1 for k in range(16)], np.uint8).reshape(4, 4)
    return (np.kron(bits, np.ones((SIDE // 4, SIDE // 4), np.uint8)) * 200 + 25)[..., None].repeat(3, -1)


def number_of(image):
    """The number in an image of any size."""
    gray = np.asarray(image, np.float32).mean(-1)
    rows, columns = (np.linspace(0, n, 9).astype(int)[1::2] for n in gray.shape)
    return sum(
        int(gray[row, column] > 125) << (4 * r + c) for r, row in enumerate(rows) for c, column in enumerate(columns)
    )


def of_frame(episode, frame):
    """The number in an episode's frame."""
    return 256 * episode + frame


def write_video(path, numbers, rate=10, seconds=None):
    """A video of numbered images, evenly spaced or at some times in seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    base = Fraction(1, 1000) if seconds is not None else 1 / Fraction(rate).limit_denominator(100000)
    with av.open(str(path), "w") as out:
        stream = out.add_stream(
            "libx264", rate=Fraction(rate).limit_denominator(100000), options={"g": "4", "crf": "20"}
        )
        stream.width = stream.height = SIDE
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", base
        for place, number in enumerate(numbers):
            frame = av.VideoFrame.from_ndarray(numbered(number), format="rgb24")
            frame.time_base, frame.pts = base, place if seconds is None else round(seconds[place] * 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def write_dataset(root, lengths=(6, 5, 7), *, version="v3.0", fps=10, tasks=None, texts=("pick the cube",), times=None):
    """A dataset with one camera; v3.0 has one data file and one video.

    Args:
        root: The folder to write.
        lengths: Frames of each episode.
        version: `"v2.1"` or `"v3.0"`.
        fps: Rows per second.
        tasks: The task of each episode; default: 0.
        texts: Their texts.
        times: (episode, frame) -> timestamp; default: frame / fps.
    """
    tasks, v3 = tasks or [0] * len(lengths), version == "v3.0"
    place = f"{CHUNK}/file-000" if v3 else CHUNK + "/episode_{:06d}"
    files = "chunk-{chunk_index:03d}/file-{file_index:03d}" if v3 else "chunk-{episode_chunk:03d}/"
    video = (
        f"videos/{{video_key}}/{files}.mp4" if v3 else f"videos/{files}{{video_key}}/episode_{{episode_index:06d}}.mp4"
    )
    features = {CAMERA: {"dtype": "video", "shape": [SIDE, SIDE, 3]}}
    features |= {name: {"dtype": "float32", "shape": [3], "names": None} for name in ("observation.state", "action")}
    info = {"codebase_version": version, "fps": fps, "features": features, "video_path": video, "chunks_size": 1000}
    info |= {"total_episodes": len(lengths), "total_frames": sum(lengths)}
    info |= {"data_path": f"data/{files}.parquet" if v3 else f"data/{files}episode_{{episode_index:06d}}.parquet"}
    (root / "meta").mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info))
    (root / "meta/stats.json").write_text("{}")
    (root / "meta/episodes_stats.jsonl").write_text("")
    table = rows_of(lengths, fps, tasks, times)
    stops = np.cumsum(lengths).tolist()
    if v3:
        write_table(root / "meta/tasks.parquet", {"task_index": list(range(len(texts))), "task": list(texts)})
        write_episodes(root, lengths, fps)
        write_table(root / f"data/{place}.parquet", table)
        numbers = [of_frame(e, f) for e, length in enumerate(lengths) for f in range(length)]
        write_video(root / f"videos/{CAMERA}/{place}.mp4", numbers, fps)
        return root
    write_lines(root / "meta/tasks.jsonl", [{"task_index": i, "task": text} for i, text in enumerate(texts)])
    write_lines(root / "meta/episodes.jsonl", [{"episode_index": e, "length": n} for e, n in enumerate(lengths)])
    for e, (stop, length) in enumerate(zip(stops, lengths, strict=True)):
        part = {name: values[stop - length : stop] for name, values in table.items()}
        write_table(root / f"data/{place.format(e)}.parquet", part)
        path = root / f"videos/{CHUNK}/{CAMERA}/episode_{e:06d}.mp4"
        write_video(path, [of_frame(e, f) for f in range(length)], fps)
    return root


def rows_of(lengths, fps, tasks, times=None):
    """Column -> values of all rows; state and action carry episode and frame."""
    places = [(e, f) for e, length in enumerate(lengths) for f in range(length)]
    vectors = [[float(e), float(f), 1.0] for e, f in places]
    return {
        "index": list(range(len(places))),
        "episode_index": [e for e, _ in places],
        "frame_index": [f for _, f in places],
        "timestamp": [float(times(e, f) if times else f / fps) for e, f in places],
        "task_index": [tasks[e] for e, _ in places],
        "observation.state": vectors,
        "action": vectors,
    }


def write_episodes(root, lengths, fps, *, episodes=None, starts=None, file="file-000.parquet", **columns):
    """`meta/episodes` of v3.0; `starts`: from_timestamps; further columns replace what would be written."""
    stops, zeros = np.cumsum(lengths), [0] * len(lengths)
    firsts = stops - lengths
    listed = {
        "episode_index": list(episodes or range(len(lengths))),
        "dataset_from_index": firsts.tolist(),
        "dataset_to_index": stops.tolist(),
        "data/chunk_index": zeros,
        "data/file_index": zeros,
        f"videos/{CAMERA}/chunk_index": zeros,
        f"videos/{CAMERA}/file_index": zeros,
        f"videos/{CAMERA}/from_timestamp": list(starts) if starts is not None else (firsts / fps).tolist(),
    }
    write_table(root / f"meta/episodes/{CHUNK}/{file}", listed | columns)


def write_table(path, columns):
    """A parquet file of lists or arrow arrays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def write_lines(path, lines):
    """A JSON Lines file."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def edit_info(root, **changes):
    """Change keys of `meta/info.json`."""
    path = Path(root) / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def set_columns(root, names=None, **columns):
    """Replace or add columns of a v3.0 dataset's only data file; lists of lists become vectors.

    Args:
        root: The dataset.
        names: Column -> the names of its numbers in `meta/info.json`.
        columns: Column -> values of all rows; `_` stands for `.` in `observation_state`.
    """
    path = Path(root) / f"data/{CHUNK}/file-000.parquet"
    table = pq.read_table(path)
    features = json.loads((Path(root) / "meta/info.json").read_text())["features"]
    for key, values in columns.items():
        name = key.replace("observation_state", "observation.state").replace("annotation_", "annotation.")
        first = values[0]
        kind = "string" if isinstance(first, str) else "int64" if isinstance(first, int) else "float32"
        features[name] = {"dtype": kind, "shape": [len(first) if isinstance(first, list) else 1], "names": None}
        table = table.drop_columns([name] if name in table.column_names else []).append_column(name, pa.array(values))
    for name, said in (names or {}).items():
        features[name]["names"] = said
    pq.write_table(table, path)
    edit_info(root, features=features)
    return root
