"""How fast LeRobot data are read: rlinf's train loader beside `LeRobotDataset` in a `DataLoader`.

    python benchmarks/data_loading.py [--cases video_h264,pyav] [--rounds 5] [--json]

Both read the same files, which this script writes (`camera_data.py`), on the same cores in batches of the same size,
and hand over the same: pictures as uint8, the state, an action chunk. They take turns; a ratio is the median over the
rounds. LeRobotDataset has `return_uint8` and the number of workers out of 0, 1 and 2 that is best for it; ours has the
two that runs have by default. In `video_*` both decode with the same torchcodec and FFmpeg. `pyav` is what an
installation without FFmpeg on the system does: LeRobotDataset falls back to PyAV. `decode_share` is the speed of our
loader over that of torchcodec alone, which decodes the same rows in as many processes and gives nothing away.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np
import torch
from camera_data import CAMERAS, DATASETS, FPS, WIDTHS, write_dataset
from torch.utils.data import DataLoader, Dataset, RandomSampler

from rlinf_core import PolicyConfig, Sample
from rlinf_core.data.batch_memory import batch_tensor
from rlinf_core.data.ffmpeg_libraries import lend_ffmpeg
from rlinf_core.data.lerobot import open_lerobot
from rlinf_core.data.loader import build_train_loader
from rlinf_core.data.mixture import Source
from rlinf_core.data.pipeline import build_pipeline
from rlinf_core.datasets import LeRobotDatasetConfig

BATCH, WORKERS = 32, 2
Batches = Iterator[int]
"""A loader at work: the number of samples of each batch, as it arrives."""


@dataclass(frozen=True)
class Case:
    """What one ratio compares."""

    data: str
    """One of `camera_data.DATASETS`."""
    horizon: int = 10
    """Actions of a chunk."""
    backend: str = "torchcodec"
    """LeRobotDataset's decoder."""
    batch: int = BATCH


CASES = {
    "video_h264": Case("h264"),
    "video_av1": Case("av1"),
    "image_h10": Case("image", batch=8),
    "image_h50": Case("image", horizon=50, batch=8),
    "pyav": Case("av1", backend="pyav"),
    "decode_share": Case("h264"),
}


class Stacking(PolicyConfig):
    """A policy that only stacks: what is measured is reading."""

    type: Literal["stacking"] = "stacking"
    horizon: int = 10

    def chunk_length(self) -> int:
        return self.horizon

    def collate(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        batch = {key: torch.from_numpy(np.stack([one[key] for one in samples])) for key in ("state", "actions")}
        for name in ("front", "wrist"):
            pictures = [torch.from_numpy(one["images"][name]) for one in samples]
            batch[name] = batch_tensor((len(pictures), *pictures[0].shape), torch.uint8)
            torch.stack(pictures, out=batch[name])
        return batch


def ours(root: Path, case: Case, workers: int = WORKERS) -> Batches:
    """The loader of a run."""
    config = LeRobotDatasetConfig(repo_id=str(root), images=dict(zip(("front", "wrist"), CAMERAS, strict=True)))
    rows, policy = open_lerobot(config, case.horizon, "train"), Stacking(horizon=case.horizon)
    source = Source(rows, build_pipeline(config, policy, None))
    sizes = {"global_batch_size": case.batch, "micro_batch_size": case.batch, "rank": 0, "world_size": 1}
    steps = {"start_step": 0, "stop_step": 10**6, "num_workers": workers, "pin_memory": False}
    for batch in build_train_loader([source], policy, seed=0, **sizes, **steps):
        assert batch["actions"].shape == (case.batch, case.horizon, WIDTHS["action"])
        yield len(batch["front"])


def theirs(root: Path, case: Case, workers: int) -> Batches:
    """`LeRobotDataset` in a shuffling `DataLoader`."""
    from lerobot.datasets import video_utils
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    video_utils._default_decoder_cache.clear()  # Open files must not be shared with workers that are forked.
    chunk = {"action": [step / FPS for step in range(case.horizon)]}
    dataset = LeRobotDataset(
        "benchmarks/cameras", root, delta_timestamps=chunk, video_backend=case.backend, return_uint8=True
    )
    loader = DataLoader(dataset, case.batch, sampler=_endless(dataset), num_workers=workers, drop_last=True)
    for batch in loader:
        assert batch["action"].shape == (case.batch, case.horizon, WIDTHS["action"])
        assert batch[CAMERAS[0]].dtype == torch.uint8 or case.data == "image"  # Pictures in columns: always float32.
        yield len(batch["index"])


def decoding(root: Path, case: Case, workers: int = WORKERS) -> Batches:
    """Torchcodec alone: the frames of a random batch, decoder by decoder in the order of time, thrown away."""
    rows = DecodeOnly(root, case.batch)
    loader = DataLoader(rows, None, sampler=_endless(rows), num_workers=workers, worker_init_fn=_single_thread)
    for batch in loader:
        yield int(batch)


class DecodeOnly(Dataset[int]):
    """An item decodes a batch. The videos of the dataset have one file a camera: frame i is row i."""

    def __init__(self, root: Path, batch: int) -> None:
        self.files = [path for camera in CAMERAS for path in sorted(root.glob(f"videos/{camera}/*/*.mp4"))]
        assert len(self.files) == len(CAMERAS)
        self.rows = json.loads((root / "meta/info.json").read_text())["total_frames"]
        self.batch = batch
        self.decoders: list[Any] = []

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, number: int) -> int:
        from torchcodec.decoders import VideoDecoder

        rows = np.sort(np.random.default_rng(number).choice(self.rows, self.batch, replace=False)).tolist()
        self.decoders = self.decoders or [VideoDecoder(str(path), seek_mode="approximate") for path in self.files]
        for decoder in self.decoders:
            decoder.get_frames_at(rows)
        return self.batch


