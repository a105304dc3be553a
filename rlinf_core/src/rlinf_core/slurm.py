"""Run on a Slurm cluster: write the run's batch file and submit it.

The file asks for one task per node, and each task is a torchrun. Before the time limit Slurm signals the batch shell,
which passes SIGTERM on to every torchrun: the run saves and ends, and the shell queues the job again. After a
preemption or the failure of a node, Slurm queues it again itself. Torch-free: the machine that submits has no GPU.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import dedent

from rlinf_core.contract.run import RunConfig
from rlinf_core.contract.tables.slurm import GPU_OPTIONS
from rlinf_core.data.loading.sampling import check_batch
from rlinf_core.errors import UserError
from rlinf_core.files import write_text, writing
from rlinf_core.process.ending import EXIT_FILE
from rlinf_core.torchrun import share_of_machine
from rlinf_core.training.run_folder import check_folder

OVERWRITE = "--overwrite"
SUBMIT_SECONDS = 120
"""How long `sbatch` may take."""


def processes_per_node(run: RunConfig) -> int:
    """Number of processes on each node.

    Raises:
        UserError: GPUs are not asked for, the placement does not fit them, or the batch cannot be divided.
    """
    cluster, gpus = run.cluster, run.cluster.slurm.gpus_per_node
    if run.trainer.device == "cpu":
        if gpus:
            raise UserError(
                f'cluster.slurm.gpus_per_node = {gpus} would be unused: trainer.device is "cpu". Leave one of them out'
            )
    elif not gpus:
        raise UserError(
            "cluster.slurm.gpus_per_node is not set: the machine that submits does not know the GPUs of the nodes. "
            'Set it, or trainer.device = "cpu"'
        )
    share = share_of_machine(cluster, gpus)
    if share.devices:
        raise UserError(
            f"cluster.component_placement selects GPUs {list(share.devices)} of the {gpus} on each node, and the "
            f'others would be idle: set cluster.slurm.gpus_per_node = {len(share.devices)} and the placement to "all"'
        )
    ranks = share.processes * cluster.machines
    run.trainer.check_ranks(ranks)
    check_batch(run.trainer.global_batch_size, run.trainer.micro_batch_size, ranks)
    return share.processes


def batch_file(run: RunConfig, arguments: Sequence[str]) -> str:
    """The batch file of a run.

    Args:
        run: The config.
        arguments: Arguments of `rlinf_core.train`.

    Raises:
        UserError: See `processes_per_node`.
    """
    return f"#!/bin/bash\n{_header(run)}\n{_body(run, arguments, processes_per_node(run))}"


def submit(run: RunConfig, arguments: Sequence[str]) -> int:
    """Write the batch file beside the run's folder, submit it, and print the job's number; returns 0.

    Args:
        run: The config.
        arguments: Arguments of `rlinf_core.train`.

    Raises:
        UserError: See `processes_per_node`; or the folder cannot be written to, or `sbatch` is missing or refuses.
    """
    text = batch_file(run, arguments)
    check_folder(run)
    path = run.folder.with_name(f"{run.folder.name}.sbatch")
    with writing(path, "Make room there, or name another runner.output_dir"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    try:
        command = ["sbatch", "--parsable", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SUBMIT_SECONDS, check=False)
    except FileNotFoundError as error:
        raise UserError(
            f'cluster.launcher = "slurm": there is no sbatch on PATH. Launch on a machine that submits jobs of the '
            f"cluster, or submit {path} there"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f"sbatch {path} has not answered for {SUBMIT_SECONDS} s: is the controller up?") from error
    if done.returncode:
        raise UserError(f"sbatch refused {path}: {(done.stderr or done.stdout).strip()}")
    job = done.stdout.strip().splitlines()[-1].split(";")[0] if done.stdout.strip() else "?"
    print(f"submitted job {job}: {path}; its log: {_log(run, job)}", flush=True)
    return 0


def _log(run: RunConfig, job: str) -> str:
    return f"{run.folder.absolute()}.slurm-{job}.out"


def _header(run: RunConfig) -> str:
    """The `#SBATCH` lines: those of the site last, which replace ours where Slurm lets them."""
    slurm = run.cluster.slurm
    ours: dict[str, str | int | bool] = {
        "job-name": run.runner.name,
        "nodes": run.cluster.machines,
        "ntasks-per-node": 1,
    }
    if slurm.gpus_per_node and not any(name in slurm.options for name in GPU_OPTIONS):
        ours["gpus-per-node"] = slurm.gpus_per_node
    if slurm.time:
        ours["time"] = slurm.time
    ours |= {
        "requeue" if slurm.requeue else "no-requeue": True,
        "signal": f"B:USR1@{slurm.signal_seconds}",
        "open-mode": "append",
        "output": _log(run, "\0").replace("%", "%%").replace("\0", "%j"),
        "chdir": str(Path.cwd()),
    }
    return "".join(f"#SBATCH {option}\n" for option in _options(ours | slurm.options))


def _options(options: Mapping[str, str | int | bool]) -> list[str]:
    return [f"--{name}" if value is True else f"--{name}={shlex.quote(str(value))}" for name, value in options.items()]


def _body(run: RunConfig, arguments: Sequence[str], processes: int) -> str:
    slurm = run.cluster.slurm
    again = [word for word in arguments if word != OVERWRITE]
    return "".join(f"{line}\n" for line in slurm.setup) + _BODY.format(
        folder=shlex.quote(str(run.folder.absolute())),
        python=shlex.quote(slurm.python or sys.executable),
        arguments=shlex.join(again),
        overwrite=_OVERWRITE if OVERWRITE in arguments else "",
        srun=shlex.join(["srun", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]),
        srun_options="".join(f" {option}" for option in _options(slurm.srun_options)),
        nodes=run.cluster.machines,
        processes=processes,
        restarts=run.cluster.max_restarts,
        requeue=_REQUEUE.format(exit_file=EXIT_FILE) if slurm.requeue else "",
    )


_BODY = dedent(
    """\
    run={folder}
    train=({arguments})
    {overwrite}before=$(cat "$run/latest" 2>/dev/null)
    # For the processes of srun. Two jobs may share a node, and a requeued one must not meet what is left of itself.
    export python={python}
    export host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) port=$((20000 + SLURM_JOB_ID % 20000))
    export start="$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}"
    # srun has not inherited it from sbatch since Slurm 22.05.
    [ -z "${{SLURM_CPUS_PER_TASK:-}}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
    # Agents of torch 2.11 share the store of the first rendezvous, whose address a restarted one does not learn.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

    {srun}{srun_options} bash -c '
    exec "$python" -m torch.distributed.run --nnodes {nodes} --nproc-per-node {processes} \\
        --max-restarts {restarts} --rdzv-backend c10d --rdzv-id "$start" --rdzv-endpoint "$host:$port" \\
        --rdzv-conf "is_host=$((SLURM_NODEID == 0))" --local-addr "$SLURMD_NODENAME" -m rlinf_core.train "$@"
    ' torchrun "${{train[@]}}" &
    step=$!
    trap 'due=1; kill -TERM "$step"' USR1  # The time limit is near.
    trap 'kill -TERM "$step"' TERM  # Slurm preempts the job, and queues it again itself.
    wait "$step"
    code=$?
    while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done  # A signal ends `wait` early.
    {requeue}exit "$code"
    """
)

_OVERWRITE = """\
[ "${SLURM_RESTART_COUNT:-0}" != 0 ] || train+=(--overwrite)  # A job that is queued again continues its run.
"""

_REQUEUE = """\
if [ -n "${{due:-}}" ] && ! grep -qsE '"reason": "(finished|mistake)"' "$run/{exit_file}"; then
    if [ "$(cat "$run/latest" 2>/dev/null)" != "$before" ]; then
        scontrol requeue "$SLURM_JOB_ID"
    else
        echo "not queued again: no checkpoint was saved within this job's time limit" >&2
    fi
fi
"""
