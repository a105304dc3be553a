"""How fast normalization statistics are computed, beside a loader that decodes images as openpi's script does.

    python benchmarks/norm_stats.py [--dataset FOLDER] [--frames 512] [--json]

One run measures both on the same files: all statistics of `rlinf norm-stats`, including opening the dataset; and the
way of openpi's `compute_norm_stats.py`, which iterates over lerobot's dataset in a `DataLoader` with two workers and
decodes every image. Then it times ours on a dataset of LIBERO's size without images (273,465 frames, state of 8
numbers, action of 7).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from reporting.result_line import ResultLine

from rlinf_core.contract.datasets import LeRobotDatasetConfig
from rlinf_core.data.lerobot.source import open_lerobot
from rlinf_core.data.statistics.compute import RunningStats, summarize
from rlinf_core.data.transforms import RelativeActions

EXAMPLE = Path(__file__).parents[1] / "examples" / "data" / "metaworld_3tasks"
LIBERO = {"episodes": 1693, "frames": 273_465, "state": 8, "action": 7}
WORKERS, BATCH = 2, 32  # openpi's defaults.


def ours(root: Path, horizon: int) -> tuple[int, float]:
    """The rows of a dataset, and the seconds from opening it to its statistics; actions are relative to the state."""
    begin = time.perf_counter()
    config = LeRobotDatasetConfig(repo_id=str(root))
    source = open_lerobot(config, horizon, "train")
    summarize(source, [config.repack(), RelativeActions((True,) * 3)])
    return len(source), time.perf_counter() - begin


def openpi_loader(root: Path, horizon: int, frames: int) -> tuple[int, float]:
    """The frames read and the seconds for them, after the first batch: starting the workers is not counted."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from torch.utils.data import DataLoader

    fps = json.loads((root / "meta" / "info.json").read_text())["fps"]
    dataset = LeRobotDataset("local", root=root, delta_timestamps={"action": [i / fps for i in range(horizon)]})
    running = {"observation.state": RunningStats(), "action": RunningStats()}
    batches = iter(DataLoader(dataset, batch_size=BATCH, num_workers=WORKERS, drop_last=True))
    next(batches)
    begin, taken = time.perf_counter(), 0
    for batch in batches:
        for key, stats in running.items():
            stats.update(batch[key].numpy())
        taken += BATCH
        if taken >= frames:
            break
    return taken, time.perf_counter() - begin


def write_table(root: Path) -> None:
    """A LeRobot v3.0 dataset of LIBERO's size, without images."""
    generator, frames, count = np.random.default_rng(0), LIBERO["frames"], LIBERO["episodes"]
    episode = np.arange(frames) * count // frames
    starts = np.searchsorted(episode, np.arange(count))
    columns: dict[str, pa.Array] = {}
    for name, width in (("observation.state", LIBERO["state"]), ("action", LIBERO["action"])):
        numbers = generator.normal(size=frames * width).astype(np.float32)
        columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(numbers), width)
    columns |= {
        "timestamp": pa.array(((np.arange(frames) - starts[episode]) / 10).astype(np.float32)),
        "frame_index": pa.array(np.arange(frames) - starts[episode]),
        "episode_index": pa.array(episode),
        "index": pa.array(np.arange(frames)),
        "task_index": pa.array(episode % 40),
    }
    stops = np.append(starts[1:], frames)
    zeros = pa.array(np.zeros(count, np.int64))
    episodes = {"episode_index": pa.array(np.arange(count)), "length": pa.array(stops - starts)}
    episodes |= {"dataset_from_index": pa.array(starts), "dataset_to_index": pa.array(stops)}
    episodes |= {"data/chunk_index": zeros, "data/file_index": zeros}
    features = {name: {"dtype": "float32", "shape": [LIBERO[kind]]} for name, kind in (("action", "action"),)}
    features["observation.state"] = {"dtype": "float32", "shape": [LIBERO["state"]]}
    features |= {name: {"dtype": "int64", "shape": [1]} for name in columns if name not in features}
    info = {
        "codebase_version": "v3.0",
        "fps": 10,
        "features": features,
        "total_episodes": count,
        "total_frames": frames,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": None,
    }
    for folder in ("data/chunk-000", "meta/episodes/chunk-000"):
        (root / folder).mkdir(parents=True)
    pq.write_table(pa.table(columns), root / "data/chunk-000/file-000.parquet")
    pq.write_table(pa.table(episodes), root / "meta/episodes/chunk-000/file-000.parquet")
    tasks = {"task_index": list(range(40)), "task": [f"task {i}" for i in range(40)]}
    pq.write_table(pa.table(tasks), root / "meta/tasks.parquet")
    (root / "meta/info.json").write_text(json.dumps(info))


def main() -> None:
    """Measure, and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset", type=Path, default=EXAMPLE, help="a LeRobot v3.0 folder with images")
    parser.add_argument("--horizon", type=int, default=10, help="actions per chunk on that dataset")
    parser.add_argument("--frames", type=int, default=512, help="frames of it that the decoding loader reads")
    parser.add_argument("--json", action="store_true", help="print one JSON object, on the last line")
    options = parser.parse_args()
    line = ResultLine("norm_stats", wanted=options.json)
    ours(options.dataset, options.horizon)  # The first call pays for late imports.
    rows, seconds = ours(options.dataset, options.horizon)
    taken, decoding = openpi_loader(options.dataset, options.horizon, options.frames)
    found = {
        "frames_per_second": rows / seconds,
        "openpi_loader_frames_per_second": taken / decoding,
        "vs_openpi_loader": rows / seconds * decoding / taken,
    }
    with tempfile.TemporaryDirectory() as folder:
        write_table(Path(folder) / "table")
        for horizon in (10, 50):
            found[f"libero_size_horizon_{horizon}_seconds"] = ours(Path(folder) / "table", horizon)[1]
    results = {name: round(value, 2) for name, value in found.items()}
    text = "\n".join(f"{name.replace('_', ' '):40}{value:12.2f}" for name, value in results.items())
    settings = {"frames": options.frames, "horizon": options.horizon, "workers": WORKERS, "batch": BATCH}
    line.write(results, text, settings=settings, versions={name: version(name) for name in ("lerobot", "pyarrow")})


if __name__ == "__main__":
    sys.exit(main())