def _endless(dataset: Any) -> RandomSampler:
    return RandomSampler(dataset, replacement=True, num_samples=10**6, generator=torch.Generator().manual_seed(0))


def _single_thread(_: int) -> None:
    torch.set_num_threads(1)


class Speed(NamedTuple):
    """How fast a loader was, once every worker had delivered a batch: starting is not counted."""

    samples_per_second: float
    processor_ms: float
    """Processor time of a sample, over all processes: it does not count how long others had the cores."""


def speed(start: Callable[[], Batches], workers: int, seconds: float) -> Speed:
    """Measure a loader."""
    with contextlib.closing(start()) as batches:
        for _ in range(max(workers, 1)):
            next(batches)
        begin, before, taken = time.perf_counter(), processor_seconds(), 0
        while True:
            taken += sum(itertools.islice(batches, max(workers, 1)))  # Workers deliver at about the same time.
            if (passed := time.perf_counter() - begin) >= seconds:
                return Speed(taken / passed, (processor_seconds() - before) / taken * 1000)


def processor_seconds() -> float:
    """Processor time so far of this process and of the workers it has."""
    total = time.process_time()
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def compare(name: str, root: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """Speeds of both sides of a case, and the median of their ratios."""
    case = CASES[name]
    if name == "decode_share":
        workers, other = WORKERS, decoding
    else:
        tried = {
            number: speed(lambda n=number: theirs(root, case, n), number, seconds).samples_per_second
            for number in (0, 1, 2)
        }
        workers, other = max(tried, key=tried.__getitem__), theirs
    pairs = [
        (speed(lambda: ours(root, case), WORKERS, seconds), speed(lambda: other(root, case, workers), workers, seconds))
        for _ in range(rounds)
    ]
    mine, peer = (Speed(*map(statistics.median, zip(*side, strict=True))) for side in zip(*pairs, strict=True))
    return {
        "ratio": round(statistics.median(a.samples_per_second / b.samples_per_second for a, b in pairs), 3),
        "processor_time_ratio": round(statistics.median(b.processor_ms / a.processor_ms for a, b in pairs), 3),
        "ours": {name: round(value, 2) for name, value in mine._asdict().items()},
        "other": {name: round(value, 2) for name, value in peer._asdict().items()},
        "beside": "torchcodec alone" if other is decoding else f"LeRobotDataset, {workers} workers, {case.backend}",
        "rounds": len(pairs),
    }


def decode_alone(root: Path) -> dict[str, float]:
    """Frames a second of one process, 32 frames out of one file at a time, by decoder."""
    from rlinf_core.data.video import VideoReader

    path, speeds = next(root.glob(f"videos/{CAMERAS[0]}/*/*.mp4")), {}
    generator, total = np.random.default_rng(0), json.loads((root / "meta/info.json").read_text())["total_frames"]
    for decoder in ("torchcodec", "pyav"):
        reader, taken, begin = VideoReader(decoder=decoder), 0, 0.0
        while not begin or time.perf_counter() - begin < 2:
            times = generator.choice(total, BATCH, replace=False) / FPS
            reader.frames(path, times.tolist(), 0.5 / FPS)
            begin, taken = (begin, taken + BATCH) if begin else (time.perf_counter(), 0)
        speeds[decoder] = round(taken / (time.perf_counter() - begin), 1)
    return speeds


def main() -> None:
    """Write the data, measure, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES), help="some of them, separated by commas")
    parser.add_argument("--rounds", type=int, default=5, help="turns that both sides of a case take")
    parser.add_argument("--seconds", type=float, default=2.0, help="least time of a turn")
    parser.add_argument("--data", type=Path, help="a folder to keep the data in between runs")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args()
    lend_ffmpeg()  # Else torchcodec, and with it LeRobotDataset, would need an FFmpeg on the system.
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    found: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        folder = options.data or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name in options.cases.split(","):
            root = folder / CASES[name].data
            if not root.exists():
                write_dataset(root, DATASETS[CASES[name].data])
            found[name] = compare(name, root, options.rounds, options.seconds)
            print(f"{name:14}{found[name]['ratio']:9.2f}  {found[name]}", file=sys.stderr)
        alone = {name: decode_alone(folder / name) for name in ("h264", "av1") if (folder / name).exists()}
    packages = ("rlinf-core", "lerobot", "torchcodec", "av", "torch", "datasets")
    versions = {name: importlib.metadata.version(name) for name in packages}
    ratios = {name: case["ratio"] for name, case in found.items()}
    about = {"cores": len(os.sched_getaffinity(0)), "date": time.strftime("%Y-%m-%d"), "versions": versions}
    result = ratios | {"decode_alone_frames_per_second": alone, "cases": found} | about
    print(json.dumps(result, indent=2) if options.json else json.dumps(ratios, indent=2))


if __name__ == "__main__":
    sys.exit(main())
