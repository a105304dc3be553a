"""What a tracker costs a training step: time in the training process, and computing in the tracker's own.

    python benchmarks/tracker_cost.py [--trackers tensorboard,wandb,swanlab,trackio] [--steps 400] [--json]

A loop of steps of 50 ms logs 40 metrics a step to `metrics.jsonl` as a run does, and calls the tracker's logger.
`<tracker>_share` is the CPU time of the training process in that call, as a share of 50 ms: what the step waits for.
`<tracker>_process_share` is the CPU time of the tracker's process over the same steps, once it has opened its run, as a
share of one core: what is left for it to take from others, as on any machine with a free core it takes nothing. All
work offline. Trackers that are not installed are left out.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from reporting.result_line import ResultLine

from rlinf_core.loggers.jsonl import JsonlLogger, RowFile
from rlinf_plugins_trackers.config import TRACKERS

SECONDS_A_STEP, METRICS = 0.05, 40
OFFLINE: dict[str, dict[str, Any]] = {"wandb": {"mode": "offline"}, "swanlab": {"mode": "offline"}}


def measure(name: str, folder: Path, steps: int) -> tuple[float, float]:
    """Shares of a step in the training process, and of a core in the tracker's."""
    folder.mkdir()
    (folder / "config.toml").write_text("seed = 0\n[runner]\nname = 'arm'\n")
    (folder / "environment.json").write_text("{}")
    config = TRACKERS[name](**OFFLINE.get(name, {}))
    rows = JsonlLogger(RowFile(folder / "metrics.jsonl"))
    tracker = config.start(folder, "arm", 0)
    pid, spent = tracker._process.pid, 0.0
    before = _cpu_seconds(pid)
    for step in range(1, steps + 1):
        began = time.perf_counter()
        values = {f"metric_{number}": step / (number + 1) for number in range(METRICS)} | {"loss": 1 / step}
        rows.step(step, values)
        computed = time.thread_time()
        tracker.step(step, values)
        spent += time.thread_time() - computed
        time.sleep(max(0.0, SECONDS_A_STEP - (time.perf_counter() - began)))
    own = _cpu_seconds(pid) - before
    rows.close(None)
    tracker.close(None)
    return spent / steps / SECONDS_A_STEP, own / steps / SECONDS_A_STEP


def _cpu_seconds(pid: int) -> float:
    """CPU time of a process and those it has started."""
    total = 0.0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(stat.parent.name) == pid or int(fields[2]) == pid:  # Its process group: it has a session of its own.
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def main() -> None:
    """Measure, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trackers", default="tensorboard,wandb,swanlab,trackio")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    options = parser.parse_args()
    line = ResultLine("tracker_cost", wanted=options.json)
    os.environ |= {"WANDB_MODE": "offline", "SWANLAB_MODE": "offline"}
    results: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.trackers.split(","):
            if find_spec(name) is not None:
                share, own = measure(name, Path(scratch) / name, options.steps)
                results |= {f"{name}_share": share, f"{name}_process_share": own}
    shares = [f"{name.removesuffix('_share')} {value:.2%}" for name, value in results.items()]
    line.write(results, f"of a step of 50 ms: {', '.join(shares)}", settings=vars(options))


if __name__ == "__main__":
    main()
