"""How fast LeRobot datasets are read: rlinf's train loader beside `LeRobotDataset` in a `DataLoader`.

    python benchmarks/data_loading.py [--cases video_h264,pyav] [--rounds 5] [--json] [--markdown FILE]

Both read the same files, which this script writes (`camera_loading/data.py`), on the same cores, and return batches of
the same size and content: images as uint8, the state, an action chunk. They take turns; a ratio is the median over the
rounds. LeRobotDataset runs with `return_uint8` and whichever of 0, 1 or 2 workers is fastest for it; ours runs with the
default of two. Unless noted, both decode with the same torchcodec and FFmpeg.

`pyav` is an installation without FFmpeg on the system, where LeRobotDataset falls back to PyAV. `raw_cache` reads what
`rlinf cache --format raw` wrote from the videos that LeRobotDataset decodes. `long_gop` has a key frame every 250
frames and takes rows in the chunked order, over whole epochs; random order is measured as well. `decode_share` is the
speed of our loader over that of torchcodec alone, which only decodes the same frames, batch by batch, with one process
per core.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from camera_loading.data import CAMERAS, DATASETS, FPS, WIDTHS, write_dataset
from camera_loading.turns import Batches, Runner, Speed
from reporting.result_line import ResultLine
from torch.utils.data import DataLoader, Dataset, RandomSampler

from rlinf_core import PolicyConfig, Sample
from rlinf_core.contract.datasets import LeRobotDatasetConfig
from rlinf_core.data.batch_memory import batch_tensor
from rlinf_core.data.frame_cache.manifest import caches_of
from rlinf_core.data.frame_cache.parts import Conversion
from rlinf_core.data.frame_cache.source import open_cached
from rlinf_core.data.frame_cache.writer import convert, find_missing
from rlinf_core.data.images.decoders import lend_ffmpeg
from rlinf_core.data.lerobot.source import open_lerobot
from rlinf_core.data.loading.chunked_sampling import Chunks
from rlinf_core.data.loading.loader import build_train_loader
from rlinf_core.data.loading.mixture import Source
from rlinf_core.data.loading.sampling import Batching, epoch_order
from rlinf_core.data.pipeline import build_pipeline

BATCH, WORKERS = 32, 2


@dataclass(frozen=True)
class Case:
    """What a ratio compares."""

    data: str
    """A key of `camera_loading.data.DATASETS`."""
    horizon: int = 10
    """Actions per chunk."""
    backend: str = "torchcodec"
    """LeRobotDataset's decoder."""
    batch: int = BATCH
    raw_cache: bool = False
    """Ours reads a raw cache."""
    chunks: Chunks | None = None
    """Ours takes rows in the chunked order."""


LONG_GOP = Case("h264_long_gop", batch=16, chunks=Chunks(streams=32, frames=16, buffer=256))
CASES = {
    "video_h264": Case("h264"),
    "video_av1": Case("av1"),
    "image_h10": Case("image"),
    "image_h50": Case("image", horizon=50, batch=8),  # A batch of 32 takes LeRobotDataset many seconds.
    "pyav": Case("av1", backend="pyav"),
    "raw_cache": Case("h264", raw_cache=True),
    "long_gop": LONG_GOP,
    "decode_share": Case("h264"),
}


