"""What 1 to 4 ranks exchange, counted beside the formula and the rehearsal, and what they learn, beside one process.

    python benchmarks/scaling.py [--ranks 4] [--steps 5] [--json]

The quickstart's policy on CPU ranks with gloo, with one global batch however many ranks share it. On every rank the
trainer's own steps are heard.

- `bytes_over_formula`: bytes that a rank receives for weights and gradients in a step, over those of `rlinf plan`.
- `same_order`: 1 if every step calls the collectives that `rlinf rehearse` calls, in its order and sizes.
- `loss_difference`: the largest relative difference between a loss and that of one process.
- `step_seconds_N`: rough, as the ranks share the machine's cores.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from reporting.result_line import ResultLine

ROOT = Path(__file__).parents[1]
BATCH = 12
"""Divisible by 1, 2, 3 and 4."""


def settings(folder: Path, ranks: int, steps: int) -> list[str]:
    """The quickstart's settings that differ."""
    return [
        f"data.repo_id={ROOT / 'examples/data/metaworld_3tasks'}",
        "data.num_workers=0",
        f"runner.output_dir={folder}",
        f"runner.name=ranks_{ranks}",
        f"runner.max_steps={steps}",
        "runner.save_interval=0",
        "runner.val_check_interval=0",
        f"trainer.global_batch_size={BATCH}",
        f"trainer.micro_batch_size={BATCH // ranks}",
        "trainer.param_dtype=fp32",
    ]


def load(folder: Path, ranks: int, steps: int) -> Any:
    """The run's config, and the plugins."""
    from rlinf_core.config.load import load_config
    from rlinf_core.plugins.registry import get_plugins

    plugins = get_plugins()
    return load_config(str(ROOT / "examples/quickstart.toml"), settings(folder, ranks, steps), plugins), plugins


def train(folder: Path, rank: int, ranks: int, steps: int, port: int) -> None:
    """Train on one rank; writes what it exchanged in each step, and the seconds, to `RANKS-RANK.json`."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ |= {"TORCHELASTIC_RESTART_COUNT": "0"}
    from rlinf_core.rehearsal.collectives import Listening
    from rlinf_core.trainers import Fsdp2Trainer, TrainStep
    from rlinf_core.training.distributed.processes import processes
    from rlinf_core.training.resume import Start

    heard: list[Any] = []
    seconds: list[float] = []

    class Heard(TrainStep):
        """A step whose collectives are heard."""

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            with Listening() as listening, listening.labelled():
                record = super().__call__(*args, **kwargs)
            seconds.append(time.perf_counter() - begin)
            heard.append([asdict(one) for one in listening.heard])
            return record

    class Trainer(Fsdp2Trainer):
        """Core's trainer with such steps."""

        step_type = Heard

    run, plugins = load(folder, ranks, steps)
    with processes("cpu") as group:
        trainer = Trainer(run, run.trainer, start=Start(), group=group, plugins=plugins)
        trainer.train()
    (folder / f"{ranks}-{rank}.json").write_text(json.dumps({"heard": heard, "seconds": seconds}))


def start(folder: Path, ranks: int, steps: int) -> None:
    """Fork the ranks from this process, which has torch imported, and wait for them."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=train, args=(folder, rank, ranks, steps, store.port)) for rank in range(ranks)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise SystemExit(f"a rank of {ranks} failed with {[worker.exitcode for worker in workers]}")


def losses(folder: Path, ranks: int) -> list[float]:
    """The loss of each step."""
    rows = map(json.loads, (folder / f"ranks_{ranks}" / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def compare(folder: Path, ranks: int, steps: int) -> dict[str, float]:
    """What so many ranks exchanged, over the plan's bytes, and beside their rehearsal."""
    from rlinf_core.rehearsal.collectives import Collective
    from rlinf_core.rehearsal.compare import rehearse, traffic_of

    found = rehearse(*load(folder, ranks, steps), ranks)
    wanted = [one.compared for one in found.measured.steps[-1]]
    same, ratios = True, []
    for rank in range(ranks):
        raw = json.loads((folder / f"{ranks}-{rank}.json").read_text())
        for step in raw["heard"]:
            calls = [Collective(**one) for one in step]
            same &= [one.compared for one in calls] == wanted
            ratios.append(traffic_of(calls).total / found.plan.traffic.total)
    return {"same_order": float(same), "bytes_over_formula": max(ratios, key=lambda ratio: abs(ratio - 1))}


def measured(folder: Path, most: int, steps: int) -> Iterator[tuple[str, float]]:
    """All results, by name."""
    counts = range(1, most + 1)
    for ranks in counts:
        start(folder, ranks, steps)
    alone = losses(folder, 1)
    differences = [
        abs(loss - one) / abs(one) for ranks in counts for loss, one in zip(losses(folder, ranks), alone, strict=True)
    ]
    yield "loss_difference", max(differences)
    for ranks in counts:
        raw = json.loads((folder / f"{ranks}-0.json").read_text())
        yield f"step_seconds_{ranks}", statistics.median(raw["seconds"])
    compared = [compare(folder, ranks, steps) for ranks in counts if ranks > 1]
    yield "same_order", min(one["same_order"] for one in compared)
    yield "bytes_over_formula", max((one["bytes_over_formula"] for one in compared), key=lambda one: abs(one - 1))


def main() -> None:
    """Measure, and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4, choices=(2, 3, 4), help="most processes, with gloo")
    parser.add_argument("--steps", type=int, default=5, help="of each run")
    parser.add_argument("--json", action="store_true", help="print one JSON object, on the last line")
    options = parser.parse_args()
    line = ResultLine("scaling", wanted=options.json)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in ("rlinf_core.training.trainer", "rlinf_plugins_openpi.model.pi0"):
        import_module(name)  # Before ranks are forked, so that they need not.

    with tempfile.TemporaryDirectory() as folder:
        results = dict(measured(Path(folder), options.ranks, options.steps))
    text = "\n".join(f"{name.replace('_', ' '):30}{value:18.6g}" for name, value in results.items())
    line.write(
        results,
        text,
        settings={"ranks": options.ranks, "steps": options.steps, "global_batch_size": BATCH},
        versions={"torch": version("torch")},
    )


if __name__ == "__main__":
    sys.exit(main())
