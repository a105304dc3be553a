"""Runs that fail: a toy policy on LeRobot data, a plugin that injects the faults in `FAULTS`, and checks of the result.

`FAULTS` is a JSON list of faults, each with the rank and the step that it is for. Signals come from outside, from the
process that has forked the ranks, so many seconds after a rank has got somewhere.
"""

import contextlib
import json
import math
import os
import resource
import signal
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from toy_data import ToyPolicy
from toy_policy import ToyModule

from rlinf_core import LeRobotDatasetConfig, hookimpl
from rlinf_core.process import ending
from rlinf_core.training.checkpoint import manager as checkpoint
from rlinf_core.training.checkpoint import shards

CONFIG = """
[data]
config_name = "faulty"
repo_id = "{root}"
num_workers = 0
[trainer]
device = "cpu"
param_dtype = "fp32"
global_batch_size = 6
micro_batch_size = 1
[optim]
lr = 1e-2
warmup_steps = 2
ema_decay = 0.9
[runner]
save_interval = 3
keep_last = 3
"""
IMPORTS = ("faulty", "rlinf_core.loggers.console", "pandas", "plotext")
"""What every rank would import itself, which takes most of the time of a start."""
TIMES = {"step_seconds", "samples_per_second", "save_stall_seconds", "peak_memory_gb", "tflops_per_second"}
"""Columns of a row that hold times."""


class FaultyPolicy(ToyPolicy):
    """Two blocks on the state, with injected faults."""

    type: Literal["faulty"] = "faulty"

    def chunk_length(self):
        return 4

    def draw(self, generator):
        return {"noise": generator.standard_normal((4, 5), "float32")}

    def collate(self, samples):
        keys = ("state", "actions", "noise")
        return {key: torch.from_numpy(np.stack([sample[key] for sample in samples])) for key in keys}

    def build(self):
        return ToyModule(action_dim=5)


class FaultyData(LeRobotDatasetConfig):
    """The tiny dataset of the tests."""

    run_defaults = {"policy": {"type": "faulty"}}
    images: dict[str, str] = {"front": "observation.images.front"}


@hookimpl
def rlinf_register_policies():
    return [FaultyPolicy]


@hookimpl
def rlinf_configure(run):
    ending.OTHER_RANKS_WAIT = float(os.environ["OTHER_RANKS_WAIT"])


@hookimpl
def rlinf_train_started(trainer):
    for fault in json.loads(os.environ.get("FAULTS", "[]")):
        if fault["rank"] == int(os.environ.get("RANK", "0")):
            (break_saves if fault["kind"] == "save" else break_step)(trainer, **fault)


def break_step(trainer, kind, rank, step, **fault):
    """Inject the faults that are due when a rank starts a step."""
    doings = {"step": tell, "limit": limit_files, "fill": fill_disk, "nan": break_sample, "slow": be_slow}

    def begin(policy, arguments):
        if policy.training and (trainer.step + 1 == step or kind == "slow"):
            doings[kind](batch=arguments[0], **fault)

    trainer.policy.register_forward_pre_hook(begin)


def break_saves(trainer, kind, rank, step, seconds=0.0, **fault):
    """Report when a rank writes the first bytes of a checkpoint file, from a step on, and slow that down."""
    write_checkpoint, write = checkpoint.write_checkpoint, shards.HashedFile.write
    written = -1

    def follow(place, position, *arguments, **options):
        nonlocal written
        written = position.step  # The trainer may be further: it goes on meanwhile.
        return write_checkpoint(place, position, *arguments, **options)

    def slowly(self, data):
        if not self.tell() and written >= step:
            tell(batch=None, **fault)
            time.sleep(seconds)
        return write(self, data)

    checkpoint.write_checkpoint, shards.HashedFile.write = follow, slowly


def tell(batch, file):
    Path(file).touch()


def limit_files(batch, size):
    """Limit the size of this rank's files from now on, which looks like a full disk to the writer. -1: no limit."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def fill_disk(batch, folder, full):
    """Fill a small disk completely, or free it again."""
    ballast = Path(folder) / "ballast"
    if not full:
        ballast.unlink(missing_ok=True)  # A step has several micro batches.
        return
    with ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(512)):
            pass


def break_sample(batch, number):
    """Put NaN into a sample, as a faulty sensor would."""
    batch["actions"][number, 0, 0] = math.nan


def be_slow(batch, seconds, until):
    """Slow down steps until a file exists, so that a test can follow from outside."""
    if not Path(until).exists():
        time.sleep(seconds)


class Runs:
    """A run in a folder, started as often as necessary."""

    def __init__(self, site, folder, start_ranks):
        self._site, self._start_ranks, self._events = site, start_ranks, 0
        self.folder = folder / "run"
        folder.mkdir(exist_ok=True)

    def next(self):
        """Another run, which starts from scratch."""
        return Runs(self._site, self.folder.parent / "next", self._start_ranks)

    def start(self, steps, *settings, ranks=2, faults=(), signals=(), wait=ending.OTHER_RANKS_WAIT):
        """Start the run or continue it, to its end or to that of its ranks; for how long others let rank 0 talk."""
        return self._start_ranks(
            "rlinf_core.train:main",
            ranks,
            *(self._site / "faulty.toml", f"runner.output_dir={self.folder.parent}", f"runner.max_steps={steps}"),
            *settings,
            paths=[self._site],
            imports=IMPORTS,
            signals=signals,
            FAULTS=json.dumps(faults),
            OTHER_RANKS_WAIT=str(wait),
            RLINF_DISABLE_PLUGINS="rlinf-plugins-text",  # Nobody here needs it, and it takes long to import.
        )

    def when(self, kind, rank, step, delay, to, number=signal.SIGKILL, **fault):
        """A signal to the ranks `to`, some time after a rank starts a step or a save; returns (fault, signal)."""
        self._events += 1
        file = str(self.folder.parent / f"event_{self._events}")
        fault = {"kind": kind, "rank": rank, "step": step, "file": file, **fault}
        return fault, {"file": file, "delay": delay, "ranks": list(to), "signal": int(number)}

    @property
    def step(self):
        """The step that the run would continue from."""
        latest = self.folder / "latest"
        return int(latest.read_text().removeprefix("step_")) if latest.exists() else 0

    def end(self):
        return json.loads((self.folder / "exit.json").read_text())


def lines(folder):
    """The rows of the metrics file, unparsed."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


def numbers(folder):
    """The metrics of each step, without times."""
    rows = [json.loads(line) for line in lines(folder)]
    return [{key: row[key] for key in row if key not in TIMES and not key.endswith("_share")} for row in rows]


def shards_of(folder, step):
    """Hashes of the weights, moments and averages of a checkpoint, by file."""
    files = json.loads((folder / "checkpoints" / f"step_{step:09d}" / "state.json").read_text())["files"]
    return {name: of["sha256"] for name, of in files.items() if name.endswith(".distcp")}


def assert_same(folder, other, steps):
    """No step is missing or repeated, and the final checkpoints are identical, bit for bit."""
    assert [row["step"] for row in numbers(folder)] == list(range(1, steps + 1))
    assert numbers(folder) == numbers(other)
    assert shards_of(folder, steps) == shards_of(other, steps)
    assert shards_of(folder, steps)