class Stacking(PolicyConfig):
    """A policy that only stacks samples, so that only reading is measured."""

    type: Literal["stacking"] = "stacking"
    horizon: int = 10

    def chunk_length(self) -> int:
        return self.horizon

    def collate(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        batch = {key: torch.from_numpy(np.stack([one[key] for one in samples])) for key in ("state", "actions")}
        for name in ("front", "wrist"):
            images = [one["images"][name] for one in samples]
            batch[name] = batch_tensor((len(images), *images[0].shape), torch.uint8)
            np.stack(images, out=batch[name].numpy())
        return batch


def ours(root: Path, case: Case, workers: int = WORKERS) -> Batches:
    """The train loader of a run."""
    config = LeRobotDatasetConfig(repo_id=str(root), images=dict(zip(("front", "wrist"), CAMERAS, strict=True)))
    policy = Stacking(horizon=case.horizon)
    rows: Any = open_lerobot(config, case.horizon, "train")
    if case.raw_cache:
        config = config.model_copy(update={"cache": "raw", "cache_dir": str(root.parent / "cache")})
        write_cache(rows, config, policy)
        rows = open_cached(rows, config, policy)
    source = Source(rows, build_pipeline(config, policy, None))
    batching, steps = Batching(case.batch, case.batch), (0, 10**6)
    for batch in build_train_loader([source], policy, batching, steps, num_workers=workers, chunks=case.chunks):
        assert batch["actions"].shape == (case.batch, case.horizon, WIDTHS["action"])
        yield len(batch["front"])


def write_cache(rows: Any, config: LeRobotDatasetConfig, policy: PolicyConfig) -> None:
    """Write what `rlinf cache --format raw` writes, unless it is there already."""
    conversion = Conversion(caches_of(rows.metadata, config, policy, "raw"), (rows,))
    convert(conversion, find_missing(conversion), workers=0, progress=lambda done, parts: None)


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
        assert batch[CAMERAS[0]].dtype == torch.uint8 or case.data == "image"  # Images in columns are always float32.
        yield len(batch["index"])


def decoding(root: Path, case: Case, workers: int = WORKERS) -> Batches:
    """Torchcodec alone: decode the frames of each batch, file by file in order of time, and discard them."""
    rows = DecodeOnly(root, case.batch)
    loader = DataLoader(rows, None, sampler=range(10**6), num_workers=workers, worker_init_fn=_single_thread)
    for batch in loader:
        yield int(batch)


class DecodeOnly(Dataset[int]):
    """Item i decodes the frames of a run's batch i. There is one file per camera, so frame i is row i."""

    def __init__(self, root: Path, batch: int) -> None:
        self.files = [path for camera in CAMERAS for path in sorted(root.glob(f"videos/{camera}/*/*.mp4"))]
        assert len(self.files) == len(CAMERAS)
        self.rows = json.loads((root / "meta/info.json").read_text())["total_frames"]
        self.batch = batch
        self.decoders: list[Any] = []

    def __getitem__(self, number: int) -> int:
        from torchcodec.decoders import VideoDecoder

        epoch, step = divmod(number, self.rows // self.batch)
        rows = np.sort(epoch_order(0, epoch, self.rows)[step * self.batch :][: self.batch]).tolist()
        self.decoders = self.decoders or [VideoDecoder(str(path), seek_mode="approximate") for path in self.files]
        for decoder in self.decoders:
            decoder.get_frames_at(rows)
        return self.batch


def _endless(dataset: Any) -> RandomSampler:
    return RandomSampler(dataset, replacement=True, num_samples=10**6, generator=torch.Generator().manual_seed(0))


def _single_thread(_: int) -> None:
    torch.set_num_threads(1)


def compare(name: str, root: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """The speeds of both sides of a case, and the median of their ratios."""
    case = CASES[name]
    with contextlib.ExitStack() as stack:

        def opened(batches: Batches, workers: int, together: int = 0) -> Runner:
            return stack.enter_context(contextlib.closing(Runner(batches, workers, together)))

        if name == "decode_share":
            workers, beside = WORKERS, "torchcodec alone"
            other = opened(decoding(root, case), workers)
        else:
            workers = best_workers(root, case, seconds)
            beside = f"LeRobotDataset, {workers} workers, {'Pillow' if case.data == 'image' else case.backend}"
            other = opened(theirs(root, case, workers), workers)
        # The chunked order reads in bursts, so whole epochs are timed.
        epoch = json.loads((root / "meta/info.json").read_text())["total_frames"] // case.batch
        sides = {"ours": opened(ours(root, case), WORKERS, epoch if case.chunks else 0), "other": other}
        if case.chunks:
            sides["ours_random"] = opened(ours(root, replace(case, chunks=None)), WORKERS)
        turns = [{side: runner.turn(seconds) for side, runner in sides.items()} for _ in range(rounds)]
    ratios = [turn["ours"].samples_per_second / turn["other"].samples_per_second for turn in turns]
    of_processor_time = [turn["other"].processor_ms / turn["ours"].processor_ms for turn in turns]
    found = {
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "processor_time_ratio": round(statistics.median(of_processor_time), 3),
        "beside": beside,
        "rounds": rounds,
    }
    for side in sides:
        speeds = Speed(*map(statistics.median, zip(*(turn[side] for turn in turns), strict=True)))
        found[side] = {name: round(value, 2) for name, value in speeds._asdict().items()}
    return found


def best_workers(root: Path, case: Case, seconds: float) -> int:
    """The number of workers with which LeRobotDataset is fastest."""
    tried = {}
    for workers in (0, 1, 2):
        with contextlib.closing(Runner(theirs(root, case, workers), workers)) as runner:
            tried[workers] = runner.turn(seconds).samples_per_second
    return max(tried, key=tried.__getitem__)


def decode_alone(root: Path) -> dict[str, float]:
    """Frames per second of one process by decoder, 32 frames of one file at a time."""
    from rlinf_core.data.images.video import VideoReader

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


def table(found: dict[str, Any], versions: dict[str, str], load: list[float]) -> str:
    """The ratios in Markdown."""
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    cores = len(os.sched_getaffinity(0))
    date = time.strftime("%Y-%m-%d")
    lines = [
        f"{date}, {cores} cores, load {load[0]} at the start and {load[1]} at the end; {packages}.",
        "",
        "| case | ratio | lowest and highest round | ratio of processor time | ours, samples/s | beside, samples/s |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for name, case in found.items():
        span = f"{min(case['ratios']):.2f} - {max(case['ratios']):.2f}"
        beside = f"{case['other']['samples_per_second']:.0f}, {case['beside']}"
        if "ours_random" in case:
            beside += f" (ours in random order: {case['ours_random']['samples_per_second']:.0f})"
        own = case["ours"]["samples_per_second"]
        lines.append(
            f"| `{name}` | {case['ratio']:.2f} | {span} | {case['processor_time_ratio']:.2f} | {own:.0f} | {beside} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Write the datasets, measure, and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES), help="which cases, separated by commas")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--seconds", type=float, default=1.5, help="shortest turn")
    parser.add_argument("--frames", type=int, help="frames per episode; default: 60 to 250, by dataset")
    parser.add_argument("--data", type=Path, help="a folder that keeps the datasets between runs")
    parser.add_argument("--json", action="store_true", help="print one JSON object, on the last line")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table to this file")
    options = parser.parse_args()
    line = ResultLine("data_loading", wanted=options.json)
    import datasets  # Not at the top: each of our workers imports this module.

    lend_ffmpeg()  # Otherwise torchcodec, and so LeRobotDataset, would need FFmpeg on the system.
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    found: dict[str, Any] = {}
    load = [round(os.getloadavg()[0], 1)]
    with contextlib.ExitStack() as stack:
        folder = options.data or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name in options.cases.split(","):
            root = folder / CASES[name].data
            if not root.exists():
                recording = DATASETS[CASES[name].data]
                write_dataset(root, replace(recording, frames=options.frames or recording.frames))
            found[name] = compare(name, root, options.rounds, options.seconds)
            print(f"{name:14}{found[name]['ratio']:9.2f}  {found[name]}", file=sys.stderr, flush=True)
        alone = {
            name: decode_alone(folder / name) for name in ("h264", "av1", "h264_long_gop") if (folder / name).exists()
        }
    packages = ("rlinf-core", "lerobot", "torchcodec", "av", "torch", "datasets")
    versions = {name: importlib.metadata.version(name) for name in packages}
    ratios = {name: case["ratio"] for name, case in found.items()}
    details = {"decode_alone_frames_per_second": alone, "cases": found, "versions": versions}
    rows = table(found, versions, [*load, round(os.getloadavg()[0], 1)])
    line.write(ratios, rows, **details)
    if options.markdown:
        options.markdown.write_text(rows + "\n")


if __name__ == "__main__":
    sys.exit(main())
