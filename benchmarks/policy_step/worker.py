"""One measurement of one side, alone in its process; `training_step.py --job` runs it, in any environment.

Imports of a side's packages are late: each environment has those of one side.
"""

from __future__ import annotations

import json
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from policy_step.cases import CASES, dimensions, make_samples, useful_flops
from policy_step.timing import Step, to_itself, waits_for_the_device

if TYPE_CHECKING:
    from rlinf_plugins_openpi.model.dimensions import Pi0Dimensions

EMA_DECAY = 0.999


@dataclass(frozen=True)
class Job:
    """The measurement of one process."""

    side: Literal["ours", "lerobot", "openpi"]
    case: str
    size: str
    device: str
    samples: int
    """Samples of an optimizer step."""
    micro_batch: int
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of matrix products; for the peers, of most parameters and their optimizer state as well."""
    compiled: bool = False
    checkpointing: bool = False
    empty_cameras: int = 1
    """Option of lerobot."""
    reshard_after_forward: bool = True
    """Option of ours, like the two below."""
    reduce_every_micro_batch: bool = False
    ema: bool = False
    """Measure again with a moving average."""
    spread: float = 3.0
    """Standard deviation of prompts' lengths, in tokens."""
    steps: int = 10
    warm_up: int = 3


def run_job(job: Job, result: Path) -> None:
    """Measure, and write the result, or the error, as JSON."""
    try:
        found = _measure(job)
    except Exception as error:  # Reported in the table: the other rows still have to be measured.
        traceback.print_exc()
        memory = isinstance(error, torch.OutOfMemoryError)
        found = {"error": "out of memory" if memory else f"{type(error).__name__}: {error}".splitlines()[0]}
    result.write_text(json.dumps({"job": asdict(job), **found}))


def _measure(job: Job) -> dict[str, Any]:
    device = torch.device(job.device)
    case = CASES[job.case]
    sized = dimensions(job.size, case)
    # Fully packed: prompts have the full length.
    samples = make_samples(case, sized, job.samples, spread=0.0 if case.text == case.room else job.spread)
    useful = useful_flops(samples, sized)
    step, versions = _step(job, sized, samples, device)
    before = _graphs()
    found = to_itself(step, device, warm_up=job.warm_up, steps=job.steps)
    found |= _speed(job, useful, found)
    found |= {"useful_tflop_a_sample": round(useful / len(samples) / 1e12, 4), "graphs": _graphs() - before}
    if job.side == "ours":
        warm = _graphs()
        found["host_waits"] = waits_for_the_device(step) if device.type == "cuda" else None
        found["recompiled_when_warm"] = _graphs() - warm
        if job.ema:
            step.average(EMA_DECAY)
            again = to_itself(step, device, warm_up=1, steps=job.steps)
            found["with_ema"] = again | _speed(job, useful, again)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return found | {"card": card, "versions": {"python": sys.version.split()[0], **versions}}


def _speed(job: Job, useful: float, found: dict[str, Any]) -> dict[str, float]:
    seconds = found["step_seconds"]
    return {
        "samples_per_second": round(job.samples / seconds, 3),
        "useful_tflops_per_second": round(useful / seconds / 1e12, 4),
    }


def _graphs() -> int:
    """Number of graphs that torch.compile has created in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _step(job: Job, sized: Pi0Dimensions, samples: list[dict[str, Any]], device: torch.device) -> tuple[Any, Any]:
    versions = {"torch": torch.__version__}
    step: Step
    if job.side == "ours":
        from policy_step.ours import Options, OurStep, sharded

        options = Options(
            compute_dtype=getattr(torch, job.dtype),
            compiled=job.compiled,
            checkpointing="full" if job.checkpointing else "none",
            reshard_after_forward=job.reshard_after_forward,
            reduce_every_micro_batch=job.reduce_every_micro_batch,
        )
        return OurStep(sharded(sized, device, options), samples, micro_batch=job.micro_batch, options=options), versions
    import transformers

    versions["transformers"] = transformers.__version__
    if job.side == "lerobot":
        from importlib.metadata import version

        from policy_step.lerobot import LerobotStep, build, optimizer_of

        versions["lerobot"] = version("lerobot")
        model = build(sized, dtype=job.dtype, device=job.device, compiled=job.compiled)
        step = LerobotStep(
            model,
            optimizer_of(model),
            samples,
            micro_batch=job.micro_batch,
            slots=min(3, CASES[job.case].images + job.empty_cameras),
            checkpointing=job.checkpointing,
        )
        return step, versions
    from policy_step import openpi

    if job.compiled:
        raise ValueError("openpi's training step does not compile")
    step = openpi.OpenpiStep(
        openpi.build(sized, dtype=job.dtype, device=job.device), samples, micro_batch=job.micro_batch
    )
    return step, versions
