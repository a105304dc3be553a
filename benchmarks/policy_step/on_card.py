"""The model at real size on one GPU: every row of the table in its own process, so that none inherits memory.

Rows are measured in the order of what they are worth, until the time is over; what was found is written after each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from policy_step.table import markdown
from policy_step.worker import Job

SHORTEST = 20.0
"""No process is started with fewer seconds left than this."""


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    name: str
    job: Job
    smaller: tuple[int, ...] = ()
    """Micro batches to try if the GPU's memory is too small for the job's."""


def rows(size: str, device: str, samples: int, micro_batch: int, *, steps: int) -> list[Row]:
    """All rows, the most important first."""
    shared: dict[str, Any] = {"size": size, "device": device, "samples": samples, "steps": steps}
    ours: dict[str, Any] = {"side": "ours", "micro_batch": micro_batch, "compiled": True, **shared}
    lerobot: dict[str, Any] = {"side": "lerobot", "case": "two_of_three", **shared}
    openpi: dict[str, Any] = {"side": "openpi", "micro_batch": samples, "checkpointing": True, **shared}
    half = (max(1, samples // 2), max(1, samples // 4))
    quarter = max(1, samples // 4)
    return [
        Row("ours, π0.5, LIBERO-like", Job(case="two_of_three", ema=True, **ours), (micro_batch // 2,)),
        Row("openpi, bf16 as shipped, π0.5, LIBERO-like", Job(case="two_of_three", **openpi), half),
        Row(
            "lerobot, bf16, compiled, no checkpointing, π0.5, LIBERO-like",
            Job(micro_batch=quarter, compiled=True, **lerobot),
            (quarter // 2,),
        ),
        Row("ours, π0.5, ALOHA-like", Job(case="three_of_three", ema=True, **ours), (micro_batch // 2,)),
        Row("ours, π0, LIBERO-like", Job(case="pi0_two_of_three", ema=True, **ours), (micro_batch // 2,)),
        Row(
            "lerobot, its LIBERO recipe (bf16, checkpointing), π0.5, LIBERO-like",
            Job(micro_batch=samples, checkpointing=True, **lerobot),
            half,
        ),
        Row("ours, π0.5, same tokens", Job(case="same_tokens", **ours), (micro_batch // 2,)),
        Row("openpi, float32, π0.5, LIBERO-like", Job(case="two_of_three", dtype="float32", **openpi), half),
        Row(
            "lerobot, bf16, no checkpointing, π0.5, LIBERO-like",
            Job(micro_batch=quarter, **lerobot),
            (quarter // 2,),
        ),
        Row(
            "lerobot, bf16, no checkpointing, no empty camera, π0.5, LIBERO-like",
            Job(micro_batch=quarter, empty_cameras=0, **lerobot),
            (quarter // 2,),
        ),
        Row("ours, not compiled, π0.5, LIBERO-like", Job(case="two_of_three", **(ours | {"compiled": False}))),
        Row("ours, π0.5, MetaWorld-like", Job(case="one_of_three", **ours)),
        Row("openpi, bf16 as shipped, π0.5, ALOHA-like", Job(case="three_of_three", **openpi), half),
        Row("openpi, bf16 as shipped, π0, LIBERO-like", Job(case="pi0_two_of_three", **openpi), half),
    ]


def measure(
    wanted: list[Row], pythons: Mapping[str, str], output: Path, *, minutes: float, changes: Mapping[str, Any]
) -> dict[str, Any]:
    """Measure row after row and keep `training_step.json` and `training_step.md` in `output` up to date.

    Args:
        wanted: The rows.
        pythons: Side -> the interpreter of its environment; rows of other sides are left out.
        output: Folder.
        minutes: When to start nothing more and end what runs.
        changes: Fields of `Job` that are other than the rows', for ours.
    """
    end = time.monotonic() + 60 * minutes
    found: dict[str, Any] = {"rows": {}, "not_measured": {}}
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        # Empty at the start: the first row's first step compiles, later ones reuse what it compiled.
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(Path(scratch) / "compiled")}
        for row in wanted:
            if row.job.side not in pythons:
                found["not_measured"][row.name] = f"no environment for {row.job.side}: --peer-python"
            elif end - time.monotonic() < SHORTEST:
                found["not_measured"][row.name] = f"the {minutes:g} minutes were over"
            else:
                ours = row.job.side == "ours"
                changed = replace(row, job=replace(row.job, **changes)) if ours else row
                result = _row(changed, pythons[row.job.side], Path(scratch), end, environment)
                found["not_measured" if "error" in result else "rows"][row.name] = result.get("error", result)
            (output / "training_step.json").write_text(json.dumps(found, indent=1))
            (output / "training_step.md").write_text(markdown(found))
    return found


def _row(row: Row, python: str, scratch: Path, end: float, environment: Mapping[str, str]) -> dict[str, Any]:
    """The result of a row, with the largest micro batch that fits into the GPU's memory."""
    result: dict[str, Any] = {}
    for micro_batch in (row.job.micro_batch, *(size for size in row.smaller if size > 0)):
        print(f"{row.name}, micro batch {micro_batch} ...", file=sys.stderr, flush=True)
        result = _process(replace(row.job, micro_batch=micro_batch), python, scratch, end, environment)
        if result.get("error") != "out of memory":
            break
    return result


def _process(job: Job, python: str, scratch: Path, end: float, environment: Mapping[str, str]) -> dict[str, Any]:
    script, path = Path(__file__).parents[1] / "training_step.py", scratch / "result.json"
    path.unlink(missing_ok=True)
    command = [python, str(script), "--job", json.dumps(asdict(job)), "--output", str(path)]
    try:
        left = max(1.0, end - time.monotonic())
        done = subprocess.run(command, env=dict(environment), stdout=sys.stderr, timeout=left, check=False)
    except subprocess.TimeoutExpired:
        return {"error": "the time was over before it was measured"}
    if not path.exists():
        return {"error": f"its process ended with code {done.returncode}; what it printed is above"}
    result: dict[str, Any] = json.loads(path.read_text())
    return result
