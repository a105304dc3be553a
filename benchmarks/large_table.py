"""How long a large table takes to open, and how much memory the processes of a machine share: 27 million rows.

    python benchmarks/large_table.py [--rows 27000000] [--folder FOLDER] [--json]

The script writes a LeRobot dataset v3.0 of numbers alone: 270 parquet files of 100,000 rows, episodes of 300 frames, a
state and an action of 7 numbers each, 2.5 GB in memory. It is opened as a run opens it, in processes of its own: `cold`
with an empty cache, so that all files are read and the columns are written to the cache, and `warm` as every later
start does. Then two ranks with two loader workers each hold the rows; `PSS` (proportional set size, proc(5)) divides
each shared page among the processes that have it, so that the sum over all six is what the machine spends.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from reporting.result_line import ResultLine

PER_FILE, LENGTH, WIDTH, FPS = 100_000, 300, 7, 15
"""Rows of a file (whole episodes, so a few less), frames of an episode, numbers of a vector, frames per second."""


def write_table(root: Path, rows: int) -> None:
    """Write the dataset; numbers are random, so that they do not compress."""
    vector = {"dtype": "float32", "shape": [WIDTH], "names": None}
    info = {"codebase_version": "v3.0", "fps": FPS, "features": {"observation.state": vector, "action": vector}}
    info |= {
        "total_episodes": rows // LENGTH,
        "total_frames": rows,
        "data_path": "data/{chunk_index}/{file_index}.parquet",
    }
    (root / "meta").mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info))
    pq.write_table(pa.table({"task_index": [0], "task": ["move"]}), root / "meta/tasks.parquet")
    numbers = np.arange(rows // LENGTH)
    per_file = PER_FILE // LENGTH
    listed = {
        "episode_index": numbers,
        "dataset_from_index": numbers * LENGTH,
        "dataset_to_index": (numbers + 1) * LENGTH,
        "data/chunk_index": numbers * 0,
        "data/file_index": numbers // per_file,
    }
    (root / "meta/episodes").mkdir()
    pq.write_table(pa.table(listed), root / "meta/episodes/0.parquet")
    (root / "data/0").mkdir(parents=True)
    random = np.random.default_rng(0)
    for file in range(-(-len(numbers) // per_file)):
        index = np.arange(file * per_file * LENGTH, min((file + 1) * per_file * LENGTH, rows))
        values = (pa.array(random.random(len(index) * WIDTH, np.float32)) for _ in range(2))
        state, action = (pa.FixedSizeListArray.from_arrays(one, WIDTH) for one in values)
        columns = {"index": index, "episode_index": index // LENGTH, "frame_index": index % LENGTH}
        columns |= {"timestamp": (index % LENGTH / FPS).astype(np.float32), "task_index": index * 0}
        table = pa.table(columns | {"observation.state": state, "action": action})
        pq.write_table(table, root / f"data/0/{file}.parquet", compression="snappy", use_dictionary=False)


def opened(root: Path) -> Any:
    """The rows as a run has them."""
    from rlinf_core.contract.datasets import LeRobotDatasetConfig
    from rlinf_core.data.lerobot.source import open_lerobot

    return open_lerobot(LeRobotDatasetConfig(repo_id=str(root)), 10, "train")


def _open(root: Path) -> None:
    """In a process of its own: print the seconds of an open without the imports, and the peak of memory."""
    import resource

    from rlinf_core.data.lerobot import source  # noqa: F401

    began, computed = time.perf_counter(), time.process_time()
    rows = len(opened(root))
    seconds, cpu = time.perf_counter() - began, time.process_time() - computed
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"rows": rows, "seconds": seconds, "cpu_seconds": cpu, "peak": peak}))


def _rank(root: Path) -> None:
    """In a process of its own, as a rank: read all rows' columns in two loader workers, and wait."""
    from torch.utils.data import DataLoader

    source = opened(root)
    loader = DataLoader(
        Touched(source),
        sampler=range(4),
        batch_size=None,
        num_workers=2,
        persistent_workers=True,
        multiprocessing_context="forkserver",
    )
    found = sum(iter(loader))
    pids = [process.pid for process in loader._iterator._workers]  # type: ignore[union-attr]
    print(json.dumps({"pids": [os.getpid(), *pids], "found": float(found)}), flush=True)
    sys.stdin.read()


class Touched:
    """Each item reads every page of the columns, so that all are in the process's memory."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __getitem__(self, number: int) -> float:
        total = 0.0
        for start in range(0, len(self.source), 50_000):
            columns = self.source.columns(np.arange(start, min(start + 50_000, len(self.source)), 50))
            total += float(columns["observation.state"][:, 0].sum())
        return total


def _pss(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def main() -> None:
    """Measure, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=27_000_000)
    parser.add_argument("--folder", type=Path, help="where the dataset is, or is written to; default: a temporary one")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    parser.add_argument("--part", choices=("open", "rank"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        {"open": _open, "rank": _rank}[options.part](options.folder)
        return
    line = ResultLine("large_table", wanted=options.json)
    with tempfile.TemporaryDirectory() as scratch:
        root = options.folder or Path(scratch) / "table"
        if not (root / "meta").exists():
            write_table(root, options.rows)
        os.environ["RLINF_CACHE"] = str(Path(scratch) / "cache")
        command = [sys.executable, __file__, "--folder", str(root), "--part"]
        cold, warm = (json.loads(subprocess.check_output([*command, "open"])) for _ in range(2))
        shared = sum(path.stat().st_size for path in Path(scratch, "cache").rglob("*.npy"))
        ranks = [
            subprocess.Popen([*command, "rank"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        pids = [pid for rank in ranks for pid in json.loads(rank.stdout.readline())["pids"]]  # type: ignore[union-attr]
        memory = sum(map(_pss, pids))
        for rank in ranks:
            rank.communicate("")
        shutil.rmtree(Path(scratch) / "cache")
    results = {
        "rows": cold["rows"],
        "cold_seconds": cold["seconds"],
        "cold_cpu_seconds": cold["cpu_seconds"],
        "cold_peak_gb": cold["peak"] / 1e9,
        "warm_seconds": warm["seconds"],
        "warm_cpu_seconds": warm["cpu_seconds"],
        "columns_gb": shared / 1e9,
        "pss_of_6_processes_gb": memory / 1e9,
    }
    text = (
        f"{cold['rows']} rows: {cold['seconds']:.1f} s at first, {warm['seconds']:.1f} s later; "
        f"{memory / 1e9:.1f} GB in six processes together, for {shared / 1e9:.1f} GB of columns"
    )
    line.write(results, text, settings={key: str(value) for key, value in vars(options).items()})


if __name__ == "__main__":
    main()
