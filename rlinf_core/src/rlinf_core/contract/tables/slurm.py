"""The table `[cluster.slurm]`: what the launcher `slurm` asks Slurm for."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from rlinf_core.contract.tables.runner import Section

OWN_OPTIONS = {
    "nodes": "cluster.num_nodes",
    "time": "cluster.slurm.time",
    "signal": "cluster.slurm.signal_seconds",
    "requeue": "cluster.slurm.requeue",
    "no-requeue": "cluster.slurm.requeue",
}
"""Options of `sbatch` with a key of their own."""
FIXED_OPTIONS = {
    "ntasks": "one torchrun runs on each node, and starts a process per GPU",
    "ntasks-per-node": "one torchrun runs on each node, and starts a process per GPU",
    "gpus-per-task": "one torchrun runs on each node with all its GPUs; use gres or gpus-per-node",
    "array": "all jobs of an array would train the same run; launch each run by itself",
    "wrap": "the batch file says what to run",
    "parsable": "`rlinf launch` reads the job's number",
    "test-only": "`rlinf launch --dry-run` prints the batch file without submitting it",
    "wait": "`rlinf launch` returns once the job is queued",
    "open-mode": "a requeued job must not erase its log",
}
"""Options of `sbatch` that cannot be set, with the reason."""
GPU_OPTIONS = ("gres", "gpus", "gpus-per-node")
"""Options of `sbatch` that ask for GPUs in the words of a site, for example `gpu:a100:8`."""


def _check_time(time: str) -> str:
    """Accept what `sbatch --time` does."""
    if time and not re.fullmatch(r"\d+(:\d{1,2}){0,2}|\d+-\d{1,2}(:\d{1,2}){0,2}", time):
        raise ValueError(f'invalid time limit {time!r}: write hours:minutes:seconds ("12:00:00") or days-hours ("2-4")')
    return time


def _check_options(options: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
    for name, value in options.items():
        if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)+|[a-z][a-z0-9]+", name):
            raise ValueError(
                f'{name!r} is not the long name of an option of sbatch without dashes, as in {{ partition = "gpu" }}'
            )
        if name in OWN_OPTIONS:
            raise ValueError(f"set {OWN_OPTIONS[name]} instead of {name!r}")
        if name in FIXED_OPTIONS:
            raise ValueError(f"{name!r} cannot be set: {FIXED_OPTIONS[name]}")
        if value is False:
            raise ValueError(f"{name} = false does nothing: leave it out")
        if not str(value).isprintable():
            raise ValueError(f"{name} = {value!r} contains characters that a line of a batch file cannot contain")
    return options


def _check_setup(lines: tuple[str, ...]) -> tuple[str, ...]:
    for line in lines:
        if line.lstrip().startswith("#SBATCH"):
            raise ValueError(f"{line!r} would come too late: set the option in cluster.slurm.options")
    return lines


Options = Annotated[dict[str, str | int | bool], AfterValidator(_check_options)]


class SlurmConfig(Section):
    """What the launcher `slurm` asks for."""

    gpus_per_node: int = Field(default=0, ge=0)
    """GPUs on each node, with one process each; 0: with `trainer.device = "cpu"` only."""
    time: Annotated[str, AfterValidator(_check_time)] = ""
    """Time limit, as in `sbatch --time`: `"12:00:00"`, `"2-12"`; empty: that of the partition."""
    signal_seconds: int = Field(default=120, ge=60, le=65535)
    """How long before the time limit the run is asked to save and to end; it is then queued again."""
    requeue: bool = True
    """Queue the job again after the time limit, a preemption or the failure of a node; it continues from its last
    checkpoint. After the time limit, only if it has saved a checkpoint since it began."""
    setup: Annotated[tuple[str, ...], AfterValidator(_check_setup)] = ()
    """Lines of shell that the job runs first, on the first node: `["module load cuda", "export NCCL_DEBUG=WARN"]`. The
    processes inherit the environment."""
    python: str = ""
    """The Python to run on the nodes; empty: the one that runs `rlinf launch`, under the same path."""
    options: Options = {}
    """Further options of `sbatch` by their long names: `{ partition = "gpu", account = "lab", exclusive = true }`."""
    srun_options: Options = {}
    """Further options of `srun`, which starts torchrun on each node: `{ container-image = "/images/rlinf.sqsh" }`."""
